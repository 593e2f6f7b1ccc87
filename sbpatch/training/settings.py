"""What a run of fine-tuning is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from ..errors import SbpatchError


class Train(StrEnum):
    """Which weights are trained."""

    all = "all"
    norms = "norms"
    attention = "attention"  # the patched sites' own projections, and all norms
    lora = "lora"  # low-rank changes of the linear layers beside and in the patched sites (arXiv 2106.09685)


# Step sizes of AdamW where none is given: the fewer weights are trained, the further each may go.
LEARNING_RATES: Mapping[Train, float] = {Train.all: 5e-5, Train.attention: 1e-4, Train.norms: 1e-3, Train.lora: 5e-4}


@dataclass(frozen=True)
class Settings:
    """A run: `epochs` over the samples, or that many `steps`, each on `batch_size` samples of all processes together.

    `accumulate`: pieces that a batch is computed in, one after another; the step is the same but for rounding.
    `checkpointing`: activations of a block are computed again in the backward pass instead of being kept.
    """

    epochs: int = 1
    steps: int | None = None  # in place of epochs
    lr: float | None = None
    batch_size: int = 8
    accumulate: int = 1
    train: Train = Train.all
    lora_rank: int = 8
    distill: bool = False
    checkpointing: bool = False
    dtype: str = "float32"  # of activations; weights and their updates are float32
    seed: int = 0

    @property
    def step_size(self) -> float:
        return LEARNING_RATES[self.train] if self.lr is None else self.lr

    def total(self, per_epoch: int) -> int:
        return self.steps or self.epochs * per_epoch

    def pieces(self, samples: int, processes: int) -> int:
        """How many pieces a batch is cut into.

        Raises:
            SbpatchError: the batch cannot be cut evenly, or there are too few samples for one.
        """
        pieces = self.accumulate * processes
        if self.batch_size % pieces:
            raise SbpatchError(
                f"a batch of {self.batch_size} cannot be cut into {self.accumulate} pieces on each of {processes} processes: "
                f"give a --batch-size that is a multiple of {pieces}"
            )
        if samples < self.batch_size:
            raise SbpatchError(
                f"{samples} samples to train on, fewer than a batch of {self.batch_size}: give a smaller --batch-size"
            )
        return pieces
