"""Landmarks with Nystrom weights as the low-rank part: a few weighted points stand for all keys (arXiv 2302.02451, 2410.13736).

Queries and keys are first moved to coordinates in which both have the same covariance: q.k = y.x + q.mean, for y = M^-T q and
x = M (k - mean). In these, exp(y.x) is a Gaussian kernel g(a, b) = exp(-|a - b|^2 / 2) up to factors of y and of x, and

    L_ij = exp(y_i.l - |l|^2 / 2) (G_ll + jitter)^-1 g(l, x_j) exp(|x_j|^2 / 2) exp(q_i.mean)    (sums over landmarks l)

is its Nystrom approximation. It interpolates between the landmarks where clusters are piecewise constant. Entries may be
negative, and a row of them wrong, so each row is checked against the clusters around the same landmarks: their sum,
exp(y.l) for every key of l, never exceeds the exact one by much (Jensen), and where it says otherwise the row is theirs.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import SbpatchError
from . import kmeans
from .registry import Geometry, Summary, Tiles, register
from .tiles import columns, take

JITTER = 1e-3  # on a diagonal of ones: landmarks that coincide share their weight
FAR = 4  # one landmark in FAR is a key that the centres do not reach; they keep single keys from spoiling all rows
REACH = 2.0  # where keys lie farther than 1 / sqrt(REACH) from their centre, in root mean square, the kernel is widened
LARGEST = 600.0  # squared length of a key: exp(LARGEST / 2) is safe in float64
LOW, HIGH = 0.9, 4.0  # Nystrom row sum over cluster row sum, outside of which the clusters are believed


class Landmarks(NamedTuple):
    """What the landmarks make of queries and keys; `own` and everything (…, n) is by key or query."""

    log_phi: Tensor  # (B, H, n, m) y.l - |l|^2 / 2 + q.mean
    half: Tensor  # (B, H, m, 1) |l|^2 / 2
    spread: Tensor  # (B, H, m, n) g(l, x) exp(|x|^2 / 2 - top), zero at padding; float64
    inverse: Tensor  # (B, H, m, m) (G_ll + jitter)^-1; float64
    own: Tensor  # (B, H, n) nearest landmark of each key
    real: Tensor  # (B, 1, n, 1) 1 for keys, 0 for padding
    top: Tensor  # (B, H, 1, 1) largest |x|^2 / 2


@register("coreset")
class Coreset(nn.Module):
    """`rank` landmarks a head: k-means centres after `steps` Lloyd steps, and a quarter of it the keys they leave farthest.

    Several times as accurate as `clusters` where attention is flat, and somewhat where it is peaked, at about three times
    the time. Bidirectional: the coordinates and the weights are those of all keys.
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

    def _landmarks(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Landmarks:
        q, k = q.float(), k.float()
        n = k.shape[-2]
        real = torch.ones_like(k[:, :1, :, :1]) if key_mask is None else key_mask[:, None, :, None].float()
        total = real.sum(-2, keepdim=True).clamp(min=1)
        mean = (k * real).sum(-2, keepdim=True) / total
        y, x = balanced(q, (k - mean) * real)
        far = min(self.rank // FAR, n)
        centre = kmeans.lloyd(x.detach(), key_mask, self.rank - far, self.steps)
        _, distance = kmeans.nearest(x.detach(), centre)  # squared
        radius = (distance[..., None].clamp(min=0) * real).sum(-2, keepdim=True) / total
        length = x.detach().square().sum(-1, keepdim=True).amax(-2, keepdim=True)
        width = torch.maximum(REACH * radius, length / LARGEST).clamp(min=1).sqrt()
        x, y, landmark = x / width, y * width, centre / width
        square = x.square().sum(-1)  # (B, H, n)
        kernel = _kernel(landmark, x)
        if far:  # by what is left of exp(x.x) beside the centres, as a pivoted Cholesky would
            left = 1 - (_inverse(landmark).float() @ kernel * kernel).sum(-2)
            left = (square + left.clamp(min=1e-9).log()).masked_fill(real.squeeze(-1) == 0, -torch.inf)
            index = left.topk(far, dim=-1).indices[..., None].expand(-1, -1, -1, x.shape[-1])
            landmark = torch.cat((landmark, x.gather(2, index)), dim=2)
            kernel = torch.cat((kernel, _kernel(landmark[:, :, -far:], x)), dim=2)
        own, _ = kmeans.nearest(x.detach(), landmark.detach())
        half = landmark.square().sum(-1, keepdim=True) / 2
        top = square.amax(-1)[..., None, None] / 2
        spread = kernel.double() * (square[..., None, :] / 2 - top).double().exp() * real.mT
        return Landmarks(y @ landmark.mT - half.mT + q @ mean.mT, half, spread, _inverse(landmark), own, real, top)

    def summarise(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Summary:
        log_phi, half, spread, inverse, own, real, top = self._landmarks(q, k, key_mask)
        # the weights alternate in sign, and what the support covers is subtracted: in float64, as in FAVOR+
        shift = log_phi.amax(-1, keepdim=True)
        phi = (log_phi - shift).double().exp()  # (B, H, n, m)
        values = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1).double()
        height = (half - top).double().exp()  # (B, H, m, 1) exp(y.l) = phi height
        nystrom = phi @ (inverse @ (spread @ values))
        cluster = phi @ (height * kmeans.sums(values, own, height.shape[-2], real.squeeze(-1).double()))
        wrong = _wrong(nystrom[..., -1:], cluster[..., -1:])  # (B, H, n, 1)
        sums = torch.where(wrong, cluster, nystrom)
        weight, level = phi @ inverse, phi * height.mT

        def entries(tiles: Tiles) -> Tensor:
            smooth = take(weight, tiles.query) @ take(spread.mT, tiles.key).mT
            constant = columns(take(level, tiles.query), take(own[..., None], tiles.key).squeeze(-1))
            return torch.where(take(wrong, tiles.query), constant, smooth)

        return Summary(shift + top, sums[..., :-1], sums[..., -1:], entries)

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        log_phi, half, spread, inverse, own, real, top = self._landmarks(q, k, key_mask)
        phi = log_phi.double().exp()
        nystrom = phi @ inverse @ (spread * top.double().exp())
        cluster = (phi * half.mT.double().exp()).gather(-1, own[..., None, :].expand_as(nystrom)) * real.mT
        return torch.where(_wrong(nystrom.sum(-1, keepdim=True), cluster.sum(-1, keepdim=True)), cluster, nystrom)


def _wrong(nystrom: Tensor, cluster: Tensor) -> Tensor:
    return (nystrom < LOW * cluster) | (nystrom > HIGH * cluster)


def _inverse(landmark: Tensor) -> Tensor:
    """(G_ll + jitter)^-1, (B, H, m, m) float64."""
    gram = _kernel(landmark.double(), landmark.double())
    return torch.linalg.inv(gram + JITTER * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))


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
