"""KDEformer: HyperAttention's blocks, and a sample that goes by the values."""

from __future__ import annotations

import torch
from tiny import exact_attention
from torch import Tensor

from sbpatch.attention import Geometry, Scatterbrain


def uneven(n: int, heads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """One value in 16 is thirty times as long as the others."""
    q, k, v = 0.5 * torch.randn(3, 1, heads, n, 8)
    long = torch.rand(1, heads, n, 1) < 1 / 16
    return q, k, torch.where(long, 30 * v.abs(), v)


def build(method: str, n: int, seed: int = 0, heads: int = 1, bucket: int = 8, rank: int = 16) -> Scatterbrain:
    return Scatterbrain(method, Geometry(n, heads, 8), seed, bucket=bucket, rank=rank)


def test_it_is_exact_where_one_block_holds_all_keys() -> None:
    q, k, v = torch.randn(3, 1, 2, 24, 8)
    layer = build("kdeformer", 24, heads=2, bucket=24)
    torch.testing.assert_close(layer(q, k, v, None, 1.0), exact_attention(q, k, v), atol=1e-5, rtol=1e-5)


def test_sums_of_entries_and_of_values_are_unbiased() -> None:
    """Over draws, what the sample stands for beside the blocks is what is there: numerator and denominator."""
    q, k, v = uneven(64)
    weights = (q @ k.mT).exp()
    exact = torch.cat((weights @ v, weights.sum(-1, keepdim=True)), -1)
    found = torch.zeros_like(exact)
    part = build("kdeformer", 64).low_rank
    seeds = 600
    for seed in range(seeds):
        part.draws = torch.rand(1, 16, generator=torch.Generator().manual_seed(seed))  # the same blocks each time
        _, keys, entries, places = part.logits(q, k, None, 1.0, v)
        rows = entries.exp()
        values = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        values = values.gather(2, keys.flatten(2)[..., None].expand(-1, -1, -1, 9)).unflatten(2, keys.shape[2:])
        sums = (rows @ values).flatten(2, 3)
        found += sums.gather(2, places[..., None].expand(*places.shape, 9)) / seeds
    assert (found - exact).norm() < 0.03 * exact.norm()


def test_long_values_are_sampled_more_often_and_count_less() -> None:
    _, _, v = uneven(64)
    part = build("kdeformer", 64, rank=4000).low_rank
    drawn, times = part.sample(torch.full((1, 1, 1), 64), v)
    counts = torch.bincount(drawn.flatten(), minlength=64).double()
    rows = torch.cat((v[0, 0], torch.ones(64, 1)), -1).double()
    share = rows.norm(dim=-1) / torch.linalg.matrix_norm(rows, 2) + 1 / 64
    share = share / share.sum()
    assert (counts / 4000 - share).abs().max() < 0.01
    torch.testing.assert_close(times[0, 0] * share[drawn[0, 0]] * 4000, torch.ones(4000, dtype=torch.double))


def test_values_of_different_lengths_are_where_it_pays() -> None:
    """Against HyperAttention's uniform sample of the same size and the same blocks."""
    q, k, v = uneven(256, heads=8)
    exact = exact_attention(q, k, v)
    errors = {
        method: sum(
            float((build(method, 256, seed, heads=8, rank=32)(q, k, v, None, 1.0) - exact).norm()) for seed in range(6)
        )
        for method in ("kdeformer", "hyperattention")
    }
    assert errors["kdeformer"] < 0.75 * errors["hyperattention"]


def test_with_values_of_one_length_the_sample_is_uniform() -> None:
    _, _, v = uneven(64)
    same = torch.nn.functional.normalize(v, dim=-1)
    _, times = build("kdeformer", 64).low_rank.sample(torch.full((1, 1, 1), 64), same)
    torch.testing.assert_close(times, torch.full_like(times, 64 / 16))
