"""Reading and writing rows by tile index."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .registry import Tiles


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, H, n, d) at index (G, b) or (B, H, G, b) -> (B, H, G, b, d)."""
    groups, size = index.shape[-2:]
    if index.ndim == 2:  # the same rows for every sample and head: one contiguous copy
        rows = x.index_select(2, index.reshape(-1))
    else:
        flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
        rows = x.gather(2, flat)
    return rows.unflatten(2, (groups, size))


def split_groups(tiles: Tiles, entries: int) -> Iterator[Tiles]:
    """The groups of a round in runs of at most `entries` pairs (one group at least); slots stay those of the whole."""
    size = max(1, entries // (tiles.query.shape[-1] * tiles.key.shape[-1]))
    runs = (tiles.query.split(size, -2), tiles.key.split(size, -2), tiles.valid.split(size, -3))
    for query, key, valid in zip(*runs, strict=True):
        yield Tiles(query, key, valid, tiles.slot)


def restore(x: Tensor, slot: Tensor) -> Tensor:
    """Inverse of taking queries: x (B, H, G, bq, d) and slot (n,) or (B, H, n) -> (B, H, n, d)."""
    return take(x.flatten(2, 3), slot[..., None, :]).squeeze(2)


def columns(x: Tensor, index: Tensor) -> Tensor:
    """Per-query values at per-key columns: x (B, H, G, bq, m), index (B, H, G, bk) -> (B, H, G, bq, bk)."""
    return x.gather(-1, index[..., None, :].expand(-1, -1, -1, x.shape[-2], -1))


def blocks(count: int, size: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Consecutive tokens in blocks: query index (count, size), the last block repeating token n - 1, and slots (n,)."""
    position = torch.arange(count * size, device=device)
    return position.clamp(max=n - 1).view(count, size), position[:n]
