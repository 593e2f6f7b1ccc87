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
from .balanced import balanced
from .core import Factors, Landmarks
from .fused import strays
from .registry import Geometry, LowRank, register

JITTER = 1e-5  # on a diagonal of ones: landmarks that coincide share their weight
FAR = 4  # one landmark in FAR is a key that the centres do not reach; they keep single keys from spoiling all rows
REACH = 1.0  # where keys lie farther than 1 / sqrt(REACH) from their centre, in root mean square, the kernel is widened
LARGEST = 400.0  # squared length of a key: exp(LARGEST / 2) is safe in float64, and exp(LARGEST / 8) in float32
MOST = 1e30  # of a landmark's weight, finite in float32


class Found(NamedTuple):
    """What the landmarks make of keys; `own` and everything (…, n) is by key."""

    x: Tensor  # (B, H, n, directions) keys about their mean, zero at padding
    landmark: Tensor  # (B, H, m, directions)
    half: Tensor  # (B, H, m, 1) |l|^2 / 2
    gram: Tensor  # (B, H, m, m) G_ll + jitter; float64
    own: Tensor  # (B, H, n) the landmark that is the mean of this key and others
    members: Tensor  # (B, H, m, 1) own keys of each landmark
    longest: Tensor  # (B, H, 1, 1) length of the longest key
    to_query: Tensor  # (B, H, d, directions) y = q to_query

    def queries(self, q: Tensor) -> Tensor:
        """y, (B, H, rows, directions); few columns of many rows are faster as few rows."""
        return (self.to_query.mT @ q.float().mT).mT


