"""Blocks of the past: the layer, its general form and the plain definition agree; nothing of the future; what is found."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbpatch.attention import PARTS, Geometry, Scatterbrain, fused, pairwise
from sbpatch.attention.core import with_heads
from sbpatch.attention.reference import exact_matrix, scatterbrain_matrix
from sbpatch.errors import SbpatchError

SMALL = {"near": 24, "block": 4, "blocks": 3, "first": 2, "tile": 8}


def built(n: int, heads: int = 4, key_heads: int = 2, **change: int) -> Scatterbrain:
    """With weights of the points other than their own."""
    layer = Scatterbrain("blocks", Geometry(n, heads, 8, True, key_heads=key_heads), 0, **SMALL | change)
    generator = torch.Generator().manual_seed(1)
    gain = layer.learned["gain"]
    gain.copy_(0.3 * torch.randn(gain.shape, generator=generator))
    return layer


def draw(n: int, heads: int = 4, key_heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, 8, generator=generator) for h in (heads, key_heads, key_heads))
    return q, k, v


def defined(layer: Scatterbrain, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """A' v by the dense definition, in float64."""
    repeated = [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)]
    return scatterbrain_matrix(layer, q, repeated[0], scale, mask) @ repeated[1].double()


@settings(max_examples=60)
@given(
    n=st.integers(1, 150),
    tile=st.sampled_from([4, 8, 16, 32]),
    block=st.sampled_from([1, 2, 4]),
    near=st.integers(0, 12),
    blocks=st.integers(0, 9),
    first=st.integers(0, 40),
    key_heads=st.sampled_from([1, 2, 4]),
    shared=st.integers(0, 1),
    padded=st.booleans(),
)
def test_fast_general_and_dense_forms_agree(
    n: int, tile: int, block: int, near: int, blocks: int, first: int, key_heads: int, shared: int, padded: bool
) -> None:
    size = {"tile": tile, "block": block, "near": near * block, "blocks": blocks, "first": first, "shared": shared}
    layer = built(n, key_heads=key_heads, **size)
    q, k, v = draw(n, key_heads=key_heads, seed=n)
    mask = None
    if padded:
        mask = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) > 0.35
        mask[0, 0], mask[1, n // 2 :] = True, False
    found = layer(q, k, v, mask, 0.5)
    general = pairwise.merged(*layer.split(q, k, v, mask, 0.5), layer.gain)
    torch.testing.assert_close(found, general, atol=2e-5, rtol=1e-4)
    keys = [with_heads(x, layer.key_heads) for x in (k, v)]
    low = layer.low_rank.select(q, *keys, mask, 0.5).low_rank
    torch.testing.assert_close(found, fused.over_blocks(q, *keys, low, 0.5, layer.gain), atol=5e-6, rtol=5e-6)
    torch.testing.assert_close(found.double(), defined(layer, q, k, v, 0.5, mask), atol=2e-5, rtol=1e-4)


def test_heads_with_tiles_of_their_own_are_layers_of_their_own() -> None:
    """Query heads that share keys and look for opposite things: their mean query says nothing of either."""
    n = 256
    q, k, v = draw(n)
    q = 0.2 * q + torch.tensor([1.5, -1.5, 1.5, -1.5])[:, None, None]
    one = Geometry(n, 1, 8, True)
    own = Scatterbrain("blocks", Geometry(n, 4, 8, True, key_heads=2), 0, **SMALL, shared=0)(q, k, v)
    alone = [Scatterbrain("blocks", one, 0, **SMALL)(q[:, [h]], k[:, [h // 2]], v[:, [h // 2]]) for h in range(4)]
    torch.testing.assert_close(own, torch.cat(alone, dim=1), atol=1e-6, rtol=1e-5)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    together = Scatterbrain("blocks", Geometry(n, 4, 8, True, key_heads=2), 0, **SMALL)(q, k, v)
    assert float((own - exact).norm()) < 0.8 * float((together - exact).norm())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_goes_in_and_out(kind: torch.dtype) -> None:
    q, k, v = draw(150)
    layer = built(150)
    found = layer(*(x.to(kind) for x in (q, k, v)), scale=0.5)
    assert found.dtype == kind
    wanted = layer(*(x.to(kind).float() for x in (q, k, v)), scale=0.5)
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("size", [30.0, 1e3])
def test_large_logits_stay_finite(size: float) -> None:
    """Rows with one key far above all others: that key alone, read exactly or as its block's point."""
    q, k, v = draw(100)
    found = built(100)(size * q, k, v, scale=1.0)
    assert found.isfinite().all()
    assert float(found.abs().max()) <= float(v.abs().max()) * 1.001


@pytest.mark.parametrize("n", [1, 31, 32])
def test_where_all_keys_are_near_it_is_exact_attention(n: int) -> None:
    q, k, v = draw(n)
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    wanted = exact_matrix(q, repeated[0], 0.5, causal=True) @ repeated[1].double()
    torch.testing.assert_close(built(n)(q, k, v, scale=0.5).double(), wanted, atol=1e-5, rtol=1e-4)


def test_blocks_of_one_key_are_exact_attention() -> None:
    """A point that stands for one key is that key."""
    layer = Scatterbrain("blocks", Geometry(100, 2, 8, True), 0, **SMALL | {"block": 1, "blocks": 0})
    q, k, v = draw(100, 2, 2)
    wanted = exact_matrix(q, k, 0.5, causal=True) @ v.double()
    torch.testing.assert_close(layer(q, k, v, scale=0.5).double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", [32, 64, 100])
def test_later_tiles_change_nothing(first: int) -> None:
    """What a tile reads follows from the tile and what is before it; queries of one tile choose together."""
    layer = built(130)
    q, k, v = draw(130)
    before = layer(q, k, v)
    start = -(-first // 8) * 8
    for x in (q, k, v):
        x[:, :, start:] = 3 * torch.randn_like(x[:, :, start:])
    torch.testing.assert_close(layer(q, k, v)[:, :, :start], before[:, :, :start], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(layer(q, k, v)[:, :, start:], before[:, :, start:], atol=1e-2)


def test_a_key_far_back_is_found_wherever_its_like_stand() -> None:
    """One key in 1,024 matches the last queries: a window of the same size never sees it, its block ranks first."""
    n = 1024
    q, k, v = (0.3 * torch.randn(1, 1, n, 16) for _ in range(3))
    k[..., 100, :], v[..., 100, :] = 4.0, 5.0
    q[..., -64:, :] = 1.0
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., -64:, :]
    site = Geometry(n, 1, 16, True)
    found = Scatterbrain("blocks", site, 0, near=64, block=8, blocks=2)(q, k, v)[..., -64:, :]
    near = Scatterbrain("sinks", site, 0, window=250)(q, k, v)[..., -64:, :]
    assert (found - exact).norm() < 0.05 * exact.norm()
    assert (near - exact).norm() > 0.5 * exact.norm()


def test_gradients_are_those_of_the_definition() -> None:
    layer = built(70)
    q, k, v = (x.requires_grad_() for x in draw(70))
    probe = torch.randn(2, 4, 70, 8)
    found = torch.autograd.grad((layer(q, k, v, scale=0.5) * probe).sum(), (q, k, v))
    general = pairwise.merged(*layer.split(q, k, v, None, 0.5), layer.gain)
    wanted = torch.autograd.grad((general * probe).sum(), (q, k, v))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_it_compiles_in_one_graph() -> None:
    layer = built(100)
    q, k, v = draw(100)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, None, 0.5), layer(q, k, v, None, 0.5), atol=1e-5, rtol=1e-4)


def test_exported_it_takes_any_number_of_samples() -> None:
    layer, batch = built(100), {0: torch.export.Dim("batch")}
    shapes = {"q": batch, "k": batch, "v": batch, "key_mask": None, "scale": None}
    program = torch.export.export(layer, (*draw(100), None, 0.5), dynamic_shapes=shapes)
    more = [x.repeat(3, 1, 1, 1)[:5] for x in draw(100, seed=1)]
    torch.testing.assert_close(program.module()(*more, None, 0.5), layer(*more, None, 0.5), atol=1e-5, rtol=1e-4)


def test_points_are_exact_for_the_mean_query_and_nowhere_above() -> None:
    """ln sum exp(q.k) of a block is convex in q, and its point is the tangent at the mean query."""
    q, k, v = draw(64, 2, 2)
    single = Scatterbrain("blocks", Geometry(64, 2, 8, True), 0, near=0, block=1, blocks=0, first=0, tile=1)
    wide = Scatterbrain("blocks", Geometry(64, 2, 8, True), 0, near=0, block=8, blocks=0, first=0, tile=8)
    q[:, :, 40:48] = q[:, :, 40:41]  # a tile whose queries are all its mean
    exact = exact_matrix(q, k, 1.0, causal=True) @ v.double()
    torch.testing.assert_close(single(q, k, v, scale=1.0).double(), exact, atol=1e-5, rtol=1e-4)
    found = wide(q, k, v, scale=1.0).double()
    torch.testing.assert_close(found[:, :, 40:48], exact[:, :, 40:48], atol=1e-5, rtol=1e-4)
    assert float((found - exact)[:, :, 48:].norm() / exact[:, :, 48:].norm()) > 0.05
    entries = wide.low_rank.dense(q, k, None).unflatten(-1, (8, 8)).sum(-1)  # of each row and block
    weights = (q.double() @ k.double().mT).exp().unflatten(-1, (8, 8)).sum(-1)
    assert bool((entries <= weights * (1 + 1e-6)).all())
    torch.testing.assert_close(entries[:, :, 40:48, :5], weights[:, :, 40:48, :5], atol=0, rtol=1e-5)


def test_one_key_that_stands_out_is_not_lost_in_its_block() -> None:
    """Its block is read as one point; the mean of its keys would give it a 32nd of its value."""
    q, k, v = (0.1 * torch.randn(1, 1, 256, 16) for _ in range(3))
    k[..., 40, :], v[..., 40, :] = 2.0, 5.0
    q[..., -32:, :] = 1.0
    layer = Scatterbrain("blocks", Geometry(256, 1, 16, True), 0, near=32, block=32, blocks=0, tile=32)
    found, exact = (
        f(q, k, v)[..., -32:, :] for f in (layer, lambda *x: F.scaled_dot_product_attention(*x, is_causal=True))
    )
    assert float(exact.mean()) > 4
    assert float((found - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("stored", [30, 128, 300, 700])
def test_sizes_fit(stored: float) -> None:
    site = Geometry(2048, 9, 64, True, key_heads=3)
    sizes = PARTS["blocks"].variants(stored, site)
    assert (len(sizes) > 0) == (stored > 30)
    for size in sizes:
        layer = Scatterbrain("blocks", site, 0, **size)
        assert 0.75 * stored <= layer.stored <= stored


def test_pairs_and_points_are_counted_as_they_are() -> None:
    layer = built(130, 2, 2)
    q, k, _ = draw(130, 2, 2)
    pairs = layer.low_rank.pairs(q, k, None)
    counted = float(pairs.sum(-1).double().mean())
    assert counted <= layer.nnz <= counted + 2  # a first token may be in a block that is read, and counts once
    read = layer.low_rank.dense(q, k, None).masked_fill(pairs, 0)[..., :128].unflatten(-1, (-1, 4))
    points = float((read > 0).any(-1).sum(-1).double().mean())
    before = [max(row // 8 * 8 - 24, 0) for row in range(130)]  # keys that the tile's mean query weighs, for 8 rows
    assert layer.stored - layer.nnz == pytest.approx(1 + points + sum(before) / 8 / 130, abs=0.05)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block": 0}, "at least 1"),
        ({"blocks": -1}, "at least 0"),
        ({"tile": 5}, "whole numbers of blocks"),
        ({"near": 3}, "whole numbers of blocks"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, int], said: str) -> None:
    with pytest.raises(SbpatchError, match=said):
        built(100, **change)


def test_it_is_for_causal_sites() -> None:
    with pytest.raises(SbpatchError, match="causal"):
        Scatterbrain("blocks", Geometry(100, 1, 8), 0, **SMALL)
    assert PARTS["blocks"].sized(50, Geometry(100, 1, 8)) is None
