"""Landmarks with Nystrom weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sbpatch.attention import PARTS, Geometry, Scatterbrain
from sbpatch.attention.coreset import balanced
from sbpatch.errors import SbpatchError


@pytest.mark.parametrize("n", [1, 2, 30, 75])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sparse", ["", "window+", "top-clusters+"])
def test_coreset_agrees_with_its_dense_reference(
    sparse: str, padded: bool, n: int, agrees: Callable[..., Scatterbrain]
) -> None:
    extra = {"": {}, "window+": {"window": 5}, "top-clusters+": {"probes": 2}}[sparse]
    agrees(f"{sparse}coreset", n, padded=padded, rank=12, tolerance=1e-4, **extra)


def test_balanced_coordinates_keep_the_logits_and_share_a_covariance() -> None:
    q, k = torch.randn(2, 1, 2, 200, 8).double() * torch.logspace(-1, 1, 8).double()
    k = k.flip(-1) - k.flip(-1).mean(-2, keepdim=True)
    y, x = balanced(q, k)
    torch.testing.assert_close(y @ x.mT, q @ k.mT)
    c_y, c_x = y.mT @ y / 200, x.mT @ x / 200
    torch.testing.assert_close(c_y, c_x)
    torch.testing.assert_close(c_y, torch.diag_embed(c_y.diagonal(dim1=-2, dim2=-1)), atol=1e-9, rtol=0)


def test_few_landmarks_reproduce_flat_attention() -> None:
    """Smooth logits, as in a token stage: a tenth of the keys as landmarks is far better than as cluster means."""
    q, k, v = torch.randn(3, 2, 1, 240, 4)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def error(method: str, rank: int) -> float:
        out = Scatterbrain(method, Geometry(240, 1, 4), 0, rank=rank)(q, k, v)
        return float((out - exact).norm() / exact.norm())

    assert error("coreset", 24) < 0.6 * error("clusters", 24)
    assert error("coreset", 48) < 0.5 * error("clusters", 48)


def test_as_many_landmarks_as_keys_are_exact_up_to_the_jitter() -> None:
    q, k, v = torch.randn(3, 1, 1, 20, 8)
    layer = Scatterbrain("coreset", Geometry(20, 1, 8), 0, rank=20)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert (layer(q, k, v) - exact).norm() < 0.05 * exact.norm()  # three quarters of them are centres, not keys


def test_it_is_invariant_to_a_common_key_and_to_the_scale_between_q_and_k() -> None:
    q, k, v = torch.randn(3, 1, 1, 60, 8)
    layer = Scatterbrain("coreset", Geometry(60, 1, 8), 0, rank=10)
    base = layer(q, k, v)
    torch.testing.assert_close(layer(q, k + 3 * torch.randn(8), v), base, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(layer(q * 4, k / 4, v), base, atol=2e-3, rtol=2e-3)


def test_single_keys_far_out_spoil_nothing() -> None:
    """A few long keys, each alone: the plain Nystrom rows blow up here, by their weight exp(|x|^2 / 2)."""
    worst = 0.0
    for _ in range(8):
        q, k, v = torch.randn(3, 1, 1, 240, 8)
        k[:, :, ::60] *= 6
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        out = Scatterbrain("coreset", Geometry(240, 1, 8), 0, rank=32)(q, k, v)
        worst = max(worst, float((out - exact).norm() / exact.norm()))
    assert worst < 0.5


def test_large_logits_stay_finite() -> None:
    q, k, v = torch.randn(3, 1, 1, 60, 8)
    out = Scatterbrain("coreset", Geometry(60, 1, 8), 0, rank=10)(60 * q, 60 * k, v)
    assert out.isfinite().all()
    same = torch.ones(1, 1, 60, 8)  # no spread at all: every key is the mean key
    torch.testing.assert_close(
        Scatterbrain("coreset", Geometry(60, 1, 8), 0, rank=10)(q, same, v),
        v.mean(-2, keepdim=True).expand_as(v), atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_what_it_refuses() -> None:
    with pytest.raises(SbpatchError, match="cannot be causal"):
        Scatterbrain("coreset", Geometry(64, 1, 8, causal=True), 0, rank=4)
    with pytest.raises(SbpatchError, match="rank of at least 1"):
        Scatterbrain("coreset", Geometry(64, 1, 8), 0, rank=0)
    assert PARTS["coreset"].sized(1.9, Geometry(64, 1, 8)) is None
    assert PARTS["coreset"].sized(12.5, Geometry(64, 1, 8)) == {"rank": 11}
