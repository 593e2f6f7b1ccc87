"""Local attention in tiles: all queries of a tile read the same stretch of keys, which one fused call can do.

    keys     ········[—— side ——|—— tile ——|—— side ——]········
    queries                     [—— tile ——]

A `window` centres on every query, and its tiles compute pairs that it then hides; here they count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import Tiles
from .patterns import blocks, mean_pairs
from .registry import Geometry, Sparse, register

LONG = 1024  # tokens from which `auto` tries it; below, a window of as many keys reaches farther


@register("local")
class Local(Sparse):
    """Tiles of `tile` queries read their own tokens and `side` keys on either side, on causal sites before them alone."""

    def __init__(self, site: Geometry, seed: int, side: int, tile: int = 128) -> None:
        super().__init__()
        if side < 0 or tile < 1:
            raise SbpatchError(
                f"local needs a side of at least 0 and a tile of at least 1 token, not {side} and {tile}"
            )
        self.side, self.tile, self.causal = side, tile, site.causal
        self.near = side + 1
        shape = torch.empty(1, 1, site.tokens, 1)
        self.nnz = mean_pairs(self.select(shape, shape, None, 1.0), site.causal)

    @classmethod
    def tried(cls, site: Geometry, entropy_ratio: float) -> str | None:
        return "local+clusters" if site.grid is None and not site.causal and site.tokens >= LONG else None

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        for tile in (128, 64, 32, 16):
            side = int(stored - tile / 2) if site.causal else int((stored - tile) / 2)
            if side >= tile // 4:
                return {"side": side, "tile": tile}
        return None

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> list[Tiles]:
        n = q.shape[-2]
        query, slot = blocks(-(-n // self.tile), self.tile, n, q.device)
        own = torch.arange(self.tile, device=q.device)
        before, after = (
            torch.arange(-self.side, 0, device=q.device),
            own[-1:] + 1 + torch.arange(self.side, device=q.device),
        )
        reach = torch.cat((own, before) if self.causal else (own, before, after))
        key = query[:, :1] + reach  # (T, L), may run out of the sequence at either end
        inside = (key >= 0) & (key < n)
        return [Tiles(query, key.clamp(0, n - 1), inside[:, None, :], slot, diagonal=self.causal)]

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        i = torch.arange(q.shape[-2], device=q.device)
        first = i // self.tile * self.tile
        before = i[None, :] >= first[:, None] - self.side
        return before & (i[None, :] < first[:, None] + self.tile + (0 if self.causal else self.side))
