"""Samples to train on and samples to choose the best state by, both of a source's training part, none in both."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.samples import Samples
from ..errors import SbpatchError


class Part:
    """The samples of `whole` at `indices`, in that order."""

    def __init__(self, whole: Samples, indices: Sequence[int]) -> None:
        self.name, self.whole, self.indices = whole.name, whole, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.whole[self.indices[index]]

    def fingerprint(self) -> str:
        """SHA-256 over the whole's fingerprint and the indices."""
        return hashlib.sha256(f"{self.whole.fingerprint()} {self.indices}".encode()).hexdigest()


def divided(whole: Samples, validation: int, seed: int) -> tuple[Part, Part]:
    """Training samples, and `validation` others drawn by the seed.

    Raises:
        SbpatchError: there are not more samples than that.
    """
    if len(whole) <= validation:
        raise SbpatchError(
            f"{whole.name} has {len(whole)} samples to train on, of which {validation} are to be set aside: "
            "give a smaller --validation"
        )
    order = np.random.default_rng([seed, len(whole)]).permutation(len(whole)).tolist()
    return Part(whole, sorted(order[validation:])), Part(whole, sorted(order[:validation]))
