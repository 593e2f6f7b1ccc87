"""Signals that stop a command: one line, 128 + the signal's number as exit code, nothing left behind.

While the command still imports, there is nothing to clean up and it ends at once. Afterwards the signal becomes an exception,
so that what is written is removed and other processes are ended on the way out.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN_SECONDS = 0.05  # after which a signal is sent again whose exception was dropped


class Stopped(BaseException):
    """A signal asked the command to stop. No `Exception`, so that no handler of errors catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


def is_command() -> bool:
    """Whether this process is the command `sbpatch` (or `python -m sbpatch.cli`), and no program that imports the library."""
    if multiprocessing.parent_process() is not None:
        return False
    by_name = os.path.basename(sys.argv[0]) == "sbpatch"
    return by_name or (sys.argv[:1] == ["-m"] and "sbpatch.cli" in sys.orig_argv)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, f"sbpatch: {Stopped(number)}\n".encode())
    os._exit(128 + number)


COMMAND = is_command()  # found out as the package is imported: `python -m` changes sys.argv when the command starts


def _answer(handler: Any) -> None:
    if COMMAND and threading.current_thread() is threading.main_thread():  # signals are the main thread's
        for number in SIGNALS:
            signal.signal(number, handler)


def end_at_once() -> None:
    """From here on, and for `sbpatch` as a command alone, a signal ends the process with its line."""
    _answer(_end)


@contextmanager
def ending() -> Iterator[None]:
    """Inside, a signal does what it does after `end_at_once`: for imports, which might catch an exception."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    end_at_once()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def ignored() -> None:
    """From here on, and for `sbpatch` as a command alone, signals do nothing: its work is done, and Python ends.

    Handlers are taken back by then, and the signal's default would give the exit code of a process that was killed.
    """
    _answer(signal.SIG_IGN)


@contextmanager
def raising() -> Iterator[None]:
    """Inside, a signal raises `Stopped`; where it strikes code whose exceptions Python drops, it comes once more.

    An error that follows is one that a library made of it, as pydantic does of what its serializers raise: `Stopped` again.
    """
    before = sys.unraisablehook
    struck: list[int] = []

    def dropped(what: Any) -> None:
        if isinstance(what.exc_value, Stopped):
            number = what.exc_value.code - 128
            threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number)).start()
        else:
            before(what)

    def stop(number: int, frame: FrameType | None) -> None:
        struck.append(number)
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    sys.unraisablehook = dropped
    handlers = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    except Exception as error:
        if struck:
            raise Stopped(struck[-1]) from error
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = before


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, signals wait, and processes started here never get SIGINT: a terminal sends it to them too."""
    waiting: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # The mask is what a new process inherits; of this one any other thread may still take the signal.
    handlers = {number: signal.signal(number, lambda number, frame: waiting.append(number)) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])
