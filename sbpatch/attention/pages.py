"""Pages: beside the first tokens and a local window, each run of queries reads the stretches of the past that match it best.

Language models look far back for single things (a name, an open bracket), at places that no pattern knows. A page of
consecutive keys is ranked by its mean key, as in Quest (arXiv 2406.10774) and MInference (arXiv 2407.02490).
"""

from __future__ import annotations

import math
from bisect import bisect_right

import torch
from torch import Tensor, nn

from ..errors import SbpatchError
from .core import Stretches, lengthened
from .patterns import wider
from .registry import Geometry, Sparse, register


@register("pages")
class Pages(Sparse):
    """The first `first` tokens, the last `window` keys, and the `pages` best pages of `PAGE` keys before those.

    Tiles of `tile` consecutive queries share their pages, ranked by mean query . mean key, and the start of their window, so
    that no key falls between both. For causal sites; ranking computes n / (PAGE tile) scores a row, which are dropped at once.

    Multiply-adds a query and head: (d + e) (tile + window + first + pages PAGE). Each tile's keys and values are copied beside
    each other first, (d + e) numbers for each key of its list: the smaller the tile, the more of the time goes there.
    """

    PAGE = 16

    def __init__(self, site: Geometry, seed: int, window: int, pages: int, first: int = 4, tile: int = 16) -> None:
        super().__init__()
        if not site.causal:
            raise SbpatchError("pages look back in a causal sequence; use top-clusters or top-blocks here")
        if min(window, pages, first, tile) < 1:
            raise SbpatchError(
                f"pages need a window, pages, first and tile of at least 1, not {window}, {pages}, {first} and {tile}"
            )
        self.site, self.window, self.pages, self.first, self.near = site, window, pages, first, window
        self.tile = tile
        row = torch.arange(site.tokens)
        start = row // self.tile * self.tile
        low = (start - window + 1).clamp(min=0)  # where the window of the row's tile begins
        near = row + 1 - torch.maximum(low, torch.tensor(first)).clamp(max=site.tokens)
        behind = ((low // self.PAGE) - self._skipped).clamp(min=0, max=pages)  # whole pages before it
        self.nnz = float((near.clamp(min=0) + (row + 1).clamp(max=first) + behind * self.PAGE).float().mean())

    @property
    def _skipped(self) -> int:
        """Pages at the start that hold first tokens, and are not ranked."""
        return -(-self.first // self.PAGE)

    @classmethod
    def tried(cls, site: Geometry, entropy_ratio: float) -> str | None:
        return "pages" if site.causal else None

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        tile = max(16, 2 ** round(math.log2(site.tokens) / 2 - 1.5))  # 32 at 8,192 tokens, 64 at 32,768
        least = tile // 2 + 4 + cls.PAGE  # more keys near by, as tiles share their window, first tokens, and a page
        window = 64 if stored >= 64 + least else 8
        if not site.causal or stored < window + least:
            return None

        def pairs(pages: int) -> float:
            return cls(
                site, 0, window, pages, tile=tile
            ).nnz  # the count itself: early rows have fewer pages behind them

        pages = bisect_right(range(2, site.tokens // cls.PAGE + 1), stored, key=pairs) + 1
        return {"window": window, "pages": pages, "first": 4, "tile": tile}

    def longer(self, times: int) -> dict[str, int]:
        return {"window": self.window * times, "pages": self.pages * times, "tile": self.tile * wider(times)}

    def _best(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The best pages of each run of queries, and whether they may be read: twice (B, H, G, p)."""
        mean_q, _ = _means(q, self.tile, key_mask)
        mean_k, count = _means(k, self.PAGE, key_mask)
        run = torch.arange(mean_q.shape[2], device=q.device)[:, None] * self.tile
        page = torch.arange(mean_k.shape[2], device=q.device)
        whole = ((page + 1) * self.PAGE <= run - self.window + 1) & (page >= self._skipped)  # (G, P)
        score = (mean_q @ mean_k.mT).masked_fill(~whole | (count.mT == 0), -torch.inf)
        best, index = score.topk(min(self.pages, len(page)), dim=-1)
        return index, best > -torch.inf

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> list[Stretches]:
        n = q.shape[-2]
        index, good = self._best(q.detach().float(), k.detach().float(), key_mask)
        count = -(-n // self.PAGE)
        chosen = index.masked_fill(~good, count)
        return [Stretches(chosen, count, self.PAGE, self.tile, self.window - 1, self.first)]

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """Row by row: the first tokens, from the start of the run's window to the row, and the run's pages."""
        index, good = self._best(q.float(), k.float(), key_mask)
        n = q.shape[-2]
        out = torch.zeros(*q.shape[:2], n, n, dtype=torch.bool, device=q.device)
        for i in range(n):
            run = i // self.tile
            out[..., i, : self.first] = True
            out[..., i, max(0, run * self.tile - self.window + 1) : i + 1] = True
            for b in range(q.shape[0]):
                for h in range(q.shape[1]):
                    for page in index[b, h, run][good[b, h, run]].tolist():
                        out[b, h, i, page * self.PAGE : (page + 1) * self.PAGE] = True
        return out.tril()


def _means(x: Tensor, size: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means over runs of `size` tokens, padding left out: (B, H, G, d), and how many there were, (B or 1, 1, G, 1)."""
    over = -x.shape[-2] % size
    real = x.new_ones(1, x.shape[-2]) if mask is None else mask.to(x.dtype)
    count = nn.functional.pad(real, (0, over)).unflatten(1, (-1, size)).sum(2)[:, None, :, None]
    x = x if mask is None else x * real[:, None, :, None]
    return lengthened(x, over).unflatten(2, (-1, size)).sum(3) / count.clamp(min=1), count
