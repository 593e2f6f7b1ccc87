"""MonarchAttention: its objective, and attention that is a Monarch matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sbpatch.attention import PARTS, Geometry, Scatterbrain
from sbpatch.errors import SbpatchError
from sbpatch.study.compare import METHODS

SIZE = {"rank": 6}


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """At scale 1."""
    seen = None if mask is None else mask[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=1.0)


@pytest.mark.parametrize("n", [1, 7, 40, 81])
@pytest.mark.parametrize("padded", [False, True])
def test_it_agrees_with_its_dense_matrix(n: int, padded: bool, agrees: Callable[..., Scatterbrain]) -> None:
    agrees("monarch", n, padded=padded, tolerance=1e-4, **SIZE)


def test_padding_changes_nothing_and_what_cannot_work_is_refused() -> None:
    layer = Scatterbrain("monarch", Geometry(40, 1, 8), 0, **SIZE)
    q, k, v = torch.randn(3, 1, 1, 40, 8)
    mask = torch.arange(40)[None] < 20
    noise = torch.where(mask[0, :, None], 0, 100.0)
    found = layer(q + noise, k + noise, v + noise, mask)
    torch.testing.assert_close(layer(q, k, v, mask)[:, :, :20], found[:, :, :20])
    with pytest.raises(SbpatchError, match="causal"):
        Scatterbrain("monarch", Geometry(40, 1, 8, causal=True), 0, **SIZE)
    with pytest.raises(SbpatchError, match="at least one"):
        Scatterbrain("monarch", Geometry(40, 1, 8), 0, **SIZE | {"rank": 0})


def test_it_is_tried_only_where_it_is_asked_for() -> None:
    assert PARTS["monarch"].tried(Geometry(40, 1, 8), 0.9) is None
    assert "monarch" not in METHODS


def objective(q: torch.Tensor, k: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Sum over rows of <a, q.k> + H(a): softmax attention attains its maximum, the sum of the logarithms of its row sums."""
    return (matrix * (q @ k.mT)).sum() + torch.special.entr(matrix).sum()


@pytest.mark.parametrize("n", [36, 41])
def test_monarchs_objective_never_falls_and_never_passes_the_softmaxs(n: int) -> None:
    q, k = torch.randn(2, 1, 2, n, 8, dtype=torch.double)
    found = []
    for steps in (1, 2, 3, 6):
        layer = Scatterbrain("monarch", Geometry(n, 2, 8), 0, rank=6, steps=steps)
        matrix = layer.low_rank.dense(q, k, None)
        torch.testing.assert_close(matrix.sum(-1), torch.ones(1, 2, n, dtype=torch.double))
        found.append(float(objective(q, k, matrix)))
    assert found == sorted(found)
    assert found[-1] < float((q @ k.mT).logsumexp(-1).sum())


def test_monarch_is_exact_where_the_blocks_of_attention_have_rank_one() -> None:
    """q_(l, j).k_(c, i) = x_(l, j).u_c + y_j.w_(c, i): the dependence on l and on i comes apart in every block."""
    stretches, size, v = 5, 8, torch.randn(1, 1, 40, 3)
    x, w = torch.randn(2, stretches, size, 4)
    y, u = torch.randn(size, 4), torch.randn(stretches, 4)
    q = torch.cat((x, y.expand(stretches, size, 4)), -1).view(1, 1, 40, 8)
    k = torch.cat((u[:, None].expand(stretches, size, 4), w), -1).view(1, 1, 40, 8)
    layer = Scatterbrain("monarch", Geometry(40, 1, 8), 0, rank=size, steps=1)
    torch.testing.assert_close(layer(q, k, v, None, 1.0), exact(q, k, v), atol=1e-5, rtol=1e-5)


def test_its_gradients_are_those_of_its_dense_matrix() -> None:
    q, k, v = torch.randn(3, 1, 1, 13, 4).unbind()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    layer = Scatterbrain("monarch", Geometry(13, 1, 4), 0, rank=4)
    dense = layer.low_rank.dense(q, k, None).float() @ v
    found, expected = (torch.autograd.grad(out.square().sum(), inputs) for out in (layer(q, k, v, None, 1.0), dense))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
