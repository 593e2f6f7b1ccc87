"""Local tiles: the pairs by their definition, alone and beside clusters, in one fused call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sbpatch.attention import PARTS, Geometry, Scatterbrain
from sbpatch.errors import SbpatchError


@pytest.mark.parametrize("n", [1, 15, 64, 101])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_local_agrees_with_its_dense_reference(
    causal: bool, padded: bool, n: int, agrees: Callable[..., Scatterbrain]
) -> None:
    agrees("local", n, padded=padded, causal=causal, side=5, tile=16)
    agrees("local+favor", n, padded=padded, causal=causal, side=5, tile=16, rank=6)
    if causal:
        agrees("local+pooling", n, padded=padded, causal=True, side=40, tile=16, rank=5)
    else:
        agrees("local+clusters", n, padded=padded, side=5, tile=16, rank=5)


@given(n=st.integers(1, 200), side=st.integers(0, 90), tile=st.integers(1, 70), causal=st.booleans())
def test_pairs_are_counted_as_they_are(n: int, side: int, tile: int, causal: bool) -> None:
    part = PARTS["local"](Geometry(n, 1, 4, causal), 0, side=side, tile=tile)
    x = torch.empty(1, 1, n, 4)
    pairs = part.dense(x, x, None)
    pairs = pairs.tril() if causal else pairs
    assert part.nnz == pytest.approx(float(pairs.sum()) / n)
    near = torch.ones(n, n, dtype=torch.bool).tril() & ~torch.ones(n, n, dtype=torch.bool).tril(-part.near)
    assert not (near & ~pairs).any()  # every query reads that many of the latest keys


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stored", [30, 90, 400])
def test_sizes_fit(stored: float, causal: bool) -> None:
    site = Geometry(4096, 1, 8, causal)
    size = PARTS["local"].sized(stored, site)
    assert size is not None
    assert 0.8 * stored <= Scatterbrain("local", site, 0, **size).stored <= stored + 1
    assert PARTS["local"].sized(8, site) is None


@pytest.mark.parametrize("wrong", [{"side": -1}, {"side": 3, "tile": 0}])
def test_what_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SbpatchError, match="local needs"):
        PARTS["local"](Geometry(10, 1, 4), 0, **wrong)
