"""Pooled keys as the low-rank part: clusters by position, as in Linformer's mean pooling (arXiv 2006.04768) and MRA's blocks.

Linformer learns its projection of the tokens; nothing can be learnt here, so it is the mean over stretches of the sequence,
or over rectangles of the image. A pool weighs exp(q.mean + ln(count)), and a covered key leaves its pool, as in `clusters`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SbpatchError
from . import kmeans
from .clusters import Clusters
from .core import Points
from .registry import Geometry, register


@register("pooling")
class Pooling(Clusters):
    """At most `rank` pools: equal stretches, or equal rectangles on a grid and one more pool for the class tokens.

    On causal sites a query reads the pools that ended before its own began; its own it reads through the window.
    """

    def __init__(self, site: Geometry, seed: int, rank: int) -> None:
        super().__init__(site, seed, rank, steps=0)
        self.causal = site.causal
        if site.grid is not None and rank <= min(1, site.prefix):
            raise SbpatchError(f"pooling needs a rank of at least 2 beside class tokens, not {rank}")
        self.site = site
        self.unread = math.ceil(site.tokens / rank)  # the longest pool

    def _refuse_causal(self, site: Geometry) -> None:
        pass  # pools are stretches of the sequence, and a query reads those that are over

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"rank": int(stored) - 1} if stored >= 3 else None

    def pools(self, n: int, device: torch.device) -> Tensor:
        """The pool of each token, (n,)."""
        if self.site.grid is None:
            return torch.arange(n, device=device) * min(self.rank, n) // n
        if n != self.site.tokens:
            raise SbpatchError(
                f"pooling was calibrated for {self.site.tokens} tokens and got {n}; calibrate at this size"
            )
        rows, cols = self.site.grid
        most = self.rank - min(1, self.site.prefix)
        high = max(1, min(rows, most, round(math.sqrt(most * rows / cols))))
        wide = min(cols, most // high)
        row, col = torch.arange(rows, device=device) * high // rows, torch.arange(cols, device=device) * wide // cols
        patches = (row[:, None] * wide + col).flatten()
        return torch.cat((patches.new_full((self.site.prefix,), high * wide), patches))

    def _members(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = self.pools(k.shape[-2], k.device).expand(*k.shape[:3])
        return own, *kmeans.members(k, v, own, self.rank, key_mask)

    def select(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, joined: bool) -> Points:
        points = super().select(q, k, v, key_mask, scale, joined)
        if not self.causal:
            return points
        own, past = self.pools(k.shape[-2], k.device), torch.arange(self.rank, device=k.device)
        return points._replace(ready=(own[:, None] <= past).sum(0))  # after the last token of each pool

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        q, pool = q.double() * self._sharp(q.double()), self.pools(k.shape[-2], k.device)
        together = (pool[:, None] == pool).double()  # (n, n)
        keep = torch.ones_like(k[:, :1, :, 0]) if key_mask is None else key_mask[:, None]
        share = together * keep[..., None, :]
        mean = share @ k.double() / share.sum(-1, keepdim=True).clamp(min=1)  # of each key's own pool
        entries = (q @ mean.mT).exp()
        return entries * (pool < pool[:, None]) if self.causal else entries
