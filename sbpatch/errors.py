"""The one error that sbpatch raises on purpose, a line a user can act on, and what others' errors come to in a line."""

from __future__ import annotations

import re

LONGEST = 300  # characters of another library's message
# What PyTorch's allocators say where there is not enough memory; the last is CUDA's.
ALLOCATORS = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Tried to allocate|bad_alloc|bad allocation"
)
ASKED = re.compile(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGTPE]iB)")


class SbpatchError(Exception):
    """What is wrong, where, and what to do about it, in one line.

    The command line prints the line and exits with code 1; library callers catch this type. Characters that a terminal
    would obey, which names and files may hold, stand in it as their escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.splitlines())))


def printable(text: str) -> str:
    """The text with control characters, invisible ones and what is not Unicode as backslash escapes; line breaks stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(error: BaseException) -> str:
    """What an exception says, as a part of one line; of an allocator's failure, how much it was asked for."""
    if out_of_memory(error):
        asked = ASKED.search(str(error))
        if asked is None:
            return "not enough memory"
        return f"not enough memory: {asked[2] or f'{int(asked[1]) / 1e9:.3g} GB'} were asked for at once"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed: Python's, NumPy's, or PyTorch's on any device."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(ALLOCATORS.search(str(error))))


def system_reason(error: BaseException) -> str:
    """What the operating system says of an OSError, without the path; of any other exception its line."""
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)
