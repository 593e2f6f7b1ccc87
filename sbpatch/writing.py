"""Every file that sbpatch writes goes through here.

A result is written to a hidden folder beside its target, synced, and moved into place: a run that is cut off leaves what was
there before, or nothing. The folder is locked while its run lives, so that the next run to the same target can tell one that
a killed run left, and removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import SbpatchError, out_of_memory, system_reason
from .reading import kind, read_json

NAME_BYTES = 255  # of a file's name, in the file systems in use
RANDOM_BYTES = 8  # that tempfile puts behind a name
DESCRIPTOR = re.compile(r"/(?:dev/fd|proc/self/fd)/(\d+)")
STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
UNREAD = {
    ".pt2",
    ".onnx",
}  # what export writes and no command reads: it may be replaced also inside a model's directory
PLAN, PLOT = "sbpatch.json", "report.png"  # of a directory that calibrate wrote
# How libraries that are no Python say that the system refused to write.
WRITE_FAILED = re.compile(r"os error \d+|I/O error|No space left|file write failed")


def json_text(values: Any) -> str:
    """JSON of a result, which holds finite numbers alone.

    Raises:
        SbpatchError: a number is NaN or infinite; the line names it.
    """
    if where := _not_finite(values):
        raise SbpatchError(f"the result's {where} is not a finite number: nothing is written; try --dtype float32")
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def _not_finite(values: Any, where: str = "") -> str:
    """Where in a result the first number stands that JSON cannot hold, or ""."""
    if isinstance(values, float):
        return "" if math.isfinite(values) else where or "value"
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(values, Mapping):
        items = values.items()
    elif isinstance(values, (list, tuple)):
        items = enumerate(values)
    return next((found for key, x in items if (found := _not_finite(x, f"{where}.{key}".strip(".")))), "")


# -- where a result may go --------------------------------------------------------------------------------------------


def check_directory(target: Path) -> Path:
    """Where an output directory goes, links followed.

    Raises:
        SbpatchError: a link that leads nowhere, no directory to write it into, or a name that is too long.
    """
    place = _followed(target)
    if len(os.fsencode(place.name)) > NAME_BYTES:
        raise SbpatchError(f"cannot write {target}: a name has at most {NAME_BYTES} bytes")
    if not place.parent.is_dir():
        raise SbpatchError(f"cannot write {target}: no directory {place.parent}")
    return place


def check_target(target: Path, inputs: Iterable[Path | None] = ()) -> Path:
    """Where a result file goes: links followed, `target` itself otherwise. Refused before any work is done.

    Args:
        inputs: files and directories that the run reads; of the directories no file that is there may be replaced, but in a
            patched one (with a plan in it) an earlier `--json`, and a plot that is not the model card's.

    Raises:
        SbpatchError: it is a directory, a device or a pipe, a link that leads nowhere, in no folder, or one of the inputs.
    """
    place = check_directory(target)
    if place.exists() and (found := kind(place)):
        raise SbpatchError(f"cannot write {target}: it is {found}")
    for given in inputs:
        if given is None or not place.exists() or not given.exists():
            continue
        inside = given.is_dir() and place.is_relative_to(given.resolve()) and not _may_be_replaced(place)
        if inside or given.samefile(place):
            raise SbpatchError(f"cannot write {target}: it is there, and this run reads {given}; give another name")
    return place


def _may_be_replaced(place: Path) -> bool:
    """Whether a file in a directory that is read is none of its own: an export, or an earlier result beside a plan."""
    if place.suffix in UNREAD:
        return True
    if not place.with_name(PLAN).is_file() or place.name in (PLAN, PLOT):
        return False
    return place.suffix == ".png" or (place.suffix == ".json" and _is_result(place))


def _is_result(path: Path) -> bool:
    """Whether a file is what `--json` wrote once: it says by which version of sbpatch."""
    try:
        found = read_json(path, "result")
    except SbpatchError:
        return False
    versions = found.get("versions") if isinstance(found, dict) else None
    return isinstance(versions, dict) and "sbpatch" in versions


def check_apart(output: Path, inputs: Iterable[Path | None]) -> None:
    """Refuse an output directory, which is replaced as a whole, that holds something the run reads or also writes.

    Raises:
        SbpatchError: one of the inputs lies in it.
    """
    whole = output.resolve()
    for given in inputs:
        if given is not None and whole in given.resolve().parents:
            raise SbpatchError(f"{given} lies in the output directory {output}, which is replaced: give another place")


def _followed(target: Path) -> Path:
    """The absolute path with its links followed.

    Raises:
        SbpatchError: they lead nowhere, or round in a circle.
    """
    try:
        if target.is_symlink() or target.absolute().name in ("", ".."):
            return target.resolve(strict=True)
        return target.absolute().parent.resolve() / target.absolute().name
    except (OSError, RuntimeError, ValueError) as error:
        looped = isinstance(error, RuntimeError) or getattr(error, "errno", None) == errno.ELOOP
        reason = "it is a link that leads to itself" if looped else "it is a link that leads nowhere"
        raise SbpatchError(
            f"cannot write {target}: {reason if target.is_symlink() else system_reason(error)}"
        ) from None


def descriptor(path: Path) -> int | None:
    """The open file that `-`, /dev/stdout, /dev/fd/N and the like name; None for every other path."""
    found = DESCRIPTOR.fullmatch(str(path))
    return 1 if str(path) == "-" else STREAMS.get(str(path), int(found[1]) if found else None)


def beside(target: Path, suffix: str) -> Path:
    """The hidden path `.NAME.suffix` beside a target, its name cut and hashed where it would be too long."""
    name = target.absolute().name
    if len(os.fsencode(name)) + len(suffix) + RANDOM_BYTES + 2 > NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return target.absolute().with_name(f".{name}.{suffix}")


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def written_whole(target: Path, sync: bool = True) -> Iterator[Path]:
    """A path to write a file or directory to; it takes the target's place only if the block succeeds.

    It lies on the target's file system, in a hidden folder that is gone afterwards. `sync` False leaves it to the system when
    the disk has it: for caches.

    Raises:
        SbpatchError: the target cannot be written; what was there before is still there.
    """
    place = _followed(target)
    try:
        with _scratch(place) as scratch:
            fresh = scratch / "new"
            yield fresh
            if sync:
                _sync(fresh)
            _take_place(fresh, place)
            if sync:
                _sync_one(place.parent)
    except SbpatchError:
        raise
    except Exception as error:
        if not _of_the_disk(error):
            raise
        raise SbpatchError(f"cannot write {target}: {system_reason(error)}") from error


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """A new locked folder beside `place`; those that killed runs left there are removed first."""
    start = beside(place, "writing-").name
    for left in place.parent.iterdir():
        if left.name.startswith(start) and left.is_dir() and not left.is_symlink():
            _remove_unlocked(left)
    scratch, lock = None, -1
    try:
        while scratch is None or not scratch.exists():  # another run may have taken it for a killed one's
            scratch = Path(tempfile.mkdtemp(prefix=start, dir=place.parent))
            lock = os.open(scratch, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield scratch
    finally:
        try:
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
        finally:  # once more, for a signal may have cut that short
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
            if lock >= 0:
                os.close(lock)


def _remove_unlocked(folder: Path) -> None:
    with suppress(OSError):  # gone already, locked by a run that lives, or another user's
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _take_place(fresh: Path, place: Path) -> None:
    """Move a file or folder to `place`; a folder that is there changes places with it, in one step where Linux can."""
    if not place.is_dir():
        fresh.replace(place)
        return
    old = fresh.with_name("old")
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(fresh), os.fsencode(place)
    if exchange is not None and exchange(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return
    place.rename(old)
    try:
        fresh.rename(place)
    except BaseException:
        old.rename(place)
        raise


def _sync(path: Path) -> None:
    """Have the disk hold a file, or all of a folder."""
    for folder, _, names in os.walk(path):
        for name in (*names, "."):
            _sync_one(Path(folder, name))
    if path.is_file():
        _sync_one(path)


def _sync_one(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # file systems without it
            raise
    finally:
        os.close(opened)


def _of_the_disk(error: Exception) -> bool:
    """Whether a writer failed on what the system answered: its own OSError, or what other libraries make of one."""
    if out_of_memory(error):
        return False
    return isinstance(error, OSError) or bool(WRITE_FAILED.search(str(error)))
