"""Robust PCA: the sparse + low-rank split of a given matrix, as an oracle for analysis (Candes et al., arXiv 0912.3599)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SbpatchError


class Decomposition(NamedTuple):
    """matrix = low_rank + sparse, up to `residual`, the relative Frobenius norm of what is left after `steps`."""

    low_rank: Tensor
    sparse: Tensor
    residual: float
    steps: int


def robust_pca(
    matrix: Tensor, sparsity: float | None = None, tolerance: float = 1e-7, max_steps: int = 500
) -> Decomposition:
    """Principal component pursuit, min |L|_* + sparsity |S|_1 with L + S = matrix, by the inexact augmented Lagrangian.

    Every step thresholds the singular values and then the entries (Lin et al., arXiv 1009.5055), in float64. With
    sparsity = 1 / sqrt(max(rows, columns)), the default, it recovers any L of moderate rank that is not itself sparse and
    any S with few entries in random places, exactly and with no knowledge of either.

    Args:
        matrix: (rows, columns), for instance one head's attention. It is decomposed whole, cost rows x columns^2 a step.
        sparsity: weight of S against L; larger gives a sparser S.

    Raises:
        SbpatchError: not a finite matrix of two dimensions.
    """
    if matrix.ndim != 2 or not matrix.isfinite().all():
        raise SbpatchError(
            f"robust PCA takes one finite matrix, not shape {tuple(matrix.shape)} with infinities or NaNs"
        )
    m = matrix.double()
    scale = float(torch.linalg.matrix_norm(m))
    if scale == 0:
        return Decomposition(m, m.clone(), 0.0, 0)
    weight = 1 / math.sqrt(max(m.shape)) if sparsity is None else sparsity
    spectral = float(torch.linalg.matrix_norm(m, 2))
    dual = m / max(spectral, float(m.abs().max()) / weight)
    penalty, largest = 1.25 / spectral, 1.25e7 / spectral
    low, sparse = torch.zeros_like(m), torch.zeros_like(m)
    step, residual = 0, 1.0
    while step < max_steps and residual > tolerance:
        step += 1
        u, s, v = torch.linalg.svd(m - sparse + dual / penalty, full_matrices=False)
        low = u * (s - 1 / penalty).clamp(min=0) @ v
        rest = m - low + dual / penalty
        sparse = rest.sign() * (rest.abs() - weight / penalty).clamp(min=0)
        gap = m - low - sparse
        dual = dual + penalty * gap
        penalty = min(1.5 * penalty, largest)
        residual = float(torch.linalg.matrix_norm(gap)) / scale
    return Decomposition(low, sparse, residual, step)
