"""The one error that sbpatch raises on purpose: a line a user can act on."""


class SbpatchError(Exception):
    """What is wrong, where, and what to do about it, in one line.

    The command line prints the line and exits with code 1; library callers catch this type.
    """


def one_line(error: BaseException) -> str:
    """What an exception says, as a part of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
