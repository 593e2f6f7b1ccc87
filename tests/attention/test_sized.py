"""A layer by a number of entries: never more than asked for, split as asked, trainable through, and refused in one line."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbpatch.attention import Geometry, Scatterbrain, sized_layer, sized_parameters
from sbpatch.errors import SbpatchError

METHODS = ("favor", "reformer", "lsh", "window", "local", "reformer+favor", "lsh+favor", "window+favor")
BIDIRECTIONAL = (*METHODS, "clusters", "lsh+clusters")
CAUSAL = (*METHODS, "blocks", "pages")


@settings(max_examples=25)
@given(
    entries=st.floats(0.5, 120),
    tokens=st.integers(1, 300),
    low_rank=st.floats(0.05, 0.95),
    data=st.data(),
    seed=st.integers(0, 9),
)
def test_no_more_is_stored_than_asked_for(
    entries: float, tokens: int, low_rank: float, data: st.DataObject, seed: int
) -> None:
    causal = data.draw(st.booleans())
    method = data.draw(st.sampled_from(CAUSAL if causal else BIDIRECTIONAL))
    site = Geometry(tokens, heads=2, head_dim=8, causal=causal)
    parameters = sized_parameters(method, site, entries, low_rank)
    if parameters is None:
        with pytest.raises(SbpatchError, match="cannot work with"):
            sized_layer(method, site, entries, low_rank=low_rank, seed=seed)
        return
    layer = sized_layer(method, site, entries, low_rank=low_rank, seed=seed)
    assert layer.stored <= entries
    again = Scatterbrain(method, site, seed, **parameters)
    x = torch.randn(3, 1, 2, tokens, 8)
    assert torch.equal(layer(*x), again(*x))


def test_entries_are_split_as_asked() -> None:
    layer = sized_layer("reformer+favor", Geometry(1024, 4, 16, causal=True), 128, low_rank=0.25)
    assert (layer.nnz, layer.rank) == (96, 16)
    assert sized_parameters("favor", Geometry(64, 1, 8), 20) == {"rank": 10}  # one part gets them all


@pytest.mark.parametrize("method", CAUSAL)
def test_a_causal_layer_trains_and_reads_nothing_later(method: str) -> None:
    layer = sized_layer(method, Geometry(96, 2, 8, causal=True), 60)
    q, k, v = (torch.randn(1, 2, 96, 8, requires_grad=True) for _ in range(3))
    row = 50
    gradients = torch.autograd.grad(layer(q, k, v)[:, :, row].square().sum(), (q, k, v))
    for gradient in gradients[1:]:
        assert gradient.isfinite().all()
        assert gradient[:, :, : row + 1].abs().sum() > 0
        assert not gradient[:, :, row + 1 :].any()
    asked = gradients[0].abs().sum(-1).nonzero()[:, 2].unique().tolist()
    assert asked == [row] or method == "blocks"  # whose tiles weigh their points by all of their queries
    assert row in asked


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SbpatchError, match="'lsh' cannot work with 2 entries a row at a bidirectional site of 64 keys"):
        sized_layer("lsh", Geometry(64, 1, 8), 2)
    with pytest.raises(SbpatchError, match="did you mean lsh"):
        sized_layer("lhs", Geometry(64, 1, 8), 20)
    with pytest.raises(SbpatchError, match="'pages' cannot work with 40 entries a row at a bidirectional site"):
        sized_layer("pages", Geometry(64, 1, 8), 40)
    with pytest.raises(SbpatchError, match="cannot be causal"):
        sized_layer("clusters", Geometry(64, 1, 8, causal=True), 40)
    assert sized_parameters("blocks", Geometry(4, 1, 8, causal=True), 3) is None  # fewer tokens than a tile has
