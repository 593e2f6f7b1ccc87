"""What calibration has measured so far, in a file: a run that was cut off goes on after its last complete sample."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import SbpatchError, system_reason
from ..interrupts import Stopped
from .candidates import Candidate


class Journal:
    """Lines of JSON, each behind its checksum; the first names the `settings` that the others, one a sample, hold for.

    A file of other settings, or none, begins anew; a last line that was cut off is dropped. A file that is damaged, or no
    file of ours, begins anew too, and `note` says so. Numbers survive with all their bits, so that a resumed calibration gives
    the same plan. The file is locked while it is open. `path` None keeps nothing.

    Raises:
        SbpatchError: the file cannot be written, or another run has it open.
    """

    def __init__(self, path: Path | None, settings: str) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        self.note = ""
        self.measured = False  # whether there is anything in the file to go on with
        self._file = -1
        if path is None:
            return
        with self._told():
            self._file = self._opened(path)
        try:
            with self._told():
                whole = self._recover(os.pread(self._file, os.fstat(self._file).st_size, 0), settings)
                os.ftruncate(self._file, whole)
                if not whole:
                    self._append(settings)
            self.measured = bool(self.found)
        except BaseException:
            self.close()
            raise

    def recall(self, key: str, candidates: Mapping[str, list[Candidate]]) -> bool:
        """Give candidates the sums they had after these samples; False where it was not measured yet."""
        if key not in self.found:
            return False
        for name, tried in candidates.items():
            for candidate, (errors, damages, together, seen) in zip(tried, self.found[key][name], strict=True):
                candidate.error_sum = torch.tensor(errors, dtype=torch.float64)
                candidate.damage_sum = torch.tensor(damages, dtype=torch.float64)
                candidate.together_sum = torch.tensor(together, dtype=torch.float64)
                candidate.seen = seen
        return True

    def record(self, key: str, candidates: Mapping[str, list[Candidate]]) -> None:
        """Keep the candidates' sums as they are after these samples."""
        if self.path is None:
            return
        sums = {
            name: [(c.error_sum.tolist(), c.damage_sum.tolist(), c.together_sum.tolist(), c.seen) for c in tried]
            for name, tried in candidates.items()
        }
        with self._told():
            self._append({key: sums})
        self.measured = True

    @contextmanager
    def kept_if_cut_off(self) -> Iterator[None]:
        """Remove the file where the block is done or refused. A run that a signal stopped leaves it, with what it had measured,
        to the next one.
        """
        try:
            yield
        except (Stopped, KeyboardInterrupt):
            if self._file >= 0 and self.measured:
                os.close(self._file)
                self._file = -1
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Remove the file: the calibration is done, or refused."""
        if self.path is not None and self._file >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    # -- the file ----------------------------------------------------------------------------------------------------

    def _opened(self, path: Path) -> int:
        """The file, locked; a link in its place is taken away, what it leads to is left alone."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            opened = os.open(path, flags, 0o600)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            path.unlink()
            self.note = f"{path} was a link: it is taken away, and the calibration starts afresh"
            opened = os.open(path, flags | os.O_EXCL, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                raise SbpatchError(
                    f"{path} is no file: remove it, it is where a calibration keeps what it has measured"
                )
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # against other processes
        except (BlockingIOError, PermissionError):
            os.close(opened)
            raise SbpatchError(f"{path} is in use: another run writes to the same output") from None
        except BaseException:
            os.close(opened)
            raise
        return opened

    def _recover(self, data: bytes, settings: str) -> int:
        """Fill `found` from the complete lines; how many bytes of the file to keep."""
        lines = data.split(b"\n")[:-1]  # behind the last line break is what was cut off
        try:
            values = [_checked(line) for line in lines]
            if values[:1] != [settings]:
                return 0
            for value in values[1:]:
                self.found |= value
        except (ValueError, TypeError, RecursionError):
            self.found = {}
            self.note = f"{self.path} is damaged: the calibration starts afresh"
            return 0
        return sum(len(line) + 1 for line in lines)

    def _append(self, value: Any) -> None:
        line = json.dumps(value).encode()
        line = b"%08x %s\n" % (zlib.crc32(line), line)
        os.lseek(self._file, 0, os.SEEK_END)
        while line:
            line = line[os.write(self._file, line) :]

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SbpatchError(f"cannot write {self.path}: {system_reason(error)}") from error


def _checked(line: bytes) -> Any:
    """What a line holds, if it is as it was written."""
    checksum, _, text = line.partition(b" ")
    if int(checksum, 16) != zlib.crc32(text):
        raise ValueError("checksum")
    return json.loads(text)
