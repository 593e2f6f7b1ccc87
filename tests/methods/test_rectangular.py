"""Queries and keys of different numbers: every method that goes by content alone, against its dense reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import exact_attention, refused

from sbpatch.attention import PARTS, Geometry, Scatterbrain
from sbpatch.attention.per_head import Exact, PerHead
from sbpatch.attention.reference import exact_matrix, scatterbrain_matrix
from sbpatch.attention.registry import fits

SIZES: dict[str, dict[str, int]] = {
    "clusters": {"rank": 5},
    "coreset": {"rank": 6},
    "favor": {"rank": 6},
    "favor-cosh": {"rank": 6},
    "favor-iid": {"rank": 6},
    "favor-iid-cosh": {"rank": 6},
    "hyperattention": {"bucket": 5, "rank": 4},
    "kdeformer": {"bucket": 5, "rank": 4},
    "leverage": {"keys": 5},
    "linear": {},
    "lsh": {"bucket": 5, "rounds": 2},
    "nystromformer": {"rank": 4},
    "pooling": {"rank": 5},
    "random": {"keys": 4},
    "reformer": {"bucket": 5, "rounds": 2},
    "strided": {"keys": 5},
    "thinformer": {"rank": 6},
    "top-clusters": {"probes": 2, "group": 4},
    "topk": {"keys": 6},
    "wildcat": {"rank": 6},
}
BY_VALUES = {"kdeformer", "thinformer"}  # what they read depends on the values: their own tests have it
JOINED = ("lsh+clusters", "top-clusters+coreset", "leverage+favor", "topk+pooling", "naive:lsh+favor")
POSITIONS = sorted({name for name, part in PARTS.items() if not part.rectangular})


def sizes(method: str) -> dict[str, int]:
    parts = method.removeprefix("naive:").split("+")
    return {name: value for part in parts for name, value in SIZES[part].items()}


def test_every_part_says_whether_it_takes_them() -> None:
    assert sorted(SIZES) == sorted(name for name, part in PARTS.items() if part.rectangular)
    for name in ("window", "window2d", "local", "sinks", "bigbird", "longformer", "blocks", "pages", "top-blocks"):
        assert name in POSITIONS


@settings(max_examples=8)
@given(rows=st.integers(1, 50), keys=st.integers(1, 50), padded=st.booleans(), seed=st.integers(0, 9))
@pytest.mark.parametrize("method", sorted({*SIZES, *JOINED} - BY_VALUES))
def test_it_agrees_with_its_dense_reference(method: str, rows: int, keys: int, padded: bool, seed: int) -> None:
    torch.manual_seed(seed)
    if "leverage" in method:
        keys += 40  # up to 8 real ones, the head width, all have a score of 1
    q, k, v = torch.randn(2, 2, rows, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 5)
    mask = None
    if padded:
        mask = torch.rand(2, keys) > 0.3
        mask[0, 0] = True
    layer = Scatterbrain(method, Geometry(keys, 2, 8, queries=rows, value_dim=5), 3, **sizes(method))
    matrix = scatterbrain_matrix(layer, q, k, 0.5, mask)
    assert matrix.shape[-2:] == (rows, keys)
    expected = matrix @ v.double()
    if method == "wildcat":  # whose output is cut to the range of the values
        expected = expected.clamp(*(f(v.double(), -2, keepdim=True) for f in (torch.amin, torch.amax)))
        if mask is not None:
            return  # the range is that of real keys; test_wildcat.py has it
    torch.testing.assert_close(layer(q, k, v, mask, 0.5).double(), expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=10)
@given(rows=st.integers(1, 80), keys=st.integers(1, 80), bucket=st.integers(1, 30))
def test_hash_buckets_have_their_share_of_the_queries(rows: int, keys: int, bucket: int) -> None:
    """Every query reads one bucket a round, and each bucket is read by its share of the queries."""
    layer = Scatterbrain("lsh", Geometry(keys, 1, 4, queries=rows), 0, bucket=bucket, rounds=1)
    support = layer.support
    assert support is not None
    pairs = support.dense(torch.randn(1, 1, rows, 4), torch.randn(1, 1, keys, 4), None)[0, 0]
    read = pairs.sum(-1)
    assert int(read.min()) >= 1
    assert int(read.max()) <= min(bucket, keys)
    readers = pairs.sum(0)[pairs.sum(0) > 0]
    assert int(readers.max()) <= -(-bucket * rows // keys)


@pytest.mark.parametrize("method", POSITIONS)
def test_a_part_that_goes_by_position_refuses_them(method: str) -> None:
    """Before its parameters are looked at."""
    site = Geometry(64, 2, 8, grid=(8, 8), queries=256)
    assert not fits(method, site)
    line = refused(Scatterbrain, method, site, 0)
    assert "256 queries read 64 keys" in line


def test_the_same_numbers_are_served_by_all() -> None:
    assert all(fits(name, Geometry(64, 2, 8)) for name in PARTS)


def test_whole_support_is_exact_attention() -> None:
    q, k, v = torch.randn(2, 2, 30, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 20)
    site = Geometry(12, 2, 8, queries=30, value_dim=20)
    expected = exact_attention(q, k, v)
    torch.testing.assert_close(
        Scatterbrain("topk", site, 0, keys=12)(q, k, v, scale=1.0), expected, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(exact_matrix(q, k, 1.0) @ v.double(), expected.double(), atol=1e-5, rtol=1e-5)
    layers = [Exact(site.of_heads(1)), Scatterbrain("lsh+clusters", site.of_heads(1), 0, bucket=12, rounds=1, rank=3)]
    found = PerHead(site, [[1], [0]], layers)(q, k, v, scale=1.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "method", ["clusters", "coreset", "lsh+clusters", "top-clusters+clusters", "kdeformer", "thinformer"]
)
def test_it_has_gradients(method: str) -> None:
    inputs = [torch.randn(1, 1, n, 8).requires_grad_() for n in (24, 10, 10)]
    layer = Scatterbrain(method, Geometry(10, 1, 8, queries=24), 0, **sizes(method))
    for gradient in torch.autograd.grad(layer(*inputs).square().sum(), inputs):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
