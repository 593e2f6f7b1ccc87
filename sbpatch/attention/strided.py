"""Baselines: the same few keys for every query, at even strides or at random. On images they beat many a clever pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import Tiles
from .patterns import UNIT, mean_pairs, real_tokens, shared_keys
from .registry import Geometry, Sparse, register


@register("strided")
class Strided(Sparse):
    """`keys` tokens at even strides over those that are not padding, the first one included: j = t n / keys."""

    rectangular = True

    place: Tensor  # (keys,) int64, ascending, see real_tokens

    def __init__(self, site: Geometry, seed: int, keys: int) -> None:
        super().__init__()
        if keys < 1:
            raise SbpatchError(f"keys is {keys}; at least one must be read")
        self.heads, self.keys = site.heads, keys
        self.register_buffer("place", self._places(keys, seed), persistent=False)
        index, new = real_tokens(self.place, site.tokens, None)
        self.nnz = mean_pairs([shared_keys(index, new, site.tokens, site.heads)], site.causal)

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"keys": int(stored)} if stored >= 1 else None

    def _places(self, keys: int, seed: int) -> Tensor:
        return -(-torch.arange(keys) * UNIT // keys)  # rounded up, or t n / keys would come out one short

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> list[Tiles]:
        return [shared_keys(*real_tokens(self.place, k.shape[-2], key_mask), q.shape[-2], self.heads)]

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        n = k.shape[-2]
        pairs = torch.zeros(q.shape[0], 1, 1, n, dtype=torch.bool, device=q.device)
        for b in range(q.shape[0]):
            real = torch.arange(n) if key_mask is None else key_mask[b].nonzero()[:, 0]
            for t in self.place.tolist() if len(real) else ():
                pairs[b, ..., real[t * len(real) // UNIT]] = True
        return pairs
