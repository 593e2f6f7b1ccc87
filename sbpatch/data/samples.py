"""A set of samples, images or texts, and how some of them are chosen."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Samples(Protocol):
    """`samples[i]` is what one sample puts into a model, without the batch's axis, and its labels (-1: none)."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...

    def fingerprint(self) -> str: ...


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
