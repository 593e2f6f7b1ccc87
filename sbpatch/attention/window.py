"""Local windows: each query reads exactly the keys around it, along the sequence or on the image's grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import Tiles
from .patterns import blocks
from .registry import Geometry, Sparse, register


@register("window")
class Window(Sparse):
    """A band of `window` keys around each query (the last `window` keys, itself included, where the site is causal)."""

    def __init__(self, site: Geometry, seed: int, window: int) -> None:
        super().__init__()
        if window < 1:
            raise SbpatchError(f"window is {window}; it must be at least 1 (leave the sparse part out for none)")
        self.window = self.near = window
        self.left = window - 1 if site.causal else window // 2
        self.right = window - 1 - self.left
        n = site.tokens
        sides = [min(reach, n - 1) for reach in (self.left, self.right)]
        self.nnz = 1 + sum(c - c * (c + 1) / (2 * n) for c in sides)  # n - t rows have a key at distance t

    @classmethod
    def tried(cls, site: Geometry, entropy_ratio: float) -> str | None:
        return "window+clusters" if site.grid is None and not site.causal else None

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"window": int(stored)} if stored >= 1 else None

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> list[Tiles]:
        n = q.shape[-2]
        size = min(max(self.window, 16), 128, n)  # a tile computes (size + window) keys a row to use `window` of them
        count = math.ceil(n / size)
        query, slot = blocks(count, size, n, q.device)
        reach = torch.arange(-self.left, size + self.right, device=q.device)
        key = query[:, :1] + reach  # (G, bk), may run out of the sequence at either end
        offset = key[:, None, :] - torch.arange(count * size, device=q.device).view(count, size, 1)
        valid = (offset >= -self.left) & (offset <= self.right) & ((key >= 0) & (key < n))[:, None, :]
        return [Tiles(query, key.clamp(0, n - 1), valid, slot)]

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        i = torch.arange(q.shape[-2], device=q.device)
        offset = i[None, :] - i[:, None]
        return (offset >= -self.left) & (offset <= self.right)


@register("window2d")
class Window2d(Sparse):
    """A `window` x `window` neighbourhood on the image's grid. Class tokens are read by all and read each other.

    In one dimension a window of 49 keys on a 56-wide image sees no vertical neighbour; seven by seven sees them all.
    """

    TILE = 8  # queries a side of a tile; the halo of a 7-wide window is 14 x 14 keys

    query: Tensor
    key: Tensor
    valid: Tensor
    slot: Tensor

    def __init__(self, site: Geometry, seed: int, window: int) -> None:
        super().__init__()
        if site.grid is None:
            raise SbpatchError(
                f"window2d needs tokens on a grid; {site.tokens} tokens of this site are none. Use window"
            )
        if window < 1:
            raise SbpatchError(f"window is {window}; it must be at least 1 (leave the sparse part out for none)")
        self.window, self.site = window, site
        tables = self._tables()
        for name, table in zip(("query", "key", "valid", "slot"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)
        in_use = tables[2].flatten(0, 1)[tables[3]]  # (n, bk): padding slots left out
        self.nnz = float(in_use.sum() / site.tokens)

    @classmethod
    def tried(cls, site: Geometry, entropy_ratio: float) -> str | None:
        return "window2d+clusters" if site.grid is not None and not site.causal else None

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        side = math.isqrt(int(stored) - site.prefix) if stored >= site.prefix + 1 else 0
        side -= 1 - side % 2  # odd: centred on the query
        return {"window": side} if site.grid is not None and side >= 3 else None

    def _near(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether grid coordinate b lies in the window around a."""
        return (b - a >= -(self.window // 2)) & (b - a <= (self.window - 1) // 2)

    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.site.grid is not None
        (rows, cols), prefix, tile = self.site.grid, self.site.prefix, self.TILE
        side = torch.arange(tile)
        halo = torch.arange(-(self.window // 2), tile + (self.window - 1) // 2)
        top = torch.arange(0, rows, tile)[:, None].expand(-1, math.ceil(cols / tile)).reshape(-1, 1, 1)
        left = torch.arange(0, cols, tile)[None, :].expand(math.ceil(rows / tile), -1).reshape(-1, 1, 1)

        def coordinates(reach: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            row = (top + reach[:, None]).expand(-1, -1, len(reach)).flatten(1)  # (G, reach * reach)
            col = (left + reach[None, :]).expand(-1, len(reach), -1).flatten(1)
            inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
            index = prefix + row.clamp(0, rows - 1) * cols + col.clamp(0, cols - 1)
            return row, col, inside, index

        q_row, q_col, q_inside, query = coordinates(side)
        k_row, k_col, k_inside, key = coordinates(halo)
        valid = self._near(q_row[..., None], k_row[:, None]) & self._near(q_col[..., None], k_col[:, None])
        valid &= k_inside[:, None, :]
        slot = torch.empty(self.site.tokens, dtype=torch.long)
        slot[query[q_inside]] = torch.arange(query.numel()).view_as(query)[q_inside]
        if prefix:  # class tokens: keys of every tile, and one more tile as queries
            head = torch.arange(prefix)
            key = torch.cat((head.expand(len(key), -1), key), dim=1)
            valid = torch.cat((torch.ones(*valid.shape[:2], prefix, dtype=torch.bool), valid), dim=2)
            extra = torch.arange(tile * tile).clamp(max=prefix - 1)
            slot[:prefix] = query.numel() + head
            query = torch.cat((query, extra[None]))
            own = torch.zeros(1, *valid.shape[1:], dtype=torch.bool)
            own[..., :prefix] = True
            key, valid = torch.cat((key, key[:1])), torch.cat((valid, own))
        return query, key, valid, slot

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> list[Tiles]:
        if q.shape[-2] != self.site.tokens:
            raise SbpatchError(
                f"window2d was calibrated for {self.site.tokens} tokens and got {q.shape[-2]}; calibrate at this input size"
            )
        return [Tiles(self.query, self.key, self.valid, self.slot)]

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        assert self.site.grid is not None
        index = torch.arange(self.site.tokens, device=q.device) - self.site.prefix
        row, col = index.div(self.site.grid[1], rounding_mode="floor"), index % self.site.grid[1]
        near = self._near(row[:, None], row[None, :]) & self._near(col[:, None], col[None, :])
        patch = index >= 0
        return (near & patch[:, None] & patch[None, :]) | ~patch[None, :]
