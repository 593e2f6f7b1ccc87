"""What may be opened: regular files of a bounded size; everything else, which may never end, is refused by its kind."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from .errors import SbpatchError, one_line, system_reason

MOST_TEXT = 64 << 20  # bytes of a JSON or YAML file that is read
KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind(path: Path) -> str:
    """What stands at a path that is no regular file; "" where it is one.

    Raises:
        SbpatchError: nothing that can be looked at is there.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise SbpatchError(f"{path} cannot be read: {system_reason(error)}") from None
    return next((name for test, name in KINDS if test(mode)), "")


def check_regular(path: Path) -> None:
    """Refuse to open anything but a regular file: a named pipe or a device may never end.

    Raises:
        SbpatchError: it is something else, or cannot be looked at.
    """
    if found := kind(path):
        raise SbpatchError(f"{path} is {found}, not a file")


def check_folder(folder: Path) -> None:
    """Refuse a model's folder that holds a named pipe, a socket or a device: other libraries would open it and wait.

    Raises:
        SbpatchError: it does, or it cannot be listed.
    """
    try:
        found = [entry for entry in folder.iterdir() if not entry.is_dir() and entry.exists() and not entry.is_file()]
    except OSError as error:
        raise SbpatchError(f"{folder} cannot be read: {system_reason(error)}") from None
    if found:
        raise SbpatchError(f"{found[0]} is {kind(found[0])}, not a file: remove it")


def read_text(path: Path, what: str) -> str:
    """A UTF-8 file of at most 64 MB; `what` it should be stands in the error.

    Raises:
        SbpatchError: it is missing, no regular file, too long, not UTF-8.
    """
    check_regular(path)
    try:
        if path.stat().st_size > MOST_TEXT:
            raise SbpatchError(f"{path} has more than {MOST_TEXT >> 20} MB: that is no {what}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SbpatchError(f"{path} cannot be read: {system_reason(error)}") from None
    except UnicodeDecodeError as error:
        raise SbpatchError(f"{path} is not a {what}: it is not UTF-8 ({one_line(error)})") from None


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds.

    Raises:
        SbpatchError: as `read_text`, or it is not JSON, or nested too deeply.
    """
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SbpatchError(f"{path} is not a {what}: {one_line(error)}") from None
