"""Time and peak memory of a piece of work, the same way for every variant."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def elapsed_ms(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Result and wall time of `work()` in milliseconds; on CUDA the device has finished on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, 1e3 * (time.perf_counter() - start)


def without_launches(work: Callable[[], Any], device: torch.device, pool: Any = None) -> Callable[[], Any]:
    """On CUDA a replay of `work` as a captured graph: what the device computes, without Python and the launches of kernels.

    On a CPU, and where `work` waits for the device, which no graph can, `work` itself. Graphs of one `pool` of memory leave
    nothing in it for each other.
    """
    if device.type != "cuda" or _waits(work, device):
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph.replay


def _waits(work: Callable[[], Any], device: torch.device) -> bool:
    """Whether `work` synchronises with a CUDA device. A capture that fails would leave the device's generators unusable."""
    work()  # what is set up at a first call may wait
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


@contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """The profiler's native library reports its own start, its stop and each missing GPU on standard error."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_memory_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that PyTorch's allocator holds at once for `work()`, above what it held before.

    CUDA: the allocator's statistics. CPU: the running sum of the allocation and release events of the profiler, which
    sees each tensor and each kernel workspace that PyTorch allocates, and no weights loaded before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _native_stderr_closed(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        work()
    held = peak = 0
    kineto = profile.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda c: c[0]):
        held += change
        peak = max(peak, held)
    return peak


def device_name(device: str) -> str:
    """A device as figures state it: the GPU's name, or the CPU with its threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
