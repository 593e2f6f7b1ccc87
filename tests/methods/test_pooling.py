"""Pooled keys, and MRA-2 made of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sbpatch.attention import PARTS, Geometry, Scatterbrain, parse_method
from sbpatch.errors import SbpatchError


@pytest.mark.parametrize("n", [1, 5, 33, 90])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sparse", ["", "window+", "top-clusters+", "longformer+"])
def test_pooling_agrees_with_its_dense_reference(
    sparse: str, padded: bool, n: int, agrees: Callable[..., Scatterbrain]
) -> None:
    extra = {"": {}, "window+": {"window": 5}, "top-clusters+": {"probes": 2}, "longformer+": {"window": 5}}[sparse]
    agrees(f"{sparse}pooling", n, padded=padded, rank=6, **extra)


@pytest.mark.parametrize("sparse", ["window", "sinks"])
@pytest.mark.parametrize("n", [1, 40, 90])
def test_causal_pools_agree_with_their_dense_reference(
    sparse: str, n: int, agrees: Callable[..., Scatterbrain]
) -> None:
    for padded in (False, True):
        agrees(f"{sparse}+pooling", n, causal=True, padded=padded, rank=8, window=12)


def test_causal_pools_leave_no_key_unread() -> None:
    """With equal logits every past key weighs the same: the running mean, whatever is pooled."""
    layer = Scatterbrain("window+pooling", Geometry(70, 1, 8, causal=True), 0, window=9, rank=8)
    q, v = torch.zeros(1, 1, 70, 8), torch.randn(1, 1, 70, 3)
    mean = v.cumsum(2) / torch.arange(1, 71)[:, None]
    torch.testing.assert_close(layer(q, q, v), mean, atol=1e-5, rtol=1e-5)


def test_causal_pools_need_a_window_of_their_length() -> None:
    site = Geometry(70, 1, 8, causal=True)
    with pytest.raises(SbpatchError, match=r"causal pooling summarise whole stretches of 9 keys.*not 8"):
        Scatterbrain("window+pooling", site, 0, window=8, rank=8)
    with pytest.raises(SbpatchError, match="not 0"):
        Scatterbrain("mra2", site, 0, blocks=2, rank=8)


@pytest.mark.parametrize(("grid", "prefix"), [((6, 10), 0), ((7, 5), 2), ((1, 9), 1)])
def test_pools_of_a_grid_are_rectangles(
    grid: tuple[int, int], prefix: int, agrees: Callable[..., Scatterbrain]
) -> None:
    n = grid[0] * grid[1] + prefix
    layer = agrees("pooling", n, grid=grid, prefix=prefix, rank=9)
    pool = layer.low_rank.pools(n, torch.device("cpu"))
    assert len(pool.unique()) <= 9
    assert len(pool[:prefix].unique()) == min(1, prefix)
    assert not set(pool[:prefix].tolist()) & set(pool[prefix:].tolist())
    image = pool[prefix:].view(grid)
    for p in image.unique():
        rows, cols = (image == p).any(1).nonzero(), (image == p).any(0).nonzero()
        assert (image == p).sum() == len(rows) * len(cols)
        assert (image[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1] == p).all()


def test_pooling_is_exact_where_keys_are_equal_within_pools() -> None:
    q, v = torch.randn(1, 1, 60, 8), torch.randn(1, 1, 60, 3)
    k = torch.randn(1, 1, 6, 8).repeat_interleave(10, dim=2)
    layer = Scatterbrain("pooling", Geometry(60, 1, 8), 0, rank=6)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(layer(q, k, v), exact, atol=1e-5, rtol=1e-5)


def test_pooling_refuses_what_it_cannot_do() -> None:
    site = Geometry(37, 1, 8, grid=(6, 6), prefix=1)
    with pytest.raises(SbpatchError, match="rank of at least 2"):
        Scatterbrain("pooling", site, 0, rank=1)
    q = torch.randn(1, 1, 40, 8)
    for method, parameters in (("pooling", {"rank": 5}), ("top-blocks", {"blocks": 2})):
        with pytest.raises(SbpatchError, match="calibrated for 37 tokens and got 40"):
            Scatterbrain(method, site, 0, **parameters)(q, q, q)


# -- top blocks and MRA-2 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 40, 83])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("low_rank", ["", "+favor"])
def test_top_blocks_agree_with_their_dense_reference(
    low_rank: str, causal: bool, padded: bool, n: int, agrees: Callable[..., Scatterbrain]
) -> None:
    rank = {"rank": 8} if low_rank else {}
    agrees(f"top-blocks{low_rank}", n, causal=causal, padded=padded, blocks=3, block=4, **rank)


@pytest.mark.parametrize(("grid", "prefix"), [((8, 8), 0), ((7, 10), 3), ((6, 5), 1)])
def test_mra2_agrees_with_its_dense_reference(
    grid: tuple[int, int], prefix: int, agrees: Callable[..., Scatterbrain]
) -> None:
    for padded in (False, True):
        n = grid[0] * grid[1] + prefix
        agrees("mra2", n, grid=grid, prefix=prefix, padded=padded, blocks=3, block=9, rank=8)
    agrees("mra2", 50, blocks=2, block=8, rank=7)
    assert parse_method("mra2") == ("top-blocks", "pooling")


@pytest.mark.parametrize("causal", [False, True])
def test_nnz_of_top_blocks_is_the_number_of_pairs(causal: bool, counts: Callable[[Scatterbrain], float]) -> None:
    for site in (Geometry(64, 2, 8, causal), Geometry(70, 2, 8, causal), Geometry(64, 2, 8, grid=(8, 8))):
        layer = Scatterbrain("top-blocks", site, 0, blocks=3, block=16)
        assert layer.nnz * 0.9 <= counts(layer) <= layer.nnz
        if site.tokens == 64:
            assert layer.nnz == pytest.approx(counts(layer))
    assert PARTS["top-blocks"].sized(2, site) is None
    assert Scatterbrain("top-blocks", site, 0, **PARTS["top-blocks"].sized(39, site)).nnz <= 39


def test_top_blocks_find_the_planted_block() -> None:
    """Queries of block g match the keys of block 7 - g and nothing else."""
    direction = torch.eye(8)
    q = 4 * direction.repeat_interleave(6, 0)[None, None]
    k = 4 * direction.flip(0).repeat_interleave(6, 0)[None, None]
    v = torch.randn(1, 1, 48, 3)
    layer = Scatterbrain("top-blocks", Geometry(48, 1, 8), 0, blocks=2, block=6)
    pairs = layer.support.dense(q, k, None)[0, 0]
    for g in range(8):
        assert pairs[6 * g, 6 * (7 - g) : 6 * (8 - g)].all()
        assert pairs[6 * g, 6 * g : 6 * g + 6].all()
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(layer(q, k, v, scale=1.0), exact, atol=1e-4, rtol=1e-4)
