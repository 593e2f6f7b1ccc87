"""Windows: which pairs they hold, counted and compared with loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sbpatch.attention import Geometry
from sbpatch.attention.core import Tiles
from sbpatch.attention.window import Window, Window2d
from sbpatch.errors import SbpatchError

from .helpers import window2d_pairs, window_pairs


def pairs_of(tiles: Tiles, n: int, causal: bool = False) -> Tensor:
    """How often each (query, key) pair is counted, read off the slot that answers each query. (n, n)"""
    query, key, valid = tiles.query.flatten(), tiles.key, tiles.valid.flatten(0, 1)
    counts = torch.zeros(n, n, dtype=torch.long)
    for i in range(n):
        place = int(tiles.slot[i])
        assert query[place] == i
        row = key[place // tiles.query.shape[-1]][valid[place]]
        counts[i] += torch.bincount(row[row <= i] if causal else row, minlength=n)
    return counts


lengths = st.integers(1, 300)


@given(n=lengths, window=st.integers(1, 400), causal=st.booleans())
def test_the_band_is_the_plain_definition(n: int, window: int, causal: bool) -> None:
    part = Window(Geometry(n, 1, 4, causal), 0, window)
    x = torch.zeros(1, 1, n, 4)
    (tiles,) = part.select(x, x, None, 1.0)
    plain = window_pairs(n, window, causal)
    assert torch.equal(pairs_of(tiles, n), plain.long())
    assert torch.equal(part.dense(x, x, None), plain)


@given(n=lengths, window=st.integers(1, 1000), causal=st.booleans())
def test_nnz_is_the_counted_support(n: int, window: int, causal: bool) -> None:
    part = Window(Geometry(n, 1, 4, causal), 0, window)
    counted = sum(
        min(n, first + window) - max(0, first)
        for first in (i - window + 1 if causal else i - window // 2 for i in range(n))
    )
    assert part.nnz == pytest.approx(counted / n, rel=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 17, 129, 200])
def test_a_layer_built_for_one_length_serves_another(n: int, causal: bool) -> None:
    part = Window(Geometry(64, 1, 4, causal), 0, 9)
    x = torch.zeros(1, 1, n, 4)
    (tiles,) = part.select(x, x, None, 1.0)
    assert torch.equal(pairs_of(tiles, n).bool(), window_pairs(n, 9, causal))


grids = st.tuples(st.integers(1, 20), st.integers(1, 20))


@given(grid=grids, prefix=st.integers(0, 5), window=st.integers(1, 12))
def test_the_grid_window_is_the_plain_definition(grid: tuple[int, int], prefix: int, window: int) -> None:
    n = grid[0] * grid[1] + prefix
    part = Window2d(Geometry(n, 1, 4, grid=grid, prefix=prefix), 0, window)
    x = torch.zeros(1, 1, n, 4)
    (tiles,) = part.select(x, x, None, 1.0)
    plain = window2d_pairs(grid, prefix, window)
    assert torch.equal(pairs_of(tiles, n), plain.long())
    assert torch.equal(part.dense(x, x, None), plain)
    assert part.nnz == pytest.approx(plain.sum().item() / n, rel=1e-6)


def test_a_grid_window_sees_the_neighbours_above_that_a_band_of_equal_size_misses() -> None:
    site = Geometry(56 * 56, 1, 4, grid=(56, 56))
    x = torch.zeros(1, 1, site.tokens, 4)
    token, above = 30 * 56 + 30, 29 * 56 + 30
    assert Window2d(site, 0, 7).dense(x, x, None)[token, above]
    assert not Window(site, 0, 49).dense(x, x, None)[token, above]


def test_a_grid_window_refuses_another_size() -> None:
    part = Window2d(Geometry(12, 1, 4, grid=(3, 4)), 0, 3)
    x = torch.zeros(1, 1, 20, 4)
    with pytest.raises(SbpatchError, match="calibrated for 12 tokens and got 20"):
        list(part.select(x, x, None, 1.0))


@given(stored=st.floats(0, 500), n=lengths, causal=st.booleans())
def test_sized_never_stores_more_than_asked(stored: float, n: int, causal: bool) -> None:
    site = Geometry(n, 1, 4, causal)
    parameters = Window.sized(stored, site)
    assert (parameters is None) == (stored < 1)
    if parameters is not None:
        assert Window(site, 0, **parameters).nnz <= stored


@given(stored=st.floats(0, 200), grid=grids, prefix=st.integers(0, 5))
def test_sized_on_a_grid_never_stores_more_than_asked(stored: float, grid: tuple[int, int], prefix: int) -> None:
    site = Geometry(grid[0] * grid[1] + prefix, 1, 4, grid=grid, prefix=prefix)
    parameters = Window2d.sized(stored, site)
    if parameters is not None:
        assert parameters["window"] % 2 == 1
        assert Window2d(site, 0, **parameters).nnz <= stored
    else:
        assert stored < prefix + 9  # the smallest window that is one


def test_sized_without_a_grid_offers_no_grid_window() -> None:
    assert Window2d.sized(100.0, Geometry(50, 1, 4)) is None
