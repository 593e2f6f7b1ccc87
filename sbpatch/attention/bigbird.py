"""BigBird's pattern: window, global tokens and random keys (Zaheer et al., arXiv 2007.14062)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import Tiles
from .longformer import Longformer
from .patterns import UNIT, blocks, mean_pairs
from .registry import Geometry, register


@register("bigbird")
class BigBird(Longformer):
    """Longformer's pattern, and `random` keys for each block of `BLOCK` queries, drawn once from the seed.

    One key from each of `random` equal stretches of the sequence (of its past, where causal), so that none comes twice.
    """

    BLOCK = 16  # queries that share their random keys, as in the paper's blocked form
    place: Tensor  # (blocks, random) int64, ascending, see patterns.UNIT

    def __init__(self, site: Geometry, seed: int, window: int, first: int = 1, random: int = 8) -> None:
        if random < 1:
            raise SbpatchError(f"random is {random}; it must be at least 1 (use longformer for none)")
        super().__init__(site, seed, window, first)
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randint(UNIT, (-(-site.tokens // self.BLOCK), random), generator=generator)
        self.register_buffer("place", (torch.arange(random) * UNIT + draws) // random, persistent=False)
        self.nnz += mean_pairs([self._random(site.tokens, torch.device("cpu"))], site.causal)

    @classmethod
    def tried(cls, site: Geometry, entropy_ratio: float) -> str | None:
        return None

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        first, random = max(1, site.prefix, int(stored / 16)), max(1, int(stored / 3))
        window = int(stored) - 2 * first - random
        return {"window": window, "first": first, "random": random} if window >= 1 else None

    def _drawn(self, n: int) -> Tensor:
        """The random keys of each block, ascending, (blocks, random); -1 in a causal site's first block."""
        count = -(-n // self.BLOCK)
        block = torch.arange(count, device=self.place.device)
        reach = block * self.BLOCK if self.site.causal else torch.full_like(block, n)
        key = self.place[block % len(self.place)] * reach[:, None] // UNIT
        return key.masked_fill(reach[:, None] == 0, -1)

    def _random(self, n: int, device: torch.device) -> Tiles:
        key = self._drawn(n).to(device)
        query, slot = blocks(len(key), self.BLOCK, n, device)
        new = (key.diff(dim=-1, prepend=key.new_full((len(key), 1), -1)) > 0) & (key >= self.first)
        offset = key[:, None, :] - query[:, :, None]
        local = (offset >= -self.band.left) & (offset <= self.band.right)
        valid = new[:, None, :] & ~local & (query >= self.first)[:, :, None]
        return Tiles(query, key.clamp(min=0), valid, slot)

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> list[Tiles]:
        return [*super().select(q, k, key_mask, scale), self._random(q.shape[-2], q.device)]

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        pairs = super().dense(q, k, key_mask).clone()
        for block, keys in enumerate(self._drawn(q.shape[-2])):
            pairs[block * self.BLOCK : (block + 1) * self.BLOCK, keys[keys >= 0]] = True
        return pairs
