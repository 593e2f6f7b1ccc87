"""Coordinates of queries and keys, found at calibration, in which few directions carry the logits."""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = 0.01  # nats, in root mean square, that a logit may lose to directions that are left out


def balanced(query: Tensor, key: Tensor, directions: int = 0) -> tuple[Tensor, Tensor]:
    """Coordinates y = P^T q of queries and x = R^T k of centred keys with y.x = q.k in which both have one covariance.

    As in the balanced truncation of control theory: with C_q^1/2 C_k^1/2 = U S V^T, P = C_q^-1/2 U S^1/2 and
    R = C_k^-1/2 V S^1/2. A direction that keys vary in and queries ignore shrinks, so no landmark is spent on it, and
    direction i adds y_i x_i to a logit, S_i in root mean square: the last ones can be left out.

    Args:
        query, key: their second moments C, (H, d, d) float64.
        directions: how many to keep; where 0, those that logits may not lose, in multiples of 8.

    Returns:
        P and R, (H, d, directions) float32.
    """
    (root_q, inverse_q), (root_k, inverse_k) = _roots(query), _roots(key)
    u, s, v = torch.linalg.svd(root_q @ root_k)
    scale = s.sqrt()[..., None, :]
    lost = s.square().flip(-1).cumsum(-1).flip(-1).sqrt().amax(0)  # (d,) without this direction and those after it
    needed = max(int((lost > NEGLIGIBLE).sum()), 1)
    kept = directions or min(-(-needed // 8) * 8, s.shape[-1])
    return (inverse_q @ u * scale)[..., :kept].float(), (inverse_k @ v.mT * scale)[..., :kept].float()


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """C^1/2 and C^-1/2 of a symmetric C (H, d, d), eigenvalues bounded below so that both exist."""
    values, vectors = torch.linalg.eigh(covariance)
    root = values.clamp(min=1e-6 * values[..., -1:].clamp(min=1e-30)).sqrt()[..., None, :]
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT
