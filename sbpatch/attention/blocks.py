"""Blocks of the past by content, for causal sites: the best ones read exactly, the others as their means.

    |  epoch 0  |  epoch 1  |  epoch 2  |     the sequence in epochs of `epoch` tokens
    | ▒▒ ░░ ▓▓  | ▒▒ ░░ ▓▓  |  ■■■■■■q  |     ▒ ░ ▓ blocks: keys of a past epoch that lie close together, wherever they stand
      exact ─┘    └ as means   exact: its own epoch, as far as it has come, and the first tokens

A tile of queries ranks the blocks of past epochs by mean query . mean key, as Quest (arXiv 2406.10774) ranks pages, and reads
the `blocks` best exactly. Position finds no single thing far back (a name, an open bracket); content does. Query heads that
share keys share a tile. Nothing is looked up pair by pair, so this causal method is faster than exact attention.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SbpatchError
from . import kmeans
from .core import Points, Selection, Tiles, repeated, take
from .registry import Geometry, Joined, register
from .tree import centred, principal_axes, split_evenly

NEAR = (0.5, 0.25, 0.75)  # shares of what is stored that go to a query's own epoch, the best guess first
MEANS = 0.4  # share that goes to means, at most, where blocks can be made that large
SHORTEST, PARTS = 16, 16  # tokens of an epoch, and blocks that it has where the means fit
FIRST, TILE = 4, 64
AXES = 4  # principal axes that an epoch is split on; with 8 or 16 the errors are the same


@register("blocks")
class Blocks(Joined):
    """Tiles of `tile` queries read the first `first` tokens, their own epoch, `blocks` blocks of `block` keys, and means.

    Blocks are the leaves of a balanced tree over the keys of an epoch, on the principal axes of the first epoch's keys, so
    that no block depends on a later epoch. Within a tile, later queries take part in choosing the blocks of earlier ones.

    Multiply-adds a query and head: (d + e) (epoch / 2 + first + blocks block + m), m the means that are over, n / 2 block on
    average. Besides, n (AXES d) for the coordinates, n log2(epoch / block) comparisons, n (d + e) additions for the means.
    """

    grouped = True
    learned = ("sharpness",)

    sharpness: Tensor  # of each key head a factor of q.mean: means lie nearer to the origin than their keys

    def __init__(
        self, site: Geometry, seed: int, epoch: int, block: int, blocks: int, first: int = FIRST, tile: int = TILE
    ) -> None:
        super().__init__()
        if not site.causal:
            raise SbpatchError("blocks look back in a causal sequence; use clusters or top-clusters here")
        if min(epoch, block, tile) < 1 or min(blocks, first) < 0:
            raise SbpatchError(
                f"blocks need an epoch, block and tile of at least 1, not {epoch}, {block} and {tile}, and at least 0 blocks "
                f"and first tokens, not {blocks} and {first}"
            )
        if epoch % tile or epoch % block or (epoch // block) & (epoch // block - 1):
            raise SbpatchError(
                f"an epoch of {epoch} tokens is not a number of tiles of {tile} and a power of two of blocks of {block}"
            )
        self.epoch, self.block, self.blocks, self.first, self.tile = epoch, block, blocks, first, tile
        self.register_buffer("sharpness", torch.ones(site.heads // site.group), persistent=False)
        n = site.tokens
        row = torch.arange(n)
        low = row // epoch * epoch  # where the row's epoch begins
        past, kept = low // block, low.clamp(max=first)
        exact = past.clamp(max=blocks) * block
        self.nnz = float((row + 1 - low + kept + exact).float().mean())
        self.rank = self.rank_of(n)
        self.stored = float((past - past.clamp(max=blocks)).float().mean()) + 1.0

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        found = cls.variants(stored, site)
        return found[0] if found else None

    @classmethod
    def variants(cls, stored: float, site: Geometry) -> list[dict[str, int]]:
        if not site.causal:
            return []
        found: dict[tuple[int, ...], dict[str, int]] = {}
        for share in NEAR:
            epoch = 2 ** round(math.log2(max(2 * share * stored, SHORTEST)))
            if epoch >= site.tokens:
                continue
            block = max(epoch // PARTS, 2)
            while block < epoch and site.tokens / 2 / block > MEANS * stored:
                block *= 2
            size = {
                "epoch": epoch,
                "block": block,
                "first": FIRST,
                "tile": max(min(epoch // 2, 2 * TILE), min(epoch, TILE)),
            }
            fixed = cls(site, 0, blocks=0, **size)
            blocks = int((stored - fixed.nnz - fixed.stored) / max(block - 1, 1))  # one read exactly is one mean less
            if blocks >= 1:
                found.setdefault((epoch, block), size | {"blocks": blocks})
        return list(found.values())

    @classmethod
    def tried(cls, site: Geometry, entropy_ratio: float) -> str | None:
        return "blocks" if site.causal else None

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _members(self, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """The keys of each block of the complete epochs, (B, H, m, block)."""
        (batch, heads, n, width), size = k.shape, self.epoch
        epochs = n // size
        real = None
        if key_mask is not None:
            real = key_mask[:, : epochs * size].view(batch, epochs, size, 1)
        start = centred(k[:, :, :size], k.new_ones(1, 1, size, 1).bool() if real is None else real[:, None, 0])
        axes = principal_axes(start, min(AXES, width))
        point = k[:, :, : epochs * size].detach().float() @ axes  # the mean of a node is taken off where it is split
        point = point.view(batch, heads * epochs, size, -1)
        if real is not None:
            real = real[:, None].expand(-1, heads, -1, -1, -1).flatten(1, 2)
            point = point * real
        index = split_evenly(point, self.block, real).view(batch, heads, epochs, -1, self.block)
        return (index + size * torch.arange(epochs, device=k.device).view(-1, 1, 1)).flatten(2, 3)

    def _points(self, k: Tensor, v: Tensor, members: Tensor, key_mask: Tensor | None) -> Points:
        batch, heads, n, _ = k.shape
        count = members.shape[2]
        block = torch.arange(count, device=k.device).view(-1, 1).expand_as(members)
        own = members.new_full((batch, heads, n), count).scatter(-1, members.flatten(2), block.flatten(2))
        own = torch.where(torch.arange(n, device=k.device) < self.first, count, own)  # first tokens are of no block
        keep = k.new_ones(batch, 1, n, dtype=torch.float32) if key_mask is None else key_mask[:, None].float()
        counts = kmeans.counts(own, count + 1, keep)
        mean, value = (
            kmeans.sums(x.float(), own, count + 1, None if key_mask is None else keep) / counts.clamp(min=1)
            for x in (k, v)
        )
        mean, value, counts = (x[:, :, :count] for x in (mean, value, counts))
        return Points(mean, value, counts[..., 0], own, self._ready(count, k.device))

    def _ready(self, count: int, device: torch.device) -> Tensor:
        """The first query that may read each block, (m,): the first one of the next epoch."""
        return self.epoch * (1 + torch.arange(count, device=device) // (self.epoch // self.block))

    def _best(self, q: Tensor, points: Points) -> Tensor:
        """The best blocks of past epochs for each tile, best first, (B, H, T, blocks); m where there are too few."""
        (batch, _, n, width), key_heads = q.shape, points.key.shape[1]
        tiles = -(-n // self.tile)
        rows = q.detach().float()
        if n % self.tile:
            rows = F.pad(rows, (0, 0, 0, tiles * self.tile - n))
        rows = rows.reshape(-1, self.tile, width).sum(1)  # the direction of their mean is all that counts
        mean = rows.view(batch, key_heads, -1, tiles, width).sum(2)
        score = mean @ points.key.detach().mT
        start = self.tile * torch.arange(tiles, device=q.device)
        hidden = (start[:, None] < self._ready(score.shape[-1], q.device)) | (points.counts[:, :, None] == 0)
        score = score.masked_fill(hidden, -torch.inf)
        best, index = score.topk(min(self.blocks, score.shape[-1]), dim=-1)
        return index.masked_fill(best == -torch.inf, score.shape[-1])

    # -- what is read ------------------------------------------------------------------------------------------------

    def _order(self, n: int) -> tuple[list[int], tuple[tuple[int, int], ...]]:
        """Tiles by how much they read, and of each how many keys (in the order of `_tiles`) and points."""
        past = {}
        for t in range(-(-n // self.tile)):
            begun = t * self.tile // self.epoch * (self.epoch // self.block)
            own = t * self.tile % self.epoch
            fixed = self.tile + min(self.blocks, self.rank_of(n)) * self.block + self.first
            past[t] = (fixed + own, begun)
        order = sorted(past, key=lambda t: past[t])
        return order, tuple(past[t] for t in order)

    def rank_of(self, n: int) -> int:
        """Blocks of the complete epochs of n tokens."""
        return n // self.epoch * (self.epoch // self.block)

    def _tiles(self, members: Tensor, best: Tensor, n: int) -> Tiles:
        """Lists of keys: the tile itself, blocks, first tokens, and the epoch before the tile."""
        device, tile, epoch = members.device, self.tile, self.epoch
        order, reach = self._order(n)
        start = tile * torch.tensor(order, device=device)[:, None]  # (T, 1)
        own = start + torch.arange(tile, device=device)
        low = start // epoch * epoch
        first = torch.arange(min(self.first, n), device=device).expand(len(order), -1)
        before = low + torch.arange(epoch - tile, device=device)
        lead = members.shape[:2]
        best = best[:, :, torch.tensor(order, device=device)]  # (B, H, T, blocks)
        chosen = take(F.pad(members, (0, 0, 0, 1)), best).flatten(-2)  # (B, H, T, blocks block)
        taken = (best < members.shape[2]).repeat_interleave(self.block, -1)
        taken = taken & (chosen >= first.shape[-1])  # a first token counts once
        listed = [own, chosen, first, before]
        valid = [own < n, taken, first < low, before < start]
        key = torch.cat([x.expand(*lead, -1, -1) for x in listed], dim=-1).clamp(max=n - 1)
        slot = torch.empty_like(start[:, 0]).scatter(0, start[:, 0] // tile, torch.arange(len(order), device=device))
        place = torch.arange(n, device=device)
        return Tiles(
            own.clamp(max=n - 1), key, torch.cat([x.expand(*lead, -1, -1) for x in valid], dim=-1)[..., None, :],
            slot[place // tile] * tile + place % tile, diagonal=True, reach=reach, whole=best,
        )  # fmt: skip

    def select(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Selection:
        n = k.shape[2]
        if n <= self.epoch:  # nothing is past: the own epoch is all there is
            members = torch.zeros(*k.shape[:2], 0, self.block, dtype=torch.long, device=k.device)
            best = torch.zeros(*k.shape[:2], -(-n // self.tile), 0, dtype=torch.long, device=k.device)
            return Selection([self._tiles(members, best, n)], None)
        members = self._members(k, key_mask)
        points = self._points(k, v, members, key_mask)
        tiles = self._tiles(members, self._best(q, points), n)
        return Selection([tiles], points._replace(key=points.key * self.sharpness.to(points.key.dtype)[:, None, None]))

    # -- the definition ----------------------------------------------------------------------------------------------

    def pairs(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """Row by row: the first tokens, the own epoch, and the blocks that the row's tile ranks best."""
        n, step = q.shape[-2], k.shape[1] // len(self.sharpness)
        out = torch.zeros(*q.shape[:2], n, n, dtype=torch.bool, device=q.device)
        one = k[:, ::step]
        if n > self.epoch:
            members = self._members(one, key_mask)
            best = self._best(q, self._points(one, one, members, key_mask))
        for i in range(n):
            low = i // self.epoch * self.epoch
            out[..., i, : self.first] = True
            out[..., i, low : i + 1] = True
            for b in range(q.shape[0]):
                for h in range(q.shape[1] if low else 0):
                    shared = h * one.shape[1] // q.shape[1]
                    for block in best[b, shared, i // self.tile].tolist():
                        out[b, h, i, members[b, shared, block] if block < members.shape[2] else []] = True
        return out.tril()

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        n, step = q.shape[-2], k.shape[1] // len(self.sharpness)
        out = torch.zeros(*q.shape[:2], n, n, dtype=torch.float64, device=q.device)
        one = k[:, ::step]
        if n <= self.epoch:
            return out
        points = self._points(one, one, self._members(one, key_mask), key_mask)
        mean = repeated(points.key.double() * self.sharpness.double()[:, None, None], q.shape[1])
        mean = F.pad(mean, (0, 0, 0, 1))
        own = repeated(points.own, q.shape[1])
        place = torch.arange(n, device=q.device)
        over = place[:, None] // self.epoch > place // self.epoch  # (n, n) the key's epoch is past
        logits = q.double() @ mean.mT  # (B, H, n, m + 1)
        entries = logits.exp().gather(-1, own[..., None, :].expand_as(out))
        return entries.masked_fill(~over, 0)
