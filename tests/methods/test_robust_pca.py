"""Principal component pursuit on planted matrices."""

from __future__ import annotations

import pytest
import torch

from sbpatch.attention.robust_pca import robust_pca
from sbpatch.errors import SbpatchError


def planted(rows: int, columns: int, rank: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    low = torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, columns, dtype=torch.float64)
    spikes = 10 * torch.randn(rows, columns, dtype=torch.float64)
    return low, spikes * (torch.rand(rows, columns) < share)


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "share"), [(80, 80, 4, 0.05), (60, 120, 3, 0.1), (120, 50, 2, 0.03)]
)
def test_planted_parts_are_recovered(rows: int, columns: int, rank: int, share: float) -> None:
    low, sparse = planted(rows, columns, rank, share)
    found = robust_pca(low + sparse)
    assert found.residual <= 1e-7
    assert (found.low_rank - low).norm() < 1e-4 * low.norm()
    assert (found.sparse - sparse).norm() < 1e-4 * sparse.norm()
    assert torch.linalg.matrix_rank(found.low_rank, rtol=1e-4) == rank
    assert torch.equal(found.sparse.abs() > 1e-3, sparse.abs() > 1e-3)


def test_a_dense_residue_is_not_recovered() -> None:
    """Beyond its conditions (half of the entries spiked) the guarantee ends, and the test above could fail."""
    low, sparse = planted(60, 60, 20, 0.5)
    assert (robust_pca(low + sparse).low_rank - low).norm() > 0.1 * low.norm()


def test_pure_matrices_stay_whole() -> None:
    low, sparse = planted(50, 50, 2, 0.05)
    assert robust_pca(low).sparse.norm() < 1e-4 * low.norm()
    assert robust_pca(sparse).low_rank.norm() < 1e-3 * sparse.norm()
    zero = robust_pca(torch.zeros(5, 7))
    assert (zero.residual, zero.low_rank.norm(), zero.sparse.norm()) == (0, 0, 0)


def test_a_larger_weight_gives_a_sparser_part() -> None:
    low, sparse = planted(50, 50, 5, 0.1)
    counts = [int((robust_pca(low + sparse, weight).sparse.abs() > 1e-6).sum()) for weight in (0.05, 0.3)]
    assert counts[0] > counts[1]


def test_it_stops_where_it_is_told() -> None:
    low, sparse = planted(50, 50, 5, 0.1)
    found = robust_pca(low + sparse, max_steps=3)
    assert found.steps == 3
    assert found.residual > 1e-7


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(2, 3, 3), torch.full((3, 3), torch.nan)])
def test_what_is_no_matrix_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(SbpatchError, match="one finite matrix"):
        robust_pca(bad)
