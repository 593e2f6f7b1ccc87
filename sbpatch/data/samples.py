"""A set of samples, images or texts, and how it is cut into batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from torch import Tensor
from torch.utils.data import default_collate

from .batch import Inputs

T = TypeVar("T")


class Samples(Protocol):
    """`samples[i]` is what one sample puts into a model, without the batch's axis, and its labels (-1: none)."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...

    def fingerprint(self) -> str: ...


def batches(samples: Samples, batch_size: int) -> Iterator[tuple[Inputs, Tensor]]:
    """All samples in order: images (B, 3, H, W) float32 with labels (B,) int64, or tokens (see texts.py).

    The last batch may be smaller. A batch is made by several threads, but only when it is asked for, so that nothing
    runs beside a timed model.
    """
    with pool() as workers:
        for start in range(0, len(samples), batch_size):
            stop = min(start + batch_size, len(samples))
            inputs, labels = default_collate(list(workers.map(samples.__getitem__, range(start, stop))))
            yield inputs, labels


def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))


def strided(items: Sequence[T], count: int) -> Sequence[T]:
    """At most `count` of the items, spread evenly: sets are often sorted by class."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


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
