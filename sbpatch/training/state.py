"""How far a run has come, as a folder: a run that was cut off goes on from there with the same bits."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import SbpatchError, one_line
from ..writing import written_whole

EVERY = 60.0  # seconds between two writings


@dataclass
class Progressed:
    """What was done so far: the losses of its steps, and what each validation found; `best` is the lowest one's place."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    best: int = 0


class State:
    """The folder `path` (None: nothing is kept) with `state.pt` and the weights of the best validation.

    `settings` says what the run is; a folder of another run is refused when it is to be resumed. Of several processes one
    `writes`, and all read.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], writes: bool = True) -> None:
        self.path, self.settings, self.writes = path, settings, writes and path is not None
        self._written = time.monotonic()
        self._best: dict[str, Tensor] = {}

    def resume(self) -> dict[str, Any]:
        """What `save` wrote last: the progress, the trained weights and the optimiser's state.

        Raises:
            SbpatchError: there is nothing to go on with, it is damaged, or it belongs to another run.
        """
        if self.path is None or not (self.path / "state.pt").is_file():
            raise SbpatchError(f"nothing to resume at {self.path}: leave --resume out")
        try:
            found: dict[str, Any] = torch.load(self.path / "state.pt", map_location="cpu", weights_only=True)
            self._best = load_file(self.path / "best.safetensors")
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
            raise SbpatchError(
                f"{self.path} cannot be read ({one_line(error)}): remove it, and leave --resume out"
            ) from None
        before = json.loads(found["settings"])
        if other := [key for key in self.settings if before.get(key) != self.settings[key]]:
            raise SbpatchError(
                f"{self.path} is of a run with another {other[0]} ({before.get(other[0])}, now {self.settings[other[0]]}): "
                "give the same, or leave --resume out to begin anew"
            )
        return found

    def begin(self) -> None:
        """An empty folder in place of what an earlier run left."""
        if self.path is not None and self.writes:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir()

    def save(self, done: Progressed, weights: dict[str, Tensor], optimizer: Any, scaler: Any, now: bool) -> None:
        """Write where the run is, if `now` or if the last time is a minute ago."""
        if self.path is None or not self.writes or not (now or time.monotonic() - self._written > EVERY):
            return
        state = {"settings": json.dumps(self.settings), "progress": asdict(done), "weights": weights}
        with written_whole(self.path / "state.pt") as fresh:
            torch.save(state | {"optimizer": optimizer, "scaler": scaler}, fresh)
        self._written = time.monotonic()

    def keep_best(self, weights: Mapping[str, Tensor]) -> None:
        """Keep these weights, in the folder and in memory."""
        self._best = {name: w.detach().to("cpu", copy=True).contiguous() for name, w in weights.items()}
        if self.path is not None and self.writes:
            with written_whole(self.path / "best.safetensors") as fresh:
                save_file(self._best, fresh)

    @property
    def best(self) -> dict[str, Tensor]:
        return self._best

    def close(self) -> None:
        """Remove the folder: its run is done."""
        if self.path is not None and self.writes:
            shutil.rmtree(self.path)
