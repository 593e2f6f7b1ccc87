"""Clustered keys as the low-rank part: exp(q.c[a(j)]) in place of exp(q.k_j), with c the mean of the cluster of key j.

Piecewise constant in the key, so the sum over keys needs only each cluster's count and value sum; a key that the sparse
part covers leaves both. By Jensen's inequality a cluster never weighs more than its keys do, so that step is safe.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SbpatchError
from . import kmeans
from .core import Points
from .registry import Geometry, LowRank, register


@register("clusters")
class Clusters(LowRank):
    """`rank` key clusters a head: strided starting centres, `steps` Lloyd steps, all in key space.

    Where k and v have fewer heads than q (grouped queries), each is clustered once and read by all queries of its group.
    Bidirectional: the clusters are those of all keys. Causal sites have `blocks`.
    """

    grouped = True
    rectangular = True
    learned = ("sharpness",)

    sharpness: Tensor  # of each key head a factor of q.c: means lie nearer to the origin than their keys

    def __init__(self, site: Geometry, seed: int, rank: int, steps: int = 2) -> None:
        super().__init__()
        if rank < 1 or steps < 0:
            raise SbpatchError(f"clusters need a rank of at least 1 and steps of at least 0, not {rank} and {steps}")
        self._refuse_causal(site)
        self.rank, self.steps, self.stored = rank, steps, rank + 1.0
        self.register_buffer("sharpness", torch.ones(site.heads // site.group), persistent=False)

    def _refuse_causal(self, site: Geometry) -> None:
        if site.causal:
            raise SbpatchError("clusters are those of all keys, the future included, and cannot be causal; use blocks")

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"rank": int(stored) - 1} if stored >= 2 else None

    def _centres(self, k: Tensor, key_mask: Tensor | None) -> Tensor:
        return kmeans.lloyd(k.detach(), key_mask, self.rank, self.steps)

    def _members(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cluster of each key, (B, H, n), and of each cluster what `kmeans.members` says."""
        return kmeans.nearest_members(k, v, self._centres(k, key_mask), key_mask)

    def select(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, joined: bool) -> Points:
        k, v = (x.float() if x.dtype == torch.float64 else x for x in (k, v))  # nothing is subtracted that needs more
        own, keys, values, count = self._members(k, v, key_mask)
        mean, value = (x / count.clamp(min=1) for x in (keys, values))
        return Points(mean * self._sharp(mean), value, count[..., 0], own)

    def _sharp(self, x: Tensor) -> Tensor:
        """The factors for the heads of x (B, H, ...), (H, 1, 1) in its dtype."""
        sharp = self.sharpness.to(x.dtype)
        return sharp.repeat_interleave(x.shape[1] // len(sharp))[:, None, None]

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        q = q.double() * self._sharp(q.double())
        k = k.float()
        member = F.one_hot(kmeans.nearest(k, self._centres(k, key_mask))[0], self.rank).double()  # (B, H, n, m)
        real = member if key_mask is None else member * key_mask[:, None, :, None]
        mean = real.mT @ k.double() / real.sum(-2).clamp(min=1)[..., None]
        return (q @ (member @ mean).mT).exp()
