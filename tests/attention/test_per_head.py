"""Heads in groups: each group's layer sees its own heads, and shared key heads are the right ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import refused

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.attention.per_head import Exact, PerHead
from sbpatch.attention.reference import exact_matrix, scatterbrain_matrix

N, WIDTH = 70, 8


def layers(site: Geometry, groups: list[list[int]]) -> PerHead:
    """Exact, a window and a window with clusters, in turn."""
    kinds = [
        lambda g: Exact(g),
        lambda g: Scatterbrain("window", g, 0, window=9),
        lambda g: Scatterbrain("window+favor" if g.causal else "window+clusters", g, 0, window=64, rank=6),
    ]
    return PerHead(site, groups, [kinds[i % 3](site.of_heads(len(group))) for i, group in enumerate(groups)])


@given(
    order=st.permutations(range(6)),
    cuts=st.sets(st.integers(1, 5), max_size=3),
    causal=st.booleans(),
    shared=st.sampled_from([1, 2, 3]),
    padded=st.booleans(),
)
def test_each_head_is_what_its_layer_makes_of_it(order, cuts, causal, shared, padded):
    edges = [0, *sorted(cuts), 6]
    groups = [list(order[a:b]) for a, b in itertools.pairwise(edges)]
    layer = layers(Geometry(N, 6, WIDTH, causal), groups)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, N, WIDTH, generator=generator)
    k, v = torch.randn(2, 2, 6 // shared, N, WIDTH, generator=generator)
    mask = torch.arange(N) < torch.tensor([[N], [50]]) if padded else None
    found = layer(q, k, v, key_mask=mask, scale=0.4)
    k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    for group, part in zip(groups, layer.layers, strict=True):
        alone = part(q[:, group], k[:, group], v[:, group], key_mask=mask, scale=0.4)
        torch.testing.assert_close(found[:, group], alone)
    assert layer.stored == pytest.approx(sum(len(g) * p.stored for g, p in zip(groups, layer.layers, strict=True)) / 6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_exact_is_softmax_attention(causal, padded):
    q, k, v = torch.randn(3, 2, 3, N, WIDTH)
    mask = torch.arange(N) < torch.tensor([[N], [50]])
    found = Exact(Geometry(N, 3, WIDTH, causal))(q, k, v, key_mask=mask if padded else None, scale=0.4)
    logits = q.double() @ k.double().mT * 0.4
    if causal:
        logits = logits.masked_fill(~torch.ones(N, N).tril().bool(), -torch.inf)
    if padded:
        logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    torch.testing.assert_close(found.double(), logits.softmax(-1) @ v.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2, 3]], [[]]])
def test_groups_that_are_no_partition(groups):
    assert "not the 3 heads" in refused(layers, Geometry(N, 3, WIDTH), groups)


@pytest.mark.parametrize("method", ["clusters", "window", "window+clusters", "lsh+clusters"])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_queries_share_their_keys(method, causal):
    """k and v with a third of q's heads give what repeated ones give; the dense definition agrees."""
    if causal and method != "window":
        pytest.skip("clusters are not causal")
    sizes = {"window": 64, "rank": 6, "bucket": 9, "rounds": 2}
    takes = {"clusters": ["rank"], "window": ["window"], "lsh": ["bucket", "rounds"]}
    names = [name for part in method.split("+") for name in takes[part]]
    layer = Scatterbrain(method, Geometry(N, 6, WIDTH, causal), 0, **{name: sizes[name] for name in names})
    q, (k, v) = torch.randn(2, 6, N, WIDTH), torch.randn(2, 2, 2, N, WIDTH)
    repeated = [x.repeat_interleave(3, 1) for x in (k, v)]
    torch.testing.assert_close(layer(q, k, v), layer(q, *repeated))
    if not causal:
        dense = scatterbrain_matrix(layer, q, repeated[0], WIDTH**-0.5) @ repeated[1].double()
        torch.testing.assert_close(layer(q, k, v).double(), dense, atol=1e-4, rtol=1e-3)


def test_heads_that_share_keys_stay_together():
    site = Geometry(N, 6, WIDTH, causal=True, key_heads=3)
    groups = [[2, 3], [0, 1, 4, 5]]
    layer = layers(site, groups)
    q, (k, v) = torch.randn(2, 6, N, WIDTH), torch.randn(2, 2, 3, N, WIDTH)
    found = layer(q, k, v)
    for group, shared, part in zip(groups, [[1], [0, 2]], layer.layers, strict=True):
        torch.testing.assert_close(found[:, group], part(q[:, group], k[:, shared], v[:, shared]))
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]  # as a model may do itself
    torch.testing.assert_close(layer(q, *repeated), found)
    assert "share keys" in refused(layers, site, [[1, 2], [0, 3, 4, 5]])


def test_what_a_causal_row_stores_on_average():
    """Counted in the dense matrices: columns that a row reads exactly, and clusters that have begun before it."""
    site = Geometry(200, 1, WIDTH, causal=True)
    assert site.row_keys == float((exact_matrix(*torch.randn(2, 1, 1, 200, 4), 1.0).tril() > 0).sum()) / 200
    assert Scatterbrain("window", site, 0, window=64).nnz == pytest.approx(
        sum(min(row + 1, 64) for row in range(200)) / 200
    )
    layer = Scatterbrain("blocks", site, 0, near=32, block=8, blocks=3, first=4, tile=32)
    # where the near keys of each row's tile begin; the tile's mean query weighs those before
    low = [max(row // 32 * 32 - 32, 0) for row in range(200)]
    assert layer.low_rank.stored == pytest.approx(1 + sum(max(x // 8 - 3, 0) + x / 32 for x in low) / 200)
    exact = sum(row + 1 - x + min(x, 4) + 8 * min(x // 8, 3) for row, x in enumerate(low)) / 200
    assert layer.nnz == pytest.approx(exact)
