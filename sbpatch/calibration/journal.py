"""What calibration has measured so far, in a file: a run that was cut off goes on after its last complete batch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import SbpatchError
from .candidates import Candidate


class Journal:
    """Lines of JSON, one a batch, below a first line that names the `settings` they hold for.

    A file of other settings, or none, begins anew; an incomplete last line is dropped. Numbers survive with all their
    bits, so that a resumed calibration gives the same plan. `path` None keeps nothing.
    """

    def __init__(self, path: Path | None, settings: str) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines[:1] == [json.dumps(settings)]:
            for line in lines[1:]:
                with suppress(json.JSONDecodeError):  # cut off while it was written
                    self.found |= json.loads(line)
        kept = [json.dumps(settings), *(json.dumps({key: value}) for key, value in self.found.items())]
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")

    def recall(self, key: str, candidates: Mapping[str, list[Candidate]]) -> bool:
        """Give candidates the sums they had after this batch; False where it was not measured yet."""
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
        """Keep the candidates' sums as they are after this batch."""
        if self.path is None:
            return
        sums = {
            name: [(c.error_sum.tolist(), c.damage_sum.tolist(), c.together_sum.tolist(), c.seen) for c in tried]
            for name, tried in candidates.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: sums}) + "\n")

    @contextmanager
    def removed_on_refusal(self) -> Iterator[None]:
        """Remove the file where the block is refused: only a run that was cut off has something to go on with."""
        try:
            yield
        except SbpatchError:
            self.close()
            raise

    def close(self) -> None:
        """Remove the file: the calibration is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
