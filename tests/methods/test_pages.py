"""Pages of the past: the pairs by their definition, and that they find what was hidden far back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sbpatch.attention import PARTS, Geometry, Scatterbrain
from sbpatch.errors import SbpatchError


@pytest.mark.parametrize("n", [1, 15, 64, 101, 200])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("low_rank", ["", "+favor"])
def test_pages_agree_with_their_dense_reference(
    low_rank: str, padded: bool, n: int, agrees: Callable[..., Scatterbrain]
) -> None:
    rank = {"rank": 5} if low_rank else {}
    agrees(f"pages{low_rank}", n, padded=padded, causal=True, window=9, pages=2, first=3, **rank)


@given(
    n=st.integers(1, 150),
    window=st.integers(1, 70),
    pages=st.integers(1, 12),
    first=st.integers(1, 40),
    tile=st.sampled_from([1, 7, 16, 32]),
    seed=st.integers(0, 9),
)
def test_pairs_are_counted_as_they_are(n: int, window: int, pages: int, first: int, tile: int, seed: int) -> None:
    part = PARTS["pages"](Geometry(n, 2, 4, True), 0, window=window, pages=pages, first=first, tile=tile)
    q, k = torch.randn(2, 1, 2, n, 4, generator=torch.Generator().manual_seed(seed))
    assert part.nnz == pytest.approx(float(part.dense(q, k, None).sum()) / (2 * n))


def test_a_key_far_back_is_found() -> None:
    """One key in 1,024 matches the last queries; a window of the same size never sees it."""
    n = 1024
    q, k, v = (0.3 * torch.randn(1, 1, n, 16) for _ in range(3))
    k[..., 100, :], v[..., 100, :] = 4.0, 5.0
    q[..., -16:, :] = 1.0
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[..., -16:, :]
    site = Geometry(n, 1, 16, True)
    found = Scatterbrain("pages", site, 0, window=64, pages=4)(q, k, v)[..., -16:, :]
    near = Scatterbrain("sinks", site, 0, window=140)(q, k, v)[..., -16:, :]
    assert (found - exact).norm() < 0.05 * exact.norm()
    assert (near - exact).norm() > 0.5 * exact.norm()


def test_sizes_fit_and_pages_are_causal() -> None:
    site = Geometry(2048, 9, 64, True)
    for stored in (40, 92, 128, 300, 700):
        assert PARTS["pages"](site, 0, **PARTS["pages"].sized(stored, site)).nnz <= stored
    assert PARTS["pages"].sized(30, site) is None
    assert PARTS["pages"].sized(300, Geometry(2048, 9, 64)) is None
    with pytest.raises(SbpatchError, match="causal"):
        PARTS["pages"](Geometry(100, 1, 8), 0, window=8, pages=2)
    for wrong in ({"window": 0}, {"pages": 0}, {"first": 0}):
        with pytest.raises(SbpatchError, match="at least 1"):
            PARTS["pages"](site, 0, **{"window": 8, "pages": 2, "first": 1} | wrong)
