"""Nystromformer, the whole method."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sbpatch.attention import PARTS, Geometry, Scatterbrain, parse_method
from sbpatch.errors import SbpatchError


@pytest.mark.parametrize("n", [1, 7, 40, 81])
@pytest.mark.parametrize("padded", [False, True])
def test_it_agrees_with_its_dense_reference(n: int, padded: bool, agrees: Callable[..., Scatterbrain]) -> None:
    layer = agrees("nystromformer", n, padded=padded, rank=6, tolerance=1e-4)
    assert (layer.rank, layer.nnz, layer.stored) == (6, 0.0, 12.0)


def test_it_is_the_papers_product() -> None:
    """Written out with torch's own pseudo-inverse, where the middle factor is well conditioned."""
    mean = torch.nn.functional.normalize(torch.randn(4, 16), dim=-1) * 8
    q, k = (mean.repeat_interleave(10, 0) + 0.1 * torch.randn(40, 16) for _ in range(2))
    v = torch.randn(40, 3)
    mq, mk = q.view(4, 10, 16).mean(1), k.view(4, 10, 16).mean(1)
    expected = (q @ mk.T).softmax(-1) @ torch.linalg.pinv((mq @ mk.T).softmax(-1)) @ (mq @ k.T).softmax(-1) @ v
    layer = Scatterbrain("nystromformer", Geometry(40, 1, 16), 0, rank=4)
    found = layer(*(x[None, None] for x in (q, k, v)), scale=1.0)
    torch.testing.assert_close(found[0, 0], expected, atol=1e-4, rtol=1e-4)


def test_padding_changes_nothing() -> None:
    """Padded keys, whatever they hold, and whole stretches of them."""
    layer = Scatterbrain("nystromformer", Geometry(40, 1, 8), 0, rank=5)
    q, k, v = torch.randn(3, 1, 1, 40, 8)
    mask = torch.arange(40)[None] < 20
    noise = torch.where(mask[0, :, None], 0, 100.0)
    torch.testing.assert_close(layer(q, k, v, mask), layer(q, k + noise, v + noise, mask))
    assert layer(q, k, v, torch.zeros_like(mask)).abs().sum() == 0


def test_a_whole_method_stands_alone() -> None:
    assert parse_method("nystromformer") == (None, "nystromformer")
    for method in ("window+nystromformer", "nystromformer+clusters"):
        with pytest.raises(SbpatchError, match="joins no other part"):
            parse_method(method)
    with pytest.raises(SbpatchError, match="cannot be causal"):
        Scatterbrain("nystromformer", Geometry(40, 1, 8, causal=True), 0, rank=5)
    with pytest.raises(SbpatchError, match="at least one landmark"):
        Scatterbrain("nystromformer", Geometry(40, 1, 8), 0, rank=0)
    site = Geometry(40, 1, 8)
    assert PARTS["nystromformer"].sized(1, site) is None
    assert Scatterbrain("nystromformer", site, 0, **PARTS["nystromformer"].sized(11, site)).stored == 10
