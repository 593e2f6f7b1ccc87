"""Attention of tiles over an `Expansion` (see core.py), on a CPU: what a tile reads lies in stretches, which are copied whole.

    keys of one tile:  near | own | first | exact blocks | points of the other blocks

It is `fused.over_tiles` of `expansion.listed`, the reference, with less around its fused calls: near and own keys are a view of
a padded sequence, blocks are gathered as one row each, and no list of single keys is made. Multiply-adds as there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import expansion
from .core import Expansion, take
from .fused import call, over_tiles, runs_of_tiles


class Stretches(NamedTuple):
    """Keys or values with `near` zeros before them and zeros to whole tiles behind, in three views of one tensor."""

    window: Tensor  # (B, H_k, T, near + tile, d): near and own ones of each tile
    first: Tensor  # (B, H_k, 1, first, d)
    block: Tensor  # (B H_k M, c d): the sequence in blocks, those of the zeros before it included

    @classmethod
    def of(cls, x: Tensor, low: Expansion, near: int) -> Stretches:
        tiles, block = low.about.shape[2], low.key.shape[3]
        whole = F.pad(x, (0, 0, near, tiles * low.tile - x.shape[2])).contiguous()
        window = whole.unfold(2, near + low.tile, low.tile).mT
        first = whole[:, :, None, near : near + min(low.first, x.shape[2])]
        return cls(window, first, whole.view(-1, block * x.shape[-1]))

    def read(self, tiles: slice, index: Tensor, points: Tensor | None) -> Tensor:
        """What these t tiles read, (B, H_k, t, L, d): `index` (B, H_k, t, p) are rows of `block`, points (B, H_k, t, m, d)."""
        batch, heads, many, width = *index.shape[:3], self.window.shape[-1]
        parts = [self.window[:, :, tiles], self.first.expand(-1, -1, many, -1, -1)]
        if index.shape[-1]:
            parts.append(self.block.index_select(0, index.flatten()).view(batch, heads, many, -1, width))
        if points is not None:
            parts.append(points.to(self.window.dtype))
        return torch.cat(parts, 3)


def over_blocks(q: Tensor, k: Tensor, v: Tensor, low: Expansion, scale: float, gain: Tensor | None) -> Tensor:
    """Attention of tiles over the keys and points that an expansion gives them; arguments as `attend`."""
    (batch, heads, n, _), key_heads = q.shape, k.shape[1]
    pointed = low.key.shape[2] > 0
    if torch.compiler.is_exporting():  # exported files hold the form that more runtimes read
        tiles = expansion.listed(low, n)
        return over_tiles(q, k, v, tiles, low if pointed else None, scale, low.key_mask, True, gain)
    many, tile, group = low.about.shape[2], low.tile, heads // key_heads
    near = min(low.near, many * tile)
    keys, values = (Stretches.of(x, low, near) for x in (k, v))
    index, hidden = _rows_of_blocks(low, near), _hidden(low, near, n)
    future = torch.full((tile, tile), -torch.inf, device=q.device).triu(1)
    future = F.pad(future, (near, hidden.shape[-1] - near - tile + low.key.shape[2]))  # (tile, L + m)
    q = F.pad(q, (0, 0, 0, many * tile - n)) if many * tile > n else q
    query = q.unflatten(2, (many, tile)).unflatten(1, (key_heads, group)).transpose(2, 3)  # (B, H_k, T, group, tile, d)
    out = v.new_empty(batch, many, tile, key_heads, group, v.shape[-1])  # as SDPA lays it out
    place = out.permute(0, 3, 1, 4, 2, 5)  # (B, H_k, T, group, tile, e)
    runs = list(runs_of_tiles(hidden.shape[-1], low.past, key_heads))
    points = expansion.points_by_run(low, runs) if pointed else iter([(None, None, None)] * len(runs))
    for (run, _), (point_key, point_value, bias) in zip(runs, points, strict=True):
        rows = hidden[:, :, run].expand(batch, key_heads, -1, -1)
        if bias is not None:
            rows = torch.cat((rows, bias if gain is None else bias + gain[:, None, None]), -1)
        rows = rows.flatten(0, 2)[:, None, None] + future[:, : rows.shape[-1]]  # (N, 1, tile, L + m)
        key = keys.read(run, index[:, :, run], point_key).flatten(0, 2)[:, None]
        value = values.read(run, index[:, :, run], point_value).flatten(0, 2)[:, None]
        place[:, :, run] = call(query[:, :, run].flatten(0, 2), key, value, rows.to(q.dtype), scale).view_as(
            place[:, :, run]
        )
        del key, value, rows  # each run's tensors go before the next ones come
    return out.flatten(1, 2).flatten(2, 3).transpose(1, 2)[:, :, :n]


def _rows_of_blocks(low: Expansion, near: int) -> Tensor:
    """Where the exact blocks of each tile lie in `Stretches.block`, (B, H_k, T, p); the first one for none."""
    batch, heads, count, size = low.key.shape[:4]
    blocks = (near + low.about.shape[2] * low.tile) // size  # of one head
    start = blocks * torch.arange(batch * heads, device=low.exact.device).view(batch, heads, 1, 1) + near // size
    return start + low.exact.masked_fill(low.exact >= count, 0)


def _hidden(low: Expansion, near: int, n: int) -> Tensor:
    """A bias for what each tile reads, its points apart, (1 or B, 1 or H_k, T, L): minus infinity where hidden, else 0."""
    device, count, tiles = low.exact.device, low.key.shape[2], low.about.shape[2]
    start = low.tile * torch.arange(tiles, device=device)[:, None]  # (T, 1)
    token = start + torch.arange(-near, low.tile, device=device)
    first = torch.arange(min(low.first, n), device=device)
    own = [(token >= 0) & (token < n), first < start - low.near]
    keep = torch.cat(own, 1)[None, None]  # (1, 1, T, near + tile + first)
    if low.key_mask is not None:
        read = torch.cat((token.clamp(0, n - 1), first.expand(tiles, -1)), 1)
        keep = keep & low.key_mask[:, read][:, None]
    if low.exact.shape[-1]:
        valid = low.valid().expand(*low.exact.shape[:2], -1, -1)
        far = take(valid, low.exact.clamp(max=count - 1)) & (low.exact < count)[..., None]
        keep = torch.cat((keep.expand(*far.shape[:2], -1, -1), far.flatten(-2)), -1)
    return torch.zeros(keep.shape, device=device).masked_fill(~keep, -torch.inf)
