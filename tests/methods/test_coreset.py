"""Landmarks with Nystrom weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sbpatch.attention import PARTS, Geometry, Scatterbrain, kmeans, pairwise
from sbpatch.attention.coreset import JITTER, balanced, newton_inverse
from sbpatch.errors import SbpatchError


def moments(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments (H, d, d) of queries and of centred keys (B, H, n, d), float64."""
    k = k - k.mean(-2, keepdim=True)
    query, key = ((x.mT @ x / x.shape[-2]).double().mean(0) for x in (q, k))
    return query, key


@pytest.mark.parametrize("n", [1, 2, 30, 75])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sparse", ["", "window+", "top-clusters+"])
def test_coreset_agrees_with_its_dense_reference(
    sparse: str, padded: bool, n: int, agrees: Callable[..., Scatterbrain]
) -> None:
    extra = {"": {}, "window+": {"window": 5}, "top-clusters+": {"probes": 2}}[sparse]
    agrees(f"{sparse}coreset", n, padded=padded, rank=12, tolerance=1e-4, **extra)


def test_balanced_coordinates_keep_the_logits_and_share_a_covariance() -> None:
    q, k = torch.randn(2, 1, 2, 200, 8) * torch.logspace(-1, 1, 8)
    k = k.flip(-1) - k.flip(-1).mean(-2, keepdim=True)
    to_query, to_key = balanced(*moments(q, k))
    y, x = q @ to_query, k @ to_key
    torch.testing.assert_close(y @ x.mT, q @ k.mT, atol=1e-4, rtol=1e-4)
    c_y, c_x = y.mT @ y / 200, x.mT @ x / 200
    torch.testing.assert_close(c_y, c_x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(c_y, torch.diag_embed(c_y.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)


def test_directions_that_hardly_move_a_logit_are_left_out() -> None:
    """Keys of 24 directions, of which 3 matter to the queries: 8 are kept, and no logit moves by more than the bound says."""
    q, k = torch.randn(2, 1, 1, 400, 24)
    q[..., 3:] *= 1e-4
    to_query, to_key = balanced(*moments(q, k))
    assert to_query.shape == to_key.shape == (1, 24, 8)
    k = k - k.mean(-2, keepdim=True)
    left_out = q @ k.mT - (q @ to_query) @ (k @ to_key).mT
    assert left_out.square().mean().sqrt() < 0.01
    assert balanced(*moments(q, k), 2)[0].shape == (1, 24, 2)  # as many as asked for
    assert balanced(*moments(torch.randn(1, 1, 400, 24), k))[0].shape == (1, 24, 24)


@pytest.mark.parametrize("padded", [False, True])
def test_the_clusters_that_rows_are_checked_against_never_exceed_the_exact_sum(
    padded: bool, mask: Callable[..., Tensor]
) -> None:
    """Jensen: the mean of exp(q.k) over a landmark's keys is at least exp(q.l) for their mean l. Peaked rows included."""
    q, k = torch.randn(2, 2, 3, 90, 8)
    key_mask = mask(90) if padded else None
    layer = Scatterbrain("coreset", Geometry(90, 3, 8), 0, rank=14).low_rank
    at = layer._landmarks(k, key_mask)
    real = torch.ones(2, 1, 90) if key_mask is None else key_mask[:, None].float()
    mean = (k * real[..., None]).sum(-2, keepdim=True) / real[..., None].sum(-2, keepdim=True)
    cluster = (at.queries(q) @ at.landmark.mT).exp() @ kmeans.counts(at.own, 14, real)
    exact = ((q @ k.mT - q @ mean.mT).exp() * real[:, :, None, :]).sum(-1, keepdim=True)
    assert bool((cluster <= exact * (1 + 1e-4)).all())
    assert float((cluster / exact).median()) > 0.2  # a bound that says something


def test_the_inverse_by_products_is_the_inverse() -> None:
    x = torch.randn(3, 40, 4).double()
    gram = (-torch.cdist(x, x).square() / 2).exp()
    gram[0, :5] = gram[0, 5]  # landmarks that coincide, as far as the jitter lets them
    gram[0, :, :5] = gram[0, :, 5:6]
    gram = gram + JITTER * torch.eye(40)
    torch.testing.assert_close(newton_inverse(gram) @ gram, torch.eye(40).double().expand(3, -1, -1), atol=1e-5, rtol=0)


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


def test_it_is_invariant_to_a_common_key_and_fitted_to_the_scale_between_q_and_k() -> None:
    q, k, v = torch.randn(3, 1, 1, 60, 8)

    def out(q: Tensor, k: Tensor) -> Tensor:
        layer = Scatterbrain("coreset", Geometry(60, 1, 8), 0, rank=10)
        assert layer.low_rank.fit(*(x * 8**-0.5 for x in moments(q, k))) == {"directions": 8}
        return layer(q, k, v)

    base = out(q, k)
    torch.testing.assert_close(out(q, k + 3 * torch.randn(8)), base, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(out(q * 4, k / 4), base, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_way_is_the_composed_one(padded: bool, mask: Callable[..., Tensor]) -> None:
    """Landmarks in float32 against the sums that a sparse part would be joined to, in float64; grouped heads included."""
    q, (k, v) = torch.randn(2, 4, 70, 8), torch.randn(2, 2, 2, 70, 8)
    key_mask = mask(70) if padded else None
    layer = Scatterbrain("coreset", Geometry(70, 4, 8), 0, rank=12, directions=5)
    _, low = layer.split(q, k, v, key_mask, 0.5)
    torch.testing.assert_close(
        layer(q, k, v, key_mask, 0.5), pairwise.merged(None, low, None).float(), atol=1e-4, rtol=1e-4
    )


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
    with pytest.raises(SbpatchError, match="to 8 directions, not 9"):
        Scatterbrain("coreset", Geometry(64, 1, 8), 0, rank=4, directions=9)
    with pytest.raises(SbpatchError, match="rank of at least 1"):
        Scatterbrain("coreset", Geometry(64, 1, 8), 0, rank=0)
    assert PARTS["coreset"].sized(1.9, Geometry(64, 1, 8)) is None
    assert PARTS["coreset"].sized(12.5, Geometry(64, 1, 8)) == {"rank": 11}
