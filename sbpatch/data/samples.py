"""A set of samples, images or texts, and how some of them are chosen."""

from __future__ import annotations

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
