"""Top blocks: each block of queries reads exactly the key blocks that suit it best, by block means (MRA, arXiv 2207.10284).

With pooled keys as the low-rank part this is MRA-2, under the name `mra2`. MRA takes the best pairs of blocks of the whole
matrix; here each query block takes equally many, so that shapes do not depend on the data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import Tiles, take
from .registry import Geometry, Sparse, register


@register("top-blocks")
class TopBlocks(Sparse):
    """The `blocks` best key blocks for each query block, its own always among them.

    Blocks are `block` consecutive tokens, or squares of about as many patches on a grid; class tokens have blocks of their
    own. A query block ranks key blocks by q.k of the means plus ln(count), over the past where the site is causal.
    """

    def __init__(self, site: Geometry, seed: int, blocks: int, block: int = 16) -> None:
        super().__init__()
        if blocks < 1 or block < 1:
            raise SbpatchError(f"top-blocks needs at least one block of at least one token, not {blocks} of {block}")
        self.site, self.blocks, self.block = site, blocks, block
        size = (self._table(site.tokens, torch.device("cpu"))[0] < site.tokens).sum(-1)  # (G,)
        index = torch.arange(len(size))
        if site.causal:  # its own triangle, and as many whole blocks of the past as there are
            pairs = size * (size + 1) / 2 + size * index.clamp(max=blocks - 1) * block
        else:  # whole blocks; on a grid that squares do not tile it is less
            pairs = size * min(blocks * int(size.max()), site.tokens)
        self.nnz = float(pairs.sum() / site.tokens)

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        block = 16 if stored >= 32 else 4
        return {"blocks": int(stored / block), "block": block} if stored >= block else None

    def _table(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens of each block (G, b), n in empty slots; and where each token lies in it, (n,)."""
        if self.site.grid is None:
            index = (
                torch.arange(math.ceil(n / self.block) * self.block, device=device).clamp(max=n).view(-1, self.block)
            )
            return index, torch.arange(n, device=device)
        if n != self.site.tokens:
            raise SbpatchError(
                f"top-blocks was calibrated for {self.site.tokens} tokens and got {n}; calibrate at this size"
            )
        (rows, cols), prefix, side = self.site.grid, self.site.prefix, max(1, math.isqrt(self.block))
        high, wide = math.ceil(rows / side), math.ceil(cols / side)
        patch = torch.full((high * side, wide * side), n, device=device)
        patch[:rows, :cols] = prefix + torch.arange(rows * cols, device=device).view(rows, cols)
        squares = patch.view(high, side, wide, side).transpose(1, 2).reshape(high * wide, side * side)
        first = torch.full((math.ceil(prefix / side**2) * side**2,), n, device=device)
        first[:prefix] = torch.arange(prefix, device=device)
        index = torch.cat((first.view(-1, side * side), squares))
        slot = torch.empty(n + 1, dtype=torch.long, device=device)
        slot[index.flatten()] = torch.arange(index.numel(), device=device)
        return index, slot[:n]

    def _best(self, q: Tensor, k: Tensor, key_mask: Tensor | None, index: Tensor) -> Tensor:
        """The key blocks that each query block reads, (B, H, G, p)."""
        n, rows = q.shape[-2], index.clamp(max=q.shape[-2] - 1)
        filled = (index < n)[..., None].float()  # (G, b, 1)
        real = filled if key_mask is None else filled * take(key_mask[:, None, :, None].float(), rows)
        count = real.sum(-2)  # (G, 1) or (B, 1, G, 1)
        mean_q, mean_k = ((take(x.detach().float(), rows) * real).sum(-2) / count.clamp(min=1) for x in (q, k))
        score = mean_q @ mean_k.mT + count.log().mT  # (B, H, G, G)
        block = torch.arange(len(index), device=q.device)
        if self.site.causal:
            score = score.masked_fill(block > block[:, None], -torch.inf)
        score = score.masked_fill(block == block[:, None], torch.inf)
        return score.topk(min(self.blocks, len(index)), dim=-1, sorted=False).indices

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> list[Tiles]:
        q = q * scale  # counts weigh beside the logits
        n = q.shape[-2]
        index, slot = self._table(n, q.device)
        key = index[self._best(q, k, key_mask, index)].flatten(-2)  # (B, H, G, p * b)
        valid = (key < n)[..., None, :]
        return [Tiles(index.clamp(max=n - 1), key.clamp(max=n - 1), valid, slot)]

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        n = q.shape[-2]
        index, _ = self._table(n, q.device)
        best = self._best(q, k, key_mask, index)
        out = torch.zeros(*q.shape[:2], n, n, dtype=torch.bool, device=q.device)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                for queries, taken in zip(index, best[b, h], strict=True):
                    keys = index[taken].flatten()
                    out[b, h, queries[queries < n][:, None], keys[keys < n]] = True
        return out
