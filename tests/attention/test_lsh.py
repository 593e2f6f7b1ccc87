"""Hashing: balanced buckets, and near pairs that meet more often than chance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbpatch.attention import Geometry
from sbpatch.attention.favor import Favor
from sbpatch.attention.lsh import Lsh

from .helpers import lsh_pairs, padding


@settings(max_examples=40)
@given(
    n=st.integers(1, 120),
    bucket=st.integers(1, 140),
    rounds=st.integers(1, 4),
    masked=st.booleans(),
    causal=st.booleans(),
)
def test_pairs_are_the_plain_definition(n: int, bucket: int, rounds: int, masked: bool, causal: bool) -> None:
    """The union over the rounds by loops over sorted tokens; the tiles hold every pair of it exactly once."""
    part = Lsh(Geometry(n, 2, 6, causal), 5, bucket, rounds)
    q, k = 2 * torch.randn(2, 2, n, 6), torch.randn(2, 2, n, 6)
    mask = padding(2, n, seed=n) if masked else None
    plain = lsh_pairs(part, q, k, mask)
    real = torch.ones(2, n, dtype=torch.bool) if mask is None else mask
    real = real[:, None, None, :].expand_as(plain)
    # where padding itself goes is no one's business: only pairs with real keys are compared
    assert torch.equal(part.dense(q, k, mask) & real, plain & real)

    counts = torch.zeros(2, 2, n, n, dtype=torch.long)
    for tiles in part.select(q, k, mask, 1.0):
        used = tiles.slot  # (B, H, n): the place that answers each query
        query = tiles.query.flatten(2).gather(-1, used)
        assert torch.equal(query, torch.arange(n).expand_as(query))
        group = used // part.bucket
        keys = tiles.key.gather(2, group[..., None].expand(-1, -1, -1, part.bucket))
        valid = (
            tiles.valid.expand(*tiles.query.shape, -1)
            .flatten(2, 3)
            .gather(2, used[..., None].expand(-1, -1, -1, part.bucket))
        )
        counts.scatter_add_(-1, keys, valid.long())
    assert torch.equal(counts * real, (plain & real).long())


@given(n=st.integers(1, 200), bucket=st.integers(1, 50), rounds=st.integers(1, 3))
def test_buckets_are_balanced(n: int, bucket: int, rounds: int) -> None:
    """Every round's clusters hold `bucket` queries and as many keys, the last one the rest."""
    part = Lsh(Geometry(n, 1, 4), 0, bucket, rounds)
    q, k = torch.randn(2, 1, n, 4), torch.randn(2, 1, n, 4)
    for order in part.order(q, k, None):
        bucket_of = part.buckets(order, n)
        for row in bucket_of.flatten(0, 2):
            sizes = torch.bincount(row)
            assert (sizes[:-1] == bucket).all()
            assert sizes[-1] == n - bucket * (len(sizes) - 1)
    per_row = part.dense(q, k, None).sum(-1)
    assert per_row.max() <= min(rounds * bucket, n)
    assert per_row.double().mean() <= part.nnz
    if rounds == 1 and n % bucket == 0:
        assert (per_row == part.nnz).all()


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_near_pairs_meet_more_often_than_chance(spread: float) -> None:
    """Each query has one planted key along it. Chance is bucket / n; queries and keys of unequal norms as well."""
    heads, n, bucket = 400, 64, 8
    part = Lsh(Geometry(n, heads, 8), 0, bucket, rounds=1)
    q = torch.randn(1, 1, n, 8)
    length = 1 + (spread - 1) * torch.rand(1, 1, n, 1)
    k = q / q.norm(dim=-1, keepdim=True) * 3 * length
    met = part.dense(q.expand(-1, heads, -1, -1), k.expand(-1, heads, -1, -1), None)[0].double()
    chance = bucket / n
    planted = met.diagonal(dim1=-2, dim2=-1).mean(-1)  # one number a projection, so they are independent
    assert (planted.mean() - chance) / (planted.std() / heads**0.5) > 6
    assert planted.mean() > 1.3 * chance
    opposite = met[:, (q[0, 0] @ k[0, 0].mT).argmin(-1).eq(torch.arange(n)[:, None]).T].mean()
    assert opposite < chance


def test_the_largest_logits_meet_most() -> None:
    """The lift makes distance order pairs by q.k, norms included: the collision rate rises with the logit."""
    heads, n = 400, 48
    part = Lsh(Geometry(n, heads, 8), 1, 6, rounds=1)
    q, k = torch.randn(1, 1, n, 8), torch.randn(1, 1, n, 8) * torch.rand(1, 1, n, 1) * 3
    rate = part.dense(q.expand(-1, heads, -1, -1), k.expand(-1, heads, -1, -1), None)[0].double().mean(0)
    order = (q[0, 0] @ k[0, 0].mT).flatten().argsort()
    rates = [x.mean().item() for x in rate.flatten()[order].chunk(4)]
    assert rates == sorted(rates)
    assert rates[-1] > 1.3 * rates[0]


def test_more_rounds_reach_more_pairs() -> None:
    q, k = torch.randn(1, 4, 90, 8), torch.randn(1, 4, 90, 8)
    found = [Lsh(Geometry(90, 4, 8), 0, 9, rounds).dense(q, k, None).sum().item() for rounds in (1, 2, 4)]
    assert found[0] < found[1] < found[2]


def test_padding_takes_no_place_among_real_keys() -> None:
    """Padding is sorted last: with 20 real keys and buckets of 10, two buckets hold them all, wherever they stand."""
    part = Lsh(Geometry(60, 1, 4), 0, 10, rounds=1)
    q, k = torch.randn(1, 1, 60, 4), torch.randn(1, 1, 60, 4)
    mask = torch.zeros(1, 60, dtype=torch.bool)
    mask[0, torch.randperm(60)[:20]] = True
    real = (part.dense(q, k, mask) & mask[:, None, None]).sum(-1)
    assert sorted(set(real.flatten().tolist())) == [0, 10]
    assert (real == 10).sum() == 20


@given(stored=st.floats(0, 300), n=st.integers(1, 300), low=st.booleans())
def test_sized_never_stores_more_than_asked(stored: float, n: int, low: bool) -> None:
    site = Geometry(n, 1, 4)
    part = Favor if low else Lsh
    parameters = part.sized(stored, site)
    assert (parameters is None) == (stored < (2 if low else 8))
    if parameters is not None:
        built = part(site, 0, **parameters)
        assert (built.stored if low else built.nnz) <= stored
