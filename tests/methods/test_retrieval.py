"""Supports that depend on the content: Reformer's hashing, and the oracle of the largest keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sbpatch.attention import PARTS, Geometry, Scatterbrain
from sbpatch.attention.topk import TopK
from sbpatch.errors import SbpatchError

PARAMETERS = {"reformer": {"bucket": 5, "rounds": 3}, "topk": {"keys": 6}}


@pytest.mark.parametrize("n", [1, 4, 9, 33, 72])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("low_rank", ["", "+favor"])
@pytest.mark.parametrize("method", PARAMETERS)
def test_supports_agree_with_their_dense_references(
    method: str, low_rank: str, causal: bool, n: int, agrees: Callable[..., Scatterbrain]
) -> None:
    rank = {"rank": 8} if low_rank else {}
    for padded in (False, True):
        if not (method == "reformer" and padded and n == 1):
            agrees(method + low_rank, n, causal=causal, padded=padded, **PARAMETERS[method], **rank)


def test_reformer_follows_its_seed() -> None:
    q, k = torch.randn(2, 1, 2, 64, 8)
    pairs = [PARTS["reformer"](Geometry(64, 2, 8), seed, bucket=4).dense(q, k, None) for seed in (0, 0, 1)]
    assert torch.equal(pairs[0], pairs[1])
    assert not torch.equal(pairs[0], pairs[2])


def test_reformer_brings_equal_directions_together() -> None:
    """Where q = k, as Reformer trains, a query meets itself in every round, and its like far more often than chance."""
    centre = torch.randn(8, 16)
    label = torch.randperm(128) % 8
    x = (centre[label] + 0.05 * torch.randn(128, 16))[None, None]
    layer = PARTS["reformer"](Geometry(128, 1, 16), 0, bucket=16, rounds=1)
    pairs = layer.dense(x, x, None)[0, 0]
    assert pairs.diagonal().all()
    assert pairs.sum(-1).eq(32).all()
    alike = label[:, None] == label
    assert pairs[alike].float().mean() > 0.6  # a chance of a quarter
    assert pairs[~alike].float().mean() < 0.22


def test_reformer_reads_at_most_what_it_counts(counts: Callable[[Scatterbrain], float]) -> None:
    one, two = (Scatterbrain("reformer", Geometry(96, 2, 8), 0, bucket=8, rounds=r) for r in (1, 2))
    assert counts(one) == one.nnz == 16
    assert 16 < counts(two) <= two.nnz == 32
    assert PARTS["reformer"].sized(7, one.site) is None
    assert Scatterbrain("reformer", one.site, 0, **PARTS["reformer"].sized(25, one.site)).nnz == 24


def test_topk_is_the_best_support_of_its_size() -> None:
    q, k = torch.randn(2, 2, 2, 60, 8)
    exact = (q @ k.mT).softmax(-1)
    layer = Scatterbrain("topk", Geometry(60, 2, 8), 0, keys=7)
    pairs = layer.support.dense(q, k, None)
    assert pairs.sum(-1).eq(7).all()
    assert (exact.masked_fill(~pairs, 1).amin(-1) >= exact.masked_fill(pairs, 0).amax(-1)).all()
    assert TopK.analysis_only


@pytest.mark.parametrize("causal", [False, True])
def test_nnz_of_topk(causal: bool, counts: Callable[[Scatterbrain], float]) -> None:
    for keys in (1, 9, 200):
        layer = Scatterbrain("topk", Geometry(50, 2, 8, causal), 0, keys=keys)
        assert layer.nnz == pytest.approx(counts(layer))


def test_empty_ones_are_refused() -> None:
    site = Geometry(50, 2, 8)
    with pytest.raises(SbpatchError, match="at least one"):
        Scatterbrain("topk", site, 0, keys=0)
    with pytest.raises(SbpatchError, match="at least one round"):
        Scatterbrain("reformer", site, 0, bucket=4, rounds=0)
