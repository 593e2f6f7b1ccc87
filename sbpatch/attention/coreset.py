"""Landmarks with Nystrom weights as the low-rank part: a few weighted points stand for all keys (arXiv 2302.02451, 2410.13736).

Queries and keys are first moved to coordinates in which both have the same covariance: q.k = y.x + q.mean, for y = M^-T q and
x = M (k - mean). In these, exp(y.x) is a Gaussian kernel g(a, b) = exp(-|a - b|^2 / 2) up to factors of y and of x, and

    L_ij = exp(y_i.l - |l|^2 / 2) (G_ll + jitter)^-1 g(l, x_j) exp(|x_j|^2 / 2) exp(q_i.mean)    (sums over landmarks l)

is its Nystrom approximation from landmarks l, the centres of a k-means in the same coordinates. It interpolates between
landmarks where clusters are piecewise constant. Its entries may be slightly negative.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import SbpatchError
from . import kmeans
from .registry import Geometry, Summary, Tiles, register
from .tiles import take

JITTER = 1e-3  # on a diagonal of ones: coinciding landmarks share their weight
REACH = 4.0  # keys lie within 1 / sqrt(REACH) bandwidths of a landmark, in root mean square, or the bandwidth grows


@register("coreset")
class Coreset(nn.Module):
    """`rank` landmarks a head. Far more accurate than `clusters` where attention is flat, no worse where it is peaked.

    Bidirectional: the coordinates and the weights are those of all keys.
    """

    kind: ClassVar[Literal["low-rank"]] = "low-rank"

    def __init__(self, site: Geometry, seed: int, rank: int, steps: int = 2) -> None:
        super().__init__()
        if rank < 1 or steps < 0:
            raise SbpatchError(f"coreset needs a rank of at least 1 and steps of at least 0, not {rank} and {steps}")
        if site.causal:
            raise SbpatchError("coreset weighs all keys, the future included, and cannot be causal; use clusters")
        self.rank, self.steps, self.stored = rank, steps, rank + 1.0

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"rank": int(stored) - 1} if stored >= 2 else None

    def _features(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log phi (B, H, n, m), g(l, x) (B, H, m, n), |x|^2 / 2 (B, H, 1, n); (G_ll + jitter)^-1 (B, H, m, m) in float64.

        L = exp(log phi) (G_ll + jitter)^-1 g(l, x) exp(|x|^2 / 2).
        """
        q, k = q.float(), k.float()
        real = torch.ones_like(k[:, :1, :, :1]) if key_mask is None else key_mask[:, None, :, None].float()
        total = real.sum(-2, keepdim=True).clamp(min=1)
        mean = (k * real).sum(-2, keepdim=True) / total
        y, x = balanced(q, (k - mean) * real)
        centre = kmeans.lloyd(x.detach(), key_mask, self.rank, self.steps)
        _, distance = kmeans.nearest(x.detach(), centre)  # squared
        radius = (distance[..., None].clamp(min=0) * real).sum(-2, keepdim=True) / total
        width = (REACH * radius).clamp(min=1).sqrt()
        x, y, landmark = x / width, y * width, centre / width
        gram = _kernel(landmark.double(), landmark.double())
        inverse = torch.linalg.inv(gram + JITTER * torch.eye(self.rank, device=q.device))
        log_phi = y @ landmark.mT - landmark.square().sum(-1)[..., None, :] / 2 + q @ mean.mT
        return log_phi, _kernel(landmark, x) * real.mT, x.square().sum(-1)[..., None, :] / 2, inverse

    def summarise(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Summary:
        log_phi, kernel, half, inverse = self._features(q, k, key_mask)
        top = half.amax(-1, keepdim=True)
        shift = log_phi.amax(-1, keepdim=True)
        # the weights alternate in sign, and what the support covers is subtracted: float64 from here on, as in FAVOR+
        phi = (log_phi - shift).exp().double()  # (B, H, n, m)
        spread = (kernel * (half - top).exp()).double()  # (B, H, m, n)
        values = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1).double()
        sums = phi @ (inverse @ (spread @ values))
        weight = phi @ inverse

        def entries(tiles: Tiles) -> Tensor:
            return take(weight, tiles.query) @ take(spread.mT, tiles.key).mT

        return Summary(shift + top, sums[..., :-1], sums[..., -1:], entries)

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        log_phi, kernel, half, inverse = self._features(q, k, key_mask)
        return log_phi.double().exp() @ inverse @ kernel.double() * half.double().exp()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """exp(-|a - b|^2 / 2) for rows a (B, H, m, d) and b (B, H, n, d)."""
    return (a @ b.mT - a.square().sum(-1, keepdim=True) / 2 - b.square().sum(-1)[..., None, :] / 2).exp()


def balanced(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates y of queries and x of centred keys with y.x = q.k in which both have one covariance.

    As in the balanced truncation of control theory: with C_q^1/2 C_k^1/2 = U S V^T, y = S^1/2 U^T C_q^-1/2 q and
    x = S^1/2 V^T C_k^-1/2 k. A direction that keys vary in and queries ignore shrinks, so no landmark is spent on it.
    """
    (root_q, inverse_q), (root_k, inverse_k) = (
        _roots((x.mT @ x / x.shape[-2]).double()) for x in (q.detach(), k.detach())
    )
    u, s, v = torch.linalg.svd(root_q @ root_k)
    scale = s.sqrt()[..., None, :]
    return q @ (inverse_q @ u * scale).to(q.dtype), k @ (inverse_k @ v.mT * scale).to(k.dtype)


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """C^1/2 and C^-1/2 of a symmetric C (B, H, d, d), eigenvalues bounded below so that both exist."""
    values, vectors = torch.linalg.eigh(covariance)
    root = values.clamp(min=1e-6 * values[..., -1:].clamp(min=1e-30)).sqrt()[..., None, :]
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT
