"""What every method is held to: its dense reference, over ragged lengths, padding and causality."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.attention.reference import allowed_pairs, scatterbrain_matrix

Inputs = tuple[Tensor, Tensor, Tensor]


def draw(n: int, heads: int = 2, width: int = 8, batch: int = 2, values: int = 5) -> Inputs:
    q, k = torch.randn(2, batch, heads, n, width)
    return q, k, torch.randn(batch, heads, n, values)


def padding(n: int, batch: int = 2) -> Tensor:
    """About a third of the keys padded, the first sample's first key real; the last sample is half padding."""
    mask = torch.rand(batch, n) > 0.35
    mask[0, 0] = True
    mask[-1, n // 2 :] = False
    return mask


@pytest.fixture
def inputs() -> Callable[..., Inputs]:
    return draw


@pytest.fixture
def mask() -> Callable[..., Tensor]:
    return padding


@pytest.fixture
def agrees() -> Callable[..., Scatterbrain]:
    """agrees(method, n, causal=, padded=, ...): the layer's output is its dense matrix times v. Returns the layer."""

    def check(
        method: str,
        n: int,
        *,
        causal: bool = False,
        padded: bool = False,
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
        tolerance: float = 1e-5,
        seed: int = 3,
        **parameters: int,
    ) -> Scatterbrain:
        q, k, v = draw(n)
        key_mask = padding(n) if padded else None
        layer = Scatterbrain(method, Geometry(n, 2, 8, causal, grid, prefix), seed, **parameters)
        matrix = scatterbrain_matrix(layer, q, k, 0.5, key_mask)
        assert not matrix.masked_fill(allowed_pairs(n, causal, key_mask, q.device), 0).any()
        expected = matrix @ v.double()
        assert expected.abs().sum() > 0  # something is attended to
        torch.testing.assert_close(layer(q, k, v, key_mask, 0.5).double(), expected, atol=tolerance, rtol=tolerance)
        return layer

    return check


@pytest.fixture
def counts() -> Callable[[Scatterbrain], float]:
    """Pairs per row of a layer's support by its dense definition, for standard normal inputs."""

    def count(layer: Scatterbrain) -> float:
        site = layer.site
        q, k, _ = draw(site.tokens, site.heads, site.head_dim)
        pairs = layer.support.dense(q, k, None) & allowed_pairs(site.tokens, site.causal, None, q.device)
        return float(pairs.double().sum(-1).mean())

    return count
