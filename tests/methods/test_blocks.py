"""Blocks of the past: the layer, its general form and the plain definition agree; nothing of the future; what is found."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbpatch.attention import PARTS, Geometry, Scatterbrain, pairwise
from sbpatch.attention.reference import exact_matrix, scatterbrain_matrix
from sbpatch.errors import SbpatchError

SMALL = {"epoch": 32, "block": 4, "blocks": 3, "first": 2, "tile": 8}


def built(n: int, heads: int = 4, key_heads: int = 2, **change: int) -> Scatterbrain:
    """With factors and weights of the means other than 1."""
    layer = Scatterbrain("blocks", Geometry(n, heads, 8, True, key_heads=key_heads), 0, **SMALL | change)
    generator = torch.Generator().manual_seed(1)
    layer.learned["gain"].copy_(0.3 * torch.randn(key_heads, generator=generator))
    layer.learned["sharpness"].copy_(1 + 0.1 * torch.randn(key_heads, generator=generator))
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
    block=st.sampled_from([1, 2, 4, 16, 32]),
    blocks=st.integers(0, 9),
    first=st.integers(0, 40),
    key_heads=st.sampled_from([1, 2, 4]),
    padded=st.booleans(),
)
def test_fast_general_and_dense_forms_agree(
    n: int, tile: int, block: int, blocks: int, first: int, key_heads: int, padded: bool
) -> None:
    layer = built(n, key_heads=key_heads, tile=tile, block=block, blocks=blocks, first=first)
    q, k, v = draw(n, key_heads=key_heads, seed=n)
    mask = None
    if padded:
        mask = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) > 0.35
        mask[0, 0], mask[1, n // 2 :] = True, False
    found = layer(q, k, v, mask, 0.5)
    general = pairwise.merged(*layer.split(q, k, v, mask, 0.5), layer.gain)
    torch.testing.assert_close(found, general, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.double(), defined(layer, q, k, v, 0.5, mask), atol=2e-5, rtol=1e-4)


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
    """Rows with one key far above all others: that key alone, read exactly or as part of a block's mean."""
    q, k, v = draw(100)
    found = built(100)(size * q, k, v, scale=1.0)
    assert found.isfinite().all()
    assert float(found.abs().max()) <= float(v.abs().max()) * 1.001


@pytest.mark.parametrize("n", [1, 31, 32])
def test_within_the_first_epoch_it_is_exact_attention(n: int) -> None:
    q, k, v = draw(n)
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    wanted = exact_matrix(q, repeated[0], 0.5, causal=True) @ repeated[1].double()
    torch.testing.assert_close(built(n)(q, k, v, scale=0.5).double(), wanted, atol=1e-5, rtol=1e-4)


def test_blocks_of_one_key_are_exact_attention() -> None:
    """A mean of one key is that key; with factors of 1 nothing is approximated."""
    layer = Scatterbrain("blocks", Geometry(100, 2, 8, True), 0, **SMALL | {"block": 1, "blocks": 0})
    q, k, v = draw(100, 2, 2)
    wanted = exact_matrix(q, k, 0.5, causal=True) @ v.double()
    torch.testing.assert_close(layer(q, k, v, scale=0.5).double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", [32, 64, 100])
def test_later_tiles_change_nothing(first: int) -> None:
    """Blocks of an epoch follow from that epoch and the first one alone; queries of one tile choose together."""
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
    found = Scatterbrain("blocks", site, 0, epoch=128, block=8, blocks=2)(q, k, v)[..., -64:, :]
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


@pytest.mark.parametrize("stored", [40, 92, 300, 700])
def test_sizes_fit(stored: float) -> None:
    site = Geometry(2048, 9, 64, True, key_heads=3)
    sizes = PARTS["blocks"].variants(stored, site)
    assert (len(sizes) > 0) == (stored > 92)
    for size in sizes:
        layer = Scatterbrain("blocks", site, 0, **size)
        assert 0.6 * stored <= layer.stored <= stored


def test_pairs_and_means_are_counted_as_they_are() -> None:
    layer = built(130, 2, 2)
    q, k, _ = draw(130, 2, 2)
    pairs = float(layer.low_rank.pairs(q, k, None).sum(-1).double().mean())
    assert pairs <= layer.nnz <= pairs + 2  # a first token may be in a block that is read, and counts once
    read = layer.low_rank.dense(q, k, None).masked_fill(layer.low_rank.pairs(q, k, None), 0)
    means = [len(set(row[row > 0].tolist())) for row in read[0, 0]]
    assert layer.stored - layer.nnz == pytest.approx(1 + sum(means) / 130, abs=0.02)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epoch": 0}, "at least 1"),
        ({"blocks": -1}, "at least 0"),
        ({"tile": 5}, "number of tiles"),
        ({"block": 3}, "power of two"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, int], said: str) -> None:
    with pytest.raises(SbpatchError, match=said):
        built(100, **change)


def test_it_is_for_causal_sites() -> None:
    with pytest.raises(SbpatchError, match="causal"):
        Scatterbrain("blocks", Geometry(100, 1, 8), 0, **SMALL)
    assert PARTS["blocks"].sized(50, Geometry(100, 1, 8)) is None
