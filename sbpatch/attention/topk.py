"""The largest keys of each row: the best support of its size, and the bound that every retrieval is measured by."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import Tiles
from .registry import Geometry, Sparse, register


@register("topk")
class TopK(Sparse):
    """The `keys` largest logits of each query. An oracle for analysis: it forms the whole n x n matrix to find them."""

    analysis_only = True
    rectangular = True

    def __init__(self, site: Geometry, seed: int, keys: int) -> None:
        super().__init__()
        if keys < 1:
            raise SbpatchError(f"keys is {keys}; at least one must be read")
        self.keys, self.causal = keys, site.causal
        n, most = site.tokens, min(keys, site.tokens)
        self.nnz = most - most * (most - 1) / (2 * n) if site.causal else float(most)  # row i has i + 1 keys at most

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"keys": int(stored)} if stored >= 1 else None

    def _best(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """The best keys of each query, (B, H, n, keys); where a row has fewer, others that are not allowed."""
        logits = q.detach().float() @ k.detach().float().mT
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
        if self.causal:
            future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        return logits.topk(min(self.keys, k.shape[-2]), dim=-1).indices

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> list[Tiles]:
        key = self._best(q, k, key_mask)
        row = torch.arange(q.shape[-2], device=q.device)
        every = torch.ones(1, dtype=torch.bool, device=q.device).expand(*key.shape[:3], 1, key.shape[-1])
        return [Tiles(row[:, None], key, every, row)]

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        best = self._best(q, k, key_mask)
        return torch.zeros(*best.shape[:-1], k.shape[-2], dtype=torch.bool, device=q.device).scatter(-1, best, True)
