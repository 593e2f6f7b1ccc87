"""Blocks of the past, for causal sites: the best ones read exactly, each of the others as one point.

    |░░░░|░░░░|▓▓▓▓|░░░░|▓▓▓▓|░░░░|────────|■■■■■■■■|     the sequence as one tile of queries (■) reads it
     └first       └ exact      └ as points  └ near  └ tile

A tile ranks the blocks before its near keys by mean query . mean key, as Quest (arXiv 2406.10774) ranks pages, and reads the
`blocks` best exactly. A point is not the mean of its block: it is weighed by what the tile's mean query finds in the block
(expansion.py), so that a single key that stands out is not lost among its neighbours, and blocks need no sorting by content.
Query heads that share keys may share tiles. Nothing is looked up pair by pair, nothing is moved: a block is a stretch of keys.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SbpatchError
from . import kernels
from .core import Expansion, Selection, lengthened, repeated
from .patterns import wider
from .registry import Geometry, Joined, register

FIRST = 4
SHORTEST = 8  # tokens of a tile
SHAPES = ((1, 0.67), (2, 0.0))  # blocks to a tile, and how much of what is read exactly outside the tile is near it


def _best_tile(n: int, group: int) -> int:
    """The power of two next to the least of tile / 2 + n / 2 tile + n / (2 tile group): own keys, points, their weighing."""
    return 2 ** round(math.log2(n * (1 + 1 / group)) / 2)


@register("blocks")
class Blocks(Joined):
    """Tiles of `tile` queries read `first` tokens, the `near` keys before them, `blocks` blocks of `block` keys, and points.

    Within a tile, later queries take part in choosing and weighing the blocks for earlier ones; where tiles are `shared`, so do
    the other query heads of the same keys. Heads that look for different things lose by that, and have tiles of their own.

    Multiply-adds a query and head: (d + e) (tile + near + first + blocks block + m), m the points, n / 2 block on average.
    Besides, for the points (2 d + e) n / 2 tile of each head of keys.
    """

    def __init__(
        self,
        site: Geometry,
        seed: int,
        near: int,
        block: int,
        blocks: int,
        first: int = FIRST,
        tile: int = 64,
        shared: int = 1,
    ) -> None:
        super().__init__()
        if not site.causal:
            raise SbpatchError("blocks look back in a causal sequence; use clusters or top-clusters here")
        if min(block, tile) < 1 or min(near, blocks, first) < 0:
            raise SbpatchError(
                f"blocks need a block and tile of at least 1 token, not {block} and {tile}, and at least 0 near keys, "
                f"blocks and first tokens, not {near}, {blocks} and {first}"
            )
        if tile % block or near % block:
            raise SbpatchError(f"a tile of {tile} and {near} near keys are not whole numbers of blocks of {block}")
        self.before, self.block, self.blocks, self.first, self.tile = near, block, blocks, first, tile
        self.grouped, self.group = bool(shared), site.group if shared else 1
        row = torch.arange(site.tokens)
        start = row // tile * tile
        low = (start - near).clamp(min=0)  # where the keys near the row's tile begin
        past = low // block
        exact = past.clamp(max=blocks)
        self.nnz = float((row + 1 - low + low.clamp(max=first) + exact * block).float().mean())
        self.rank = self._count(site.tokens)
        weighed = low / (tile * self.group)  # logits of the tile's mean query, shared out among its rows
        self.stored = float((past - exact + weighed).mean()) + 1.0

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        found = cls.variants(stored, site)
        return found[0] if found else None

    @classmethod
    def variants(cls, stored: float, site: Geometry) -> list[dict[str, int]]:
        if not site.causal:
            return []
        found: list[dict[str, int]] = []
        for group in dict.fromkeys((site.group, 1)):
            size = {"first": FIRST, "tile": _best_tile(site.tokens, group)} | (
                {} if group == site.group else {"shared": 0}
            )
            sized: list[dict[str, int]] = []
            while size["tile"] >= SHORTEST and not (sized := cls._shapes(stored, site, size)):
                size["tile"] //= 2
            found += sized
        return sorted(found, key=lambda size: -size["near"] - size["blocks"] * size["block"])  # most keys read exactly

    @classmethod
    def _shapes(cls, stored: float, site: Geometry, size: dict[str, int]) -> list[dict[str, int]]:
        """Settings of about that size, of one tile; none where it cannot be that small."""
        found = []
        for part, near in SHAPES:
            block = size["tile"] // part
            fixed = cls(site, 0, near=0, block=block, blocks=0, **size)
            whole = int((stored - fixed.nnz - fixed.stored) / (block - 1))  # one read exactly is one point less
            beside = round(near * whole)
            if whole > 0:
                found.append(size | {"near": beside * block, "block": block, "blocks": whole - beside})
        return found

    def longer(self, times: int) -> dict[str, int]:
        """As many times the keys near and in blocks. Tiles and blocks grow with the root of the length alone, as `_best_tile`
        does, and what a tile then reads less of itself and of the first tokens it reads near it.
        """
        grown = wider(times)
        block = self.block * grown
        less = self.tile * (times - grown) // 2 + self.first * (times - 1)
        near = self.before * times + math.ceil(less / block) * block
        return {"near": near, "block": block, "blocks": self.blocks * times // grown, "tile": self.tile * grown}

    @classmethod
    def tried(cls, site: Geometry, entropy_ratio: float) -> str | None:
        return "blocks" if site.causal else None

    def _count(self, n: int) -> int:
        """How many blocks lie before the near keys of the last tile."""
        return max((n - 1) // self.tile * self.tile - self.before, 0) // self.block

    # -- what is read ------------------------------------------------------------------------------------------------

    def _about(self, q: Tensor, key_heads: int, key_mask: Tensor | None, scale: float) -> Tensor:
        """`scale` times the mean query of each tile, over the heads that share keys, (B, H_k, T, d)."""
        if kernels.chosen(q):
            from .kernels.blocks import stretch_means

            return stretch_means(q, key_mask, self.tile, key_heads, 0, scale)[0]
        n, split = q.shape[2], (-1, self.tile)
        if key_mask is not None:
            q = q * key_mask[:, None, :, None]
        over = -n % self.tile
        real = (q.new_ones(1, n) if key_mask is None else key_mask).float()
        summed = lengthened(q, over).unflatten(2, split).float().sum(3).unflatten(1, (key_heads, -1)).sum(2)
        count = F.pad(real, (0, over)).unflatten(1, split).sum(2)[:, None, :, None] * (q.shape[1] // key_heads)
        return summed / count.clamp(min=1) * scale

    def _expansion(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Expansion:
        shape = (self._count(k.shape[2]), self.block)
        used = shape[0] * self.block  # the latest keys are near, or in the tile itself
        key, value = (x[:, :, :used].unflatten(2, shape) for x in (k, v))
        about = self._about(q, k.shape[1], key_mask, scale)
        low = Expansion(key, value, about, about, self.tile, self.before, self.first, key_mask)
        return low._replace(exact=self._best(low))

    def _best(self, low: Expansion) -> Tensor:
        """The best blocks of those before each tile's near keys, best first, (B, H, T, blocks); m where there are too few."""
        key, count = low.key.detach(), low.key.shape[2]
        if kernels.chosen(key) and 0 < count <= kernels.MOST_BLOCKS:
            from .kernels.blocks import best_blocks, stretch_means

            mean, keys = stretch_means(key.flatten(2, 3), low.key_mask, self.block, key.shape[1], self.first, 1.0)
            return best_blocks(
                low.about.detach(), mean, keys, min(self.blocks, count), self.tile, self.before, self.block
            )
        valid = low.valid()
        share = valid / valid.sum(-1, keepdim=True).clamp(min=1)
        mean = (share[..., None, :].to(key.dtype) @ key).squeeze(3).float()  # (B, H, m, d)
        score = low.about.detach() @ mean.mT
        late = torch.arange(count, device=key.device) >= low.counts()[:, None]
        score = score.masked_fill(late | ~valid.any(-1)[:, :, None], -torch.inf)
        best, index = score.topk(min(self.blocks, count), dim=-1)
        return index.masked_fill(best == -torch.inf, count)

    def select(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Selection:
        return Selection([], self._expansion(q, k, v, key_mask, scale))

    # -- the definition ----------------------------------------------------------------------------------------------

    def pairs(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """Row by row: the first tokens, the near keys, and the blocks that the row's tile ranks best."""
        n = q.shape[-2]
        one = k[:, :: self.group]
        out = torch.zeros(*q.shape[:2], n, n, dtype=torch.bool, device=q.device)
        low = self._expansion(q, one, one, key_mask, 1.0)
        best = repeated(low.exact, q.shape[1])
        for i in range(n):
            out[..., i, : self.first] = True
            out[..., i, max(i // self.tile * self.tile - self.before, 0) : i + 1] = True
            for b, h in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
                for block in best[b, h, i // self.tile].tolist():
                    if block < low.key.shape[2]:
                        out[b, h, i, block * self.block : (block + 1) * self.block] = True
        return out.tril()

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """L_ij = p_j exp(q_i.k' + H(p)) for the keys j of a block, p = softmax over the block of q'.k_j (see expansion.py)."""
        n = q.shape[-2]
        out = torch.zeros(*q.shape[:2], n, n, dtype=torch.float64, device=q.device)
        one = k[:, :: self.group]
        low = self._expansion(q, one, one, key_mask, 1.0)
        about, key = repeated(low.about, q.shape[1]).double(), k.double()
        for t, count in enumerate(low.past):
            rows = slice(t * self.tile, (t + 1) * self.tile)
            for m in range(count):
                keys = slice(m * self.block, (m + 1) * self.block)
                hidden = ~low.valid()[:, :, m]  # (1 or B, 1, c)
                logits = (key[:, :, keys] @ about[:, :, t, :, None]).squeeze(-1).masked_fill(hidden, -torch.inf)
                p = logits.softmax(-1).nan_to_num(0.0)  # (B, H, c)
                point = (p[..., None] * key[:, :, keys]).sum(2, keepdim=True)
                weight = (q[:, :, rows].double() @ point.mT) + torch.special.entr(p).sum(-1)[..., None, None]
                out[:, :, rows, keys] = weight.exp() * p[:, :, None]
        return out
