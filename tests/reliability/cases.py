"""How a command must end, whatever it is given: done, or one line; in bounded time; with nothing left behind."""

from __future__ import annotations

import faulthandler
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import command as command

from sbpatch.errors import SbpatchError

SECONDS = 60  # after which a case counts as hanging
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@contextmanager
def bounded(seconds: int = SECONDS) -> Iterator[None]:
    """Fail where the block takes longer; end the tests where it hangs in code that hears no signal."""

    def hangs(number: int, frame: Any) -> None:
        pytest.fail(f"hangs: no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(seconds + 10, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def tree(folder: Path) -> dict[str, bytes]:
    """All below, hidden files too; of what is no regular file the name alone."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    return found


def refused_line(capfd: pytest.CaptureFixture[str], *args: str, code: int = 1) -> str:
    """The one line of a command that must end with `code`: foreseen, without control characters, leaving nothing."""
    before = tree(Path())
    capfd.readouterr()
    with bounded():
        assert command(*args) == code, args
    said = capfd.readouterr()
    for text in said:
        assert "Traceback" not in text
        assert not CONTROL.search(text.replace("\t", "")), repr(text)
    assert "should not have happened" not in said.err, said.err
    if code == 1:
        assert said.out == ""
        assert said.err.count("\n") == 1, said.err
        assert said.err.startswith("sbpatch: ")
    assert tree(Path()) == before
    return said.err


def one_line_of(work: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The line of the SbpatchError that `work` must raise in bounded time."""
    with bounded(), pytest.raises(SbpatchError) as excinfo:
        work(*args, **kwargs)
    text = str(excinfo.value)
    assert text
    assert "\n" not in text
    assert not CONTROL.search(text)
    assert len(text) < 900
    return text


def works_or_refuses(work: Callable[..., Any], *args: Any, seconds: int = SECONDS) -> None:
    """Either is right; anything but an SbpatchError, or no end, is not."""
    with bounded(seconds):
        said = ""
        try:
            work(*args)
        except SbpatchError as error:
            said = str(error)
        assert not CONTROL.search(said)
        assert "\n" not in said
