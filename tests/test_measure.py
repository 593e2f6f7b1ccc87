"""Time and memory of known pieces of work."""

from __future__ import annotations

import time

import pytest
import torch

from sbpatch.measure import elapsed_ms, peak_memory_bytes

CPU = torch.device("cpu")
MEGABYTE = 2**20
devices = pytest.mark.parametrize(
    "device",
    [
        CPU,
        pytest.param(
            torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
        ),
    ],
    ids=str,
)


def megabytes(count: int, device: torch.device) -> torch.Tensor:
    return torch.empty(count * MEGABYTE // 4, device=device)


@devices
@pytest.mark.parametrize("size", [1, 8, 64])
def test_peak_of_one_allocation(device, size):
    found = peak_memory_bytes(lambda: megabytes(size, device), device)
    assert found == pytest.approx(size * MEGABYTE, rel=0.001)


@devices
def test_peak_sees_what_is_freed_before_the_end(device):
    def work() -> torch.Tensor:
        megabytes(40, device)
        return megabytes(3, device)

    assert peak_memory_bytes(work, device) == pytest.approx(40 * MEGABYTE, rel=0.001)


@devices
def test_peak_adds_what_is_alive_at_once(device):
    def work() -> torch.Tensor:
        a = megabytes(10, device)
        b = megabytes(20, device)
        del a
        c = megabytes(5, device)  # 25 now, 30 before
        return b[:1] + c[:1]

    assert peak_memory_bytes(work, device) == pytest.approx(30 * MEGABYTE, rel=0.001)


@devices
def test_peak_does_not_count_what_was_there_before(device):
    before = megabytes(50, device)
    assert peak_memory_bytes(lambda: before.add_(1), device) < MEGABYTE
    assert peak_memory_bytes(lambda: None, device) == 0


@devices
def test_peak_of_eager_attention_holds_its_matrix(device):
    q = torch.randn(1, 2, 512, 16, device=device)
    matrix = 2 * 512 * 512 * 4
    eager = peak_memory_bytes(lambda: (q @ q.mT).softmax(-1) @ q, device)
    assert 2 * matrix <= eager < 2.2 * matrix  # logits and weights, both alive in softmax
    fused = peak_memory_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), device)
    assert fused < matrix


def test_elapsed_time_is_in_milliseconds():
    result, ms = elapsed_ms(lambda: time.sleep(0.05) or "done", CPU)
    assert result == "done"
    assert 50 <= ms < 1000
