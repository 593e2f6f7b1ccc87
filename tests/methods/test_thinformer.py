"""Thinformer: weights that add up, unbiased sums, an error that falls faster than a uniform sample's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import exact_attention
from torch import Tensor

from sbpatch.attention import Geometry, Scatterbrain


def bounded(n: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys in a cube, values that vary smoothly with their keys."""
    q, k = 2 * torch.rand(2, 1, heads, n, 3) - 1
    return q, k, 1 + k.sum(-1, keepdim=True).sin()


@settings(max_examples=20)
@given(n=st.integers(1, 90), rank=st.integers(1, 90), padded=st.booleans(), seed=st.integers(0, 5))
def test_it_keeps_as_many_keys_as_asked_for_each_once_and_no_padding(
    n: int, rank: int, padded: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    k, v = torch.randn(2, 2, n, 4), torch.randn(2, 2, n, 3)
    mask = torch.rand(2, n) > 0.4 if padded else torch.ones(2, n, dtype=torch.bool)
    mask[:, 0] = True
    layer = Scatterbrain("thinformer", Geometry(n, 2, 4, value_dim=3), seed, rank=rank)
    index, weight = layer.low_rank.thinned(k, v, mask, 1.0)
    assert index.shape[-1] == min(rank, n)
    for b in range(2):
        for h in range(2):
            kept = index[b, h][weight[b, h] > 0]
            assert len(kept) > 0
            assert len(kept.unique()) == len(kept)
            assert mask[b, kept].all()
    if rank >= n:
        assert torch.equal(weight.sum(-1), mask.sum(-1, keepdim=True).expand(2, 2).to(weight))


@pytest.mark.parametrize("n", [64, 256, 1024])
@pytest.mark.parametrize("rank", [16, 20, 31])
def test_weights_add_up_to_the_number_of_keys(n: int, rank: int) -> None:
    """Halving keeps one of each two, counted twice; the last round halves as many as are too many."""
    _, k, v = bounded(n, 2)
    layer = Scatterbrain("thinformer", Geometry(n, 2, 3, value_dim=1), 0, rank=rank)
    _, weight = layer.low_rank.thinned(k, v, None, 1.0)
    assert (weight.sum(-1) == n).all()
    assert len(weight.unique()) <= 2


def test_it_is_exact_where_all_keys_are_kept_and_where_they_repeat() -> None:
    q, k, v = torch.randn(3, 1, 2, 24, 8)
    layer = Scatterbrain("thinformer", Geometry(24, 2, 8), 0, rank=24)
    torch.testing.assert_close(layer(q, k, v, None, 1.0), exact_attention(q, k, v), atol=1e-5, rtol=1e-5)
    q, (k, v) = torch.randn(1, 2, 24, 8), (x.repeat_interleave(32, 2) for x in torch.randn(2, 1, 2, 2, 8))
    layer = Scatterbrain("thinformer", Geometry(64, 2, 8, queries=24), 0, rank=32)  # alike ones are halved side by side
    torch.testing.assert_close(layer(q, k, v, None, 1.0), exact_attention(q, k, v), atol=1e-5, rtol=1e-5)


def test_sums_over_the_kept_keys_are_unbiased() -> None:
    """Over seeds, numerator and denominator have the exact means: the walk's first signs are fair, and so all are."""
    q, k, v = bounded(64, 1)
    exact = (q @ k.mT).exp() @ torch.cat((v, torch.ones_like(v)), -1)
    found = torch.zeros_like(exact)
    seeds = 200
    for seed in range(seeds):
        layer = Scatterbrain("thinformer", Geometry(64, 1, 3, value_dim=1), seed, rank=8)
        index, weight = layer.low_rank.thinned(k, v, None, 1.0)
        key, value = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
        entries = (q @ key.mT).exp() * weight[..., None, :].float()
        found += entries @ torch.cat((value, torch.ones_like(value)), -1) / seeds
    assert (found - exact).norm() < 0.03 * exact.norm()


def test_its_error_is_below_that_of_a_uniform_sample_and_falls_faster() -> None:
    """The paper's 1 / m against 1 / sqrt(m), where the kernel is close to one of low rank."""
    q, k, v = bounded(1024, 8)
    exact = exact_attention(q, k, v)

    def errors(method: str, parameter: str) -> list[float]:
        site = Geometry(1024, 8, 3, value_dim=1)
        layers = (Scatterbrain(method, site, 0, **{parameter: m}) for m in (16, 64, 256))
        return [float((layer(q, k, v, None, 1.0) - exact).norm() / exact.norm()) for layer in layers]

    thinned, uniform = errors("thinformer", "rank"), errors("random", "keys")
    assert thinned[1] < 0.8 * uniform[1]
    assert thinned[2] < 0.6 * uniform[2]
    assert thinned[0] / thinned[2] > 1.3 * uniform[0] / uniform[2]


def test_its_matrix_is_that_of_values_all_alike() -> None:
    q, k = torch.randn(2, 1, 2, 40, 8)
    layer = Scatterbrain("thinformer", Geometry(40, 2, 8), 0, rank=9)
    matrix = layer.low_rank.dense(q, k, None)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(1, 2, 40, dtype=torch.double))
    assert ((matrix > 0).sum(-1) == 9).all()
