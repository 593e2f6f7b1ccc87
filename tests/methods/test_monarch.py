"""MonarchAttention: its objective, and attention that is a Monarch matrix."""

from __future__ import annotations

import pytest
import torch
from tiny import exact_attention

from sbpatch.attention import Geometry, Scatterbrain


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
    torch.testing.assert_close(layer(q, k, v, None, 1.0), exact_attention(q, k, v), atol=1e-5, rtol=1e-5)


def test_its_gradients_are_those_of_its_dense_matrix() -> None:
    q, k, v = torch.randn(3, 1, 1, 13, 4).unbind()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    layer = Scatterbrain("monarch", Geometry(13, 1, 4), 0, rank=4)
    dense = layer.low_rank.dense(q, k, None).float() @ v
    found, expected = (torch.autograd.grad(out.square().sum(), inputs) for out in (layer(q, k, v, None, 1.0), dense))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
