"""Longformer's pattern: a local window, and global tokens that read all keys and are read by all (arXiv 2004.05150)."""

from __future__ import annotations

import torch
from torch import Tensor

from .core import Tiles
from .registry import Geometry, register
from .sinks import Sinks


@register("longformer")
class Longformer(Sinks):
    """The `window` keys around each query; the first `first` tokens, class tokens among them, are the global ones."""

    @classmethod
    def tried(cls, site: Geometry, entropy_ratio: float) -> str | None:
        return None

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        first = max(1, site.prefix, int(stored / 16))  # stored twice: as keys of all and as queries over all
        return {"window": int(stored) - 2 * first, "first": first} if stored >= 2 * first + 1 else None

    def _fixed(self, n: int, device: torch.device) -> list[Tiles]:
        (local,) = super()._fixed(n, device)
        local = local._replace(valid=local.valid & (local.query >= self.first)[..., None])
        # the global queries have a round of their own; all others point at its last slot, which reads nothing
        first = torch.arange(min(self.first, n) + 1, device=device)
        keys = torch.arange(n, device=device)
        reads = (first < self.first) & (first < n)
        valid = reads[:, None].expand(-1, n)
        rows = Tiles(first.clamp(max=n - 1)[None], keys[None], valid[None], keys.clamp(max=len(first) - 1))
        return [local, rows]

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        return super().dense(q, k, key_mask) | (torch.arange(q.shape[-2], device=q.device) < self.first)[:, None]
