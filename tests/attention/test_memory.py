"""No n x n tensor is ever made: measured as the allocator's own events, at a length where one would stand out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sbpatch.attention import Geometry, Scatterbrain

N, D = 16_384, 64
ENTRIES = N * N  # 268 million: 268 MB as booleans, 1 GB as float32

METHODS: dict[str, dict[str, int]] = {
    "window": {"window": 96},
    "window2d": {"window": 9},
    "lsh": {"bucket": 48, "rounds": 2},
    "favor": {"rank": 48},
    "clusters": {"rank": 96},
    "window+favor": {"window": 64, "rank": 16},
    "window+clusters": {"window": 64, "rank": 32},
    "window2d+clusters": {"window": 7, "rank": 48},
    "lsh+favor": {"bucket": 32, "rounds": 2, "rank": 16},
    "lsh+clusters": {"bucket": 32, "rounds": 2, "rank": 32},
}
CAUSAL = ["window", "lsh", "favor", "window+favor", "lsh+favor"]


def allocations(work: Callable[[], object]) -> tuple[int, int]:
    """(peak of what `work` holds at once, largest single block), in bytes, over every call of the CPU allocator.

    Not the process's size: that would miss what fits into memory already held. Not the outputs of operators either:
    that would miss what a kernel holds while it runs.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "this PyTorch reports no memory events"
    held = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak, largest = max(peak, held), max(largest, event.nbytes())
    return peak, largest


def measured(method: str, n: int, causal: bool, backward: bool = False) -> tuple[int, int]:
    side = int(n**0.5)
    layer = Scatterbrain(method, Geometry(n, 1, D, causal, (side, n // side)), 0, **METHODS[method])
    q, k, v = (torch.randn(1, 1, n, D, requires_grad=backward) for _ in range(3))

    def work() -> None:
        out = layer(q, k, v)
        if backward:
            out.square().sum().backward()

    with torch.set_grad_enabled(backward):
        return allocations(work)


def test_the_helper_sees_an_n_by_n_tensor() -> None:
    n = 2048
    q, k, v = (torch.randn(1, 1, n, D) for _ in range(3))
    peak, largest = allocations(lambda: (q @ k.mT).softmax(-1) @ v)
    assert largest == 4 * n * n
    assert peak >= 8 * n * n  # the logits and their softmax
    fused, _ = allocations(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert fused < n * n
    short, _ = allocations(lambda: torch.empty(n, n, dtype=torch.bool).sum())  # freed at once: still seen
    assert short >= n * n


@pytest.mark.parametrize(("method", "causal"), [(m, False) for m in METHODS] + [(m, True) for m in CAUSAL])
def test_no_n_by_n_tensor_is_made(method: str, causal: bool) -> None:
    """About a hundred stored entries a row, and d = 64: the largest block and all that is held stay linear in n.

    The largest block is what a tile reads: a query's share of the keys gathered for it, at most 6 d floats in the grid
    window (484 keys for 64 queries) and less elsewhere: N * 6 d * 4 bytes = 25 MB. Even as single bits n x n is 34 MB.
    """
    peak, largest = measured(method, N, causal)
    assert largest < ENTRIES / 8, f"{largest / 1e6:.0f} MB in one block"
    assert peak < ENTRIES / 2, f"{peak / 1e6:.0f} MB at once"


@pytest.mark.parametrize(("method", "causal"), [("window+favor", True), ("lsh+clusters", False)])
def test_memory_grows_with_n_and_not_with_its_square(method: str, causal: bool) -> None:
    (short, _), (long, _) = (measured(method, n, causal) for n in (4096, 16_384))
    assert long < 4.6 * short


@pytest.mark.parametrize("method", ["window+favor", "lsh+clusters"])
def test_nor_is_one_made_for_gradients(method: str) -> None:
    peak, largest = measured(method, N, causal=False, backward=True)
    assert largest < ENTRIES / 4
    assert peak < 2 * ENTRIES  # a fraction of the four bytes that one n x n float32 would take, with all that is kept