@register("coreset")
class Coreset(LowRank):
    """`rank` landmarks a head: k-means centres after `steps` Lloyd steps, and a quarter of it where these leave keys farthest,
    all moved to the mean of their keys at last.

    `directions`: how many balanced coordinates are kept, those that queries and keys vary in most; all where it is 0.
    Bidirectional: the weights are those of all keys.
    """

    fitted = True
    rectangular = True

    to_query: Tensor  # (H, d, directions) P, found at calibration; the identity until then
    to_key: Tensor  # (H, d, directions) R

    def __init__(self, site: Geometry, seed: int, rank: int, steps: int = 4, directions: int = 0) -> None:
        super().__init__()
        if rank < 1 or steps < 0:
            raise SbpatchError(f"coreset needs a rank of at least 1 and steps of at least 0, not {rank} and {steps}")
        if not 0 <= directions <= site.head_dim:
            raise SbpatchError(f"coreset keeps 0 (all) to {site.head_dim} directions, not {directions}")
        if site.causal:
            raise SbpatchError("coreset weighs all keys, the future included, and cannot be causal; use blocks")
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

    def _landmarks(self, k: Tensor, key_mask: Tensor | None, scale: float = 1.0) -> Found:
        x = self._centred(k, key_mask, scale)
        seen, real = x.detach(), None if key_mask is None else key_mask[:, None]  # (B, 1, n)
        far = min(self.rank // FAR, x.shape[-2])
        centre = kmeans.lloyd(seen, key_mask, self.rank - far, self.steps)
        own, score = kmeans.nearest(seen, centre)
        square = seen.square().sum(-1)  # (B, H, n)
        distance = torch.sub(square, score, alpha=2).clamp_(min=0)  # squared
        if real is None:
            radius = distance.mean(-1, keepdim=True)
        else:
            distance = distance * real
            radius = distance.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
        length = square.amax(-1, keepdim=True)
        wide = torch.maximum(REACH * radius, length / LARGEST).clamp(min=1)  # (B, H, 1)
        width = wide.sqrt()[..., None]
        x, landmark = x / width, centre / width
        if far:  # by what is left of exp(x.x) beside the nearest centre, 1 - g(l, x)^2, as a pivoted Cholesky would
            left = square / wide + torch.expm1(-(distance / wide).clamp_(min=1e-9)).neg_().log_()
            if real is not None:
                left = left.masked_fill(~real, -torch.inf)
            index = left.topk(far, dim=-1).indices[..., None].expand(-1, -1, -1, x.shape[-1])
            landmark = torch.cat((landmark, x.gather(2, index)), dim=2)
            other, better = kmeans.nearest(x.detach(), landmark[:, :, -far:].detach())
            own = torch.where(better * wide > score, other + (self.rank - far), own)
        total = kmeans.sums(x, own, self.rank)  # x is 0 at padding
        count = kmeans.counts(own, self.rank, None if real is None else real.to(x.dtype))
        landmark = kmeans.means(total, count, landmark)
        half = landmark.square().sum(-1, keepdim=True) / 2
        longest = (length / wide).sqrt()[..., None]
        return Found(x, landmark, half, _gram(landmark), own, count, longest, self.to_query * (width * scale**0.5))

    def _centred(self, k: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        """x, (B, H, n, directions), about its mean and zero at padding."""
        to_key = (self.to_key.mT * scale**0.5).expand(k.shape[0], -1, -1, -1).flatten(0, 1)  # (B * H, directions, d)
        parts = kmeans.runs(k.shape[-2], k.shape[1] * k.shape[-1], k.device)
        x = torch.cat([torch.bmm(to_key, k[:, :, rows].flatten(0, 1).float().mT) for rows in parts], -1)
        x = x.unflatten(0, k.shape[:2])  # (B, H, directions, n)
        if key_mask is None:
            return (x - x.mean(-1, keepdim=True)).mT
        real = key_mask[:, None, None, :]
        mean = (x * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
        return ((x - mean) * real).mT

    def select(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, joined: bool
    ) -> Landmarks | Factors:
        """Multiply-adds of a head with p directions, `fused.over_landmarks` included: 2 n d p for the coordinates,
        n m (13 p / 4 + 2 e) for keys and queries (3 e where a row strays), 3/4 m of `kmeans.SAMPLE` m p in each Lloyd step, and
        m^3 / 3 + m^2 e to solve. Bytes beside the output: 4 n (p + 2), and about 8 `kmeans.ENTRIES`.
        """
        at = self._landmarks(k, key_mask, scale)
        if joined:
            return self._factors(at, q, k, key_mask, scale)
        own = at.own if key_mask is None else at.own.masked_fill(~key_mask[:, None], self.rank)
        return Landmarks(at.to_query, at.landmark, self._weights(at, v, key_mask), at.members, own)

    def _weights(self, at: Found, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """What each landmark weighs by Nystrom, with its own sum at the end: (B, H, m, e + 1)."""
        batch, heads, n, e = v.shape
        # l.x - |l|^2 / 2 is at most |l| longest - |l|^2 / 2, and |l|^2 / 2 at least for some key. Midway between them,
        # the largest is exp(+-LARGEST / 8), and float32 holds the sums
        shift = (2 * at.half.detach()).sqrt() * at.longest / 2  # cancels, so it needs no gradient
        bias, landmark, x = -(at.half + shift).flatten(0, 1), at.landmark.flatten(0, 1), at.x.flatten(0, 1)
        parts = []
        smooth = x.new_zeros(batch * heads, self.rank, e)
        for rows in kmeans.runs(n, heads * self.rank, x.device):
            spread = torch.baddbmm(bias, landmark, x[:, rows].mT).exp_()  # (B * H, m, rows)
            if key_mask is not None:
                spread = spread * key_mask[:, rows].repeat_interleave(heads, 0)[:, None]
            parts.append(spread.sum(-1, keepdim=True))
            smooth = torch.baddbmm(smooth, spread, v[:, :, rows].flatten(0, 1).float())
        smooth = torch.cat((smooth, torch.stack(parts).sum(0)), dim=-1)
        smooth = smooth.double().unflatten(0, (batch, heads)) * shift.double().exp()
        smooth = _solve(at.gram, smooth) * (-at.half).double().exp()
        return smooth.clamp(-MOST, MOST).float()

    def _factors(self, at: Found, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> Factors:
        """Beside a sparse part: the weights alternate in sign and are subtracted from, so in float64. Rows that stray from the
        clusters read, in place of their weights, which cluster each key is of.
        """
        log_spread, real, mean = _by_key(at, k, key_mask)
        top = log_spread.amax((-2, -1), keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0)  # all of it padding
        log_phi = at.queries(q) @ at.landmark.mT - at.half.mT
        shift = log_phi.amax(-1, keepdim=True)
        phi = (log_phi - shift).double().exp()  # (B, H, n, m)
        spread = (log_spread - top).double().exp().mT  # (B, H, n, m)
        height = (at.half - top).double().exp()  # (B, H, m, 1) exp(y.l) = phi height
        member = F.one_hot(at.own, self.rank).double() * real[..., None]  # (B, H, n, m)
        weight, level = _solve(at.gram, phi.mT).mT, phi * height.mT  # (B, H, n, m)
        wrong = strays(weight @ spread.sum(-2)[..., None], level @ member.sum(-2)[..., None])  # (B, H, n, 1)
        left = torch.cat((weight.masked_fill(wrong, 0), level.masked_fill(~wrong, 0)), dim=-1)
        return Factors(shift + top + scale * (q.float() @ mean.mT), left, torch.cat((spread, member), dim=-1))

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        at = self._landmarks(k, key_mask)
        log_spread, real, mean = _by_key(at, k, key_mask)
        height = (at.queries(q) @ at.landmark.mT + q.float() @ mean.mT).double().exp()  # (B, H, n, m)
        nystrom = height * (-at.half.mT).double().exp() @ torch.linalg.inv(at.gram) @ log_spread.double().exp()
        cluster = height.gather(-1, at.own[..., None, :].expand_as(nystrom)) * real[..., None, :]
        return torch.where(strays(nystrom.sum(-1, keepdim=True), cluster.sum(-1, keepdim=True)), cluster, nystrom)


def _by_key(at: Found, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """By key: log_spread, 1 for keys and 0 for padding, and the keys' mean.

    Returns:
        log g(l, x) exp(|x|^2 / 2) = l.x - |l|^2 / 2, (B, H, m, n), -inf at padding; (B, 1, n) float64; (B, H, 1, d).
    """
    log_spread = at.landmark @ at.x.mT - at.half
    real = torch.ones_like(k[:, :1, :, 0], dtype=torch.float64) if key_mask is None else key_mask[:, None].double()
    if key_mask is not None:
        log_spread = log_spread.masked_fill(~key_mask[:, None, None], -torch.inf)
    share = (real / real.sum(-1, keepdim=True).clamp(min=1)).float()
    return log_spread, real, share[..., None, :] @ k.float()


def _gram(landmark: Tensor) -> Tensor:
    """G_ll + jitter, (B, H, m, m) float64."""
    landmark = landmark.double()
    half = landmark.square().sum(-1, keepdim=True) / 2
    gram = (landmark @ landmark.mT - half - half.mT).exp()
    return gram + JITTER * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """gram^-1 right; without the check for NaN, which would wait for the device, as would `cholesky_solve` on a GPU."""
    if torch.compiler.is_exporting():
        return newton_inverse(gram) @ right
    factor = torch.linalg.cholesky_ex(gram)[0]
    if gram.is_cuda:
        half = torch.linalg.solve_triangular(factor, right, upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return torch.cholesky_solve(right, factor)


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
