"""Landmarks with Nystrom weights as the low-rank part: a few weighted points stand for all keys (arXiv 2302.02451, 2410.13736).

Queries and keys are first moved to coordinates in which both have the same covariance: q.k = y.x + q.mean, for y = P^T q and
x = R^T (k - mean), found at calibration (see `balanced`). In these, exp(y.x) is a Gaussian kernel g(a, b) = exp(-|a - b|^2 / 2)
up to factors of y and of x, and

    L_ij = exp(y_i.l - |l|^2 / 2) (G_ll + jitter)^-1 g(l, x_j) exp(|x_j|^2 / 2) exp(q_i.mean)    (sums over landmarks l)

is its Nystrom approximation. It interpolates between the landmarks where clusters are piecewise constant. Entries may be
negative, and a row of them wrong, so each row is checked against the clusters around the same landmarks: each is the mean of
its keys, so their sum, exp(y.l) for every key of l, never exceeds the exact one (Jensen). A row that falls below it, or rises
far above, is theirs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SbpatchError
from . import kmeans
from .core import Factors, Landmarks
from .fused import strays
from .registry import Geometry, LowRank, register

JITTER = 1e-5  # on a diagonal of ones: landmarks that coincide share their weight
FAR = 4  # one landmark in FAR is a key that the centres do not reach; they keep single keys from spoiling all rows
REACH = 1.0  # where keys lie farther than 1 / sqrt(REACH) from their centre, in root mean square, the kernel is widened
LARGEST = 600.0  # squared length of a key: exp(LARGEST / 2) is safe in float64
NEGLIGIBLE = 0.01  # nats, in root mean square, that a logit may lose to directions that are left out
TINY = torch.finfo(torch.float32).min


class Found(NamedTuple):
    """What the landmarks make of queries and keys; `own` and everything (…, n) is by key or query."""

    y: Tensor  # (B, H, n, directions) queries
    landmark: Tensor  # (B, H, m, directions)
    log_spread: Tensor  # (B, H, m, n) logarithm of g(l, x) exp(|x|^2 / 2) = exp(l.x - |l|^2 / 2); -inf at padding
    half: Tensor  # (B, H, m, 1) |l|^2 / 2
    gram: Tensor  # (B, H, m, m) G_ll + jitter; float64
    own: Tensor  # (B, H, n) the landmark that is the mean of this key and others
    real: Tensor  # (B, 1, n) 1 for keys, 0 for padding
    mean: Tensor  # (B, H, 1, d) of the keys
    top: Tensor  # (B, H, 1, 1) largest of log_spread, in whose scale sums are kept


@register("coreset")
class Coreset(LowRank):
    """`rank` landmarks a head: k-means centres after `steps` Lloyd steps, and a quarter of it where these leave keys farthest,
    all moved to the mean of their keys at last.

    `directions`: how many balanced coordinates are kept, those that queries and keys vary in most; all where it is 0.
    Bidirectional: the weights are those of all keys.
    """

    fitted = True

    to_query: Tensor  # (H, d, directions) P, found at calibration; the identity until then
    to_key: Tensor  # (H, d, directions) R

    def __init__(self, site: Geometry, seed: int, rank: int, steps: int = 4, directions: int = 0) -> None:
        super().__init__()
        if rank < 1 or steps < 0:
            raise SbpatchError(f"coreset needs a rank of at least 1 and steps of at least 0, not {rank} and {steps}")
        if not 0 <= directions <= site.head_dim:
            raise SbpatchError(f"coreset keeps 0 (all) to {site.head_dim} directions, not {directions}")
        if site.causal:
            raise SbpatchError("coreset weighs all keys, the future included, and cannot be causal; use clusters")
        self.rank, self.steps, self.directions, self.stored = rank, steps, directions, rank + 1.0
        eye = torch.eye(site.head_dim)[:, : directions or site.head_dim].repeat(site.heads, 1, 1)
        self.register_buffer("to_query", eye, persistent=False)
        self.register_buffer("to_key", eye.clone(), persistent=False)

    @classmethod
    def tried(cls, site: Geometry, entropy_ratio: float) -> str | None:
        return None if site.causal else "coreset"

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"rank": int(stored) - 1} if stored >= 2 else None

    def fit(self, query: Tensor, key: Tensor) -> dict[str, int]:
        """Take balanced coordinates, by second moments as `balanced` has them; returns how many directions were kept."""
        self.to_query, self.to_key = balanced(query, key, self.directions)
        return {"directions": self.to_key.shape[-1]}

    def _landmarks(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float = 1.0) -> Found:
        q, k = q.float(), k.float()
        n = k.shape[-2]
        real = torch.ones_like(k[:, :1, :, :1]) if key_mask is None else key_mask[:, None, :, None].float()
        total = real.sum(-2, keepdim=True).clamp(min=1)
        mean = (k * real).sum(-2, keepdim=True) / total
        to_key = self.to_key * scale**0.5
        y, x = q @ (self.to_query * scale**0.5), (k @ to_key - mean @ to_key) * real
        far = min(self.rank // FAR, n)
        centre = kmeans.lloyd(x.detach(), key_mask, self.rank - far, self.steps)
        _, distance = kmeans.nearest(x.detach(), centre)  # squared
        radius = (distance[..., None].clamp(min=0) * real).sum(-2, keepdim=True) / total
        length = x.detach().square().sum(-1, keepdim=True).amax(-2, keepdim=True)
        width = torch.maximum(REACH * radius, length / LARGEST).clamp(min=1).sqrt()
        x, y, landmark = x / width, y * width, centre / width
        hidden = real.mT == 0
        if far:  # by what is left of exp(x.x) beside the nearest centre, 1 - g(l, x)^2, as a pivoted Cholesky would
            left = -torch.expm1(-(distance / width.square()[..., 0]).clamp(min=1e-9))
            left = (x.square().sum(-1) + left.log()).masked_fill(hidden[..., 0, :], -torch.inf)
            index = left.topk(far, dim=-1).indices[..., None].expand(-1, -1, -1, x.shape[-1])
            landmark = torch.cat((landmark, x.gather(2, index)), dim=2)
        own, _ = kmeans.nearest(x.detach(), landmark.detach())
        real = real.squeeze(-1)
        landmark = kmeans.means(x, own, landmark, kmeans.counts(own, self.rank, real), real)
        half = landmark.square().sum(-1, keepdim=True) / 2
        log_spread = landmark @ x.mT - half
        if key_mask is not None:
            log_spread = log_spread.masked_fill(hidden, -torch.inf)
        top = log_spread.amax((-2, -1), keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0)  # all of it padding
        return Found(y, landmark, log_spread, half, _gram(landmark), own, real, mean, top)

    def select(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, joined: bool
    ) -> Landmarks | Factors:
        found = self._landmarks(q, k, key_mask, scale)
        return self._factors(found, q, scale) if joined else self._contracted(found, v)

    def _contracted(self, found: Found, v: Tensor) -> Landmarks:
        """Without a sparse part: the long sums in float32, only what is solved in float64."""
        y, landmark, log_spread, half, gram, own, real, _, top = found
        values = v.float()
        shift = log_spread.amax(-1, keepdim=True).clamp(min=TINY)
        spread = (log_spread - shift).exp()
        summed = torch.cat((spread @ values, spread.sum(-1, keepdim=True)), dim=-1)  # (B, H, m, e + 1)
        del spread
        nystrom = _solve(gram, summed.double() * (shift - top).double().exp())
        members = kmeans.sums(values, own, self.rank, real), kmeans.counts(own, self.rank, real)
        cluster = torch.cat(members, dim=-1).double() * (half - top).double().exp()
        both = torch.stack((nystrom, cluster))
        both = (both / both.abs().amax((0, -2, -1), keepdim=True).clamp(min=1e-300)).float()
        return Landmarks(y, landmark, half, torch.cat((both[0], both[1]), dim=-1))

    def _factors(self, found: Found, q: Tensor, scale: float) -> Factors:
        """Beside a sparse part: the weights alternate in sign and are subtracted from, so in float64. Rows that stray from the
        clusters read, in place of their weights, which cluster each key is of.
        """
        y, landmark, log_spread, half, gram, own, real, mean, top = found
        log_phi = _log_phi(y, landmark, half)
        shift = log_phi.amax(-1, keepdim=True)
        phi = (log_phi - shift).double().exp()  # (B, H, n, m)
        spread = (log_spread - top).double().exp().mT  # (B, H, n, m)
        height = (half - top).double().exp()  # (B, H, m, 1) exp(y.l) = phi height
        member = F.one_hot(own, self.rank).double() * real.double()[..., None]  # (B, H, n, m)
        weight, level = _solve(gram, phi.mT).mT, phi * height.mT  # (B, H, n, m)
        wrong = strays((weight @ spread.sum(-2)[..., None]), (level @ member.sum(-2)[..., None]))  # (B, H, n, 1)
        left = torch.cat((weight.masked_fill(wrong, 0), level.masked_fill(~wrong, 0)), dim=-1)
        return Factors(shift + top + scale * (q.float() @ mean.mT), left, torch.cat((spread, member), dim=-1))

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        y, landmark, log_spread, half, gram, own, real, mean, _ = self._landmarks(q, k, key_mask)
        phi = (_log_phi(y, landmark, half) + q.float() @ mean.mT).double().exp()
        nystrom = phi @ torch.linalg.inv(gram) @ log_spread.double().exp()
        cluster = (phi * half.mT.double().exp()).gather(-1, own[..., None, :].expand_as(nystrom)) * real[..., None, :]
        return torch.where(strays(nystrom.sum(-1, keepdim=True), cluster.sum(-1, keepdim=True)), cluster, nystrom)


def _log_phi(y: Tensor, landmark: Tensor, half: Tensor) -> Tensor:
    """y.l - |l|^2 / 2, (B, H, rows, m)."""
    return y @ landmark.mT - half.mT


def _gram(landmark: Tensor) -> Tensor:
    """G_ll + jitter, (B, H, m, m) float64."""
    landmark = landmark.double()
    half = landmark.square().sum(-1, keepdim=True) / 2
    gram = (landmark @ landmark.mT - half - half.mT).exp()
    return gram + JITTER * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """gram^-1 right; without the check for NaN, which would wait for the device."""
    if torch.compiler.is_exporting():
        return newton_inverse(gram) @ right
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(gram)[0])


def newton_inverse(gram: Tensor) -> Tensor:
    """Inverse of (…, m, m) with eigenvalues in [JITTER, m + JITTER], by products alone: ONNX knows no other way.

    X <- X (2 - G X) squares the error 1 - G X, which begins at 1 - JITTER / m at most (Schulz, 1933).
    """
    m = gram.shape[-1]
    two = 2 * torch.eye(m, dtype=gram.dtype, device=gram.device)
    found = two / (m + 2 * JITTER)
    for _ in range(math.ceil(math.log2(40 * m / JITTER))):
        found = found @ (two - gram @ found)
    return found


# -- coordinates, found at calibration -------------------------------------------------------------------------------


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
