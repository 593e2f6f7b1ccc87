"""The best that sparse, low-rank, and sparse + low-rank approximations can do for a known matrix, at equal parameters.

An approximation of rank r has r (rows + columns) parameters, a sparse one its nonzero entries. Process 1 of the
Scatterbrain paper (arXiv 2110.15343) makes matrices for which theory says which of the three must win.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..progress import Progress, no_progress

SHARE = 1 / 8  # parameters of every approximation of a model's matrix over its entries
SPLITS = (0.25, 0.5, 0.75)  # of the parameters for the low-rank part; the best is taken
N = 256  # tokens of Process 1
# The paper fixes orders alone: clusters of O(1), d of log^(3/2) n, Delta of 1 / log^(1/4) n. With these constants centres lie
# far enough apart at this n: their squared length, about sqrt(d), is above the largest product of two of them.
PROCESS: dict[str, Any] = {
    "n": N,
    "cluster": 4,
    "width": round(16 * math.log(N) ** 1.5),
    "delta": 0.1 / math.log(N) ** 0.25,
}
PROCESS_SHARE = 1 / 32  # parameters over entries: 8 kept entries a row, or rank 4
EPSILON = 0.2  # relative error under which an approximation suffices
BETAS = 17


def relative(difference: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.matrix_norm(difference) / torch.linalg.matrix_norm(exact))


def largest_entries(matrix: Tensor, count: int) -> Tensor:
    """The best sparse approximation: `count` entries of largest magnitude, zero elsewhere."""
    flat = matrix.flatten()
    kept = flat.abs().topk(count).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view_as(matrix)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank, by the leading right singular vectors."""
    vectors = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, -rank:]
    return matrix @ vectors @ vectors.mT


def both_parts(matrix: Tensor, budget_rank: int, starts: Sequence[Tensor], steps: int = 6) -> tuple[float, float]:
    """Least error of sparse + low-rank with the parameters of `budget_rank`, over SPLITS, and the split that had it.

    From each start (a first guess of the low-rank part) the two parts are refitted in turn, each the best for the other.
    """
    found = []
    for split in SPLITS:
        rank = max(1, round(split * budget_rank))
        count = (budget_rank - rank) * sum(matrix.shape)
        for start in starts:
            low = truncated(start, rank)
            for _ in range(steps):
                sparse = largest_entries(matrix - low, count)
                low = truncated(matrix - sparse, rank)
            found.append((relative(matrix - low - largest_entries(matrix - low, count), matrix), split))
    return min(found)


def rank_for(rows: int, columns: int, share: float) -> int:
    """The rank whose parameters, rank (rows + columns), are at most `share` of the entries; at least 2, one a part."""
    return max(2, int(share * rows * columns) // (rows + columns))


def pure_errors(matrix: Tensor, budget_rank: int) -> dict[str, float]:
    return {
        "sparse_error": relative(matrix - largest_entries(matrix, budget_rank * sum(matrix.shape)), matrix),
        "low_rank_error": relative(matrix - truncated(matrix, budget_rank), matrix),
    }


# -- Process 1 -------------------------------------------------------------------------------------------------------


def process_queries(n: int, cluster: int, width: int, delta: float, seed: int) -> Tensor:
    """Q of Process 1, (n, width) float64: n / cluster centres of squared norm about sqrt(width), `cluster` tokens around each.

    Centres are N(0, I / sqrt(width)), what a token adds to its centre is N(0, delta I / sqrt(width)).
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n // cluster, 1, width, generator=generator, dtype=torch.float64)
    around = torch.randn(n // cluster, cluster, width, generator=generator, dtype=torch.float64)
    return ((centres + math.sqrt(delta) * around) / width**0.25).flatten(0, 1)


def process_sweep(seed: int, progress: Progress[Any] = no_progress, betas: int = BETAS) -> dict[str, Any]:
    """Errors of the three approximations to exp(beta Q Q^T), beta from 0.05 to 2 times ln n / sqrt(d).

    Squared norms are about sqrt(d), so that there exp(beta |q|^2) is n; `ratio` is beta over that. Each beta's regime is the
    simplest kind of approximation that suffices, by EPSILON: a single part where one does (the better one, where both do),
    else both parts together, else none.
    """
    q = process_queries(**PROCESS, seed=seed)
    product = q @ q.mT
    n = len(product)
    rank = rank_for(n, n, PROCESS_SHARE)
    rows = []
    for i in progress(range(betas), "process 1"):
        ratio = 0.05 * 40 ** (i / max(betas - 1, 1))
        beta = ratio * math.log(n) / math.sqrt(q.shape[-1])
        matrix = (beta * (product - product.max())).exp()  # its relative errors are those of exp(beta Q Q^T)
        errors = pure_errors(matrix, rank)
        errors["both_error"], split = both_parts(matrix, rank, [matrix])
        rows.append({"beta": beta, "ratio": ratio, **errors, "split": split, "regime": regime(errors)})
    return {**PROCESS, "rank": rank, "kept_per_row": 2 * rank, "epsilon": EPSILON, "rows": rows}


def regime(errors: dict[str, float]) -> str:
    sparse, low_rank, both = (errors[f"{name}_error"] for name in ("sparse", "low_rank", "both"))
    if min(sparse, low_rank) <= EPSILON:
        return "sparse" if sparse < low_rank else "low-rank"
    return "sparse + low-rank" if both <= EPSILON else "none"
