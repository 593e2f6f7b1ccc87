"""Attention over stretches of keys, on a CPU: what a tile of queries reads is copied in whole stretches.

    keys of one tile:  near | own | first | chosen blocks | points of the other blocks

It is `fused.over_tiles` of the same as lists of keys, the reference, with less around its fused calls: near and own keys are
a view of a padded sequence, a block is gathered as one row, and no list of single keys is made. Multiply-adds as there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import expansion
from .core import Expansion, Stretches, lengthened, take
from .fused import LANES, call, runs_of_tiles


class Padded(NamedTuple):
    """Keys or values behind `lead` zeros and before zeros to whole tiles and blocks, in three views of one tensor."""

    window: Tensor  # (B, H_k, T, near + tile, d): near and own ones of each tile
    first: Tensor  # (B, H_k, 1, first, d)
    block: Tensor  # (B H_k M, c d): the sequence in blocks, those of the zeros before it included

    @classmethod
    def of(cls, x: Tensor, read: Stretches, near: int) -> Padded:
        lead, n, tiles = _lead(read, near), x.shape[2], read.chosen.shape[2]
        whole = F.pad(x, (0, 0, lead, _behind(read) - n)).contiguous()
        window = whole[:, :, lead - near :].unfold(2, near + read.tile, read.tile)[:, :, :tiles].mT
        first = whole[:, :, None, lead : lead + min(read.first, n)]
        return cls(window, first, whole.view(-1, read.block * x.shape[-1]))

    def read(self, tiles: slice, index: Tensor, points: Tensor | None, spare: int) -> Tensor:
        """What these t tiles read, (B H_k t, 1, L + m, d): rows `index` (B, H_k, T, p) of `block`, points (B, H_k, t, m, d),
        and `spare` zeros behind them.
        """
        index = index[:, :, tiles]
        batch, heads, many, width = *index.shape[:3], self.window.shape[-1]
        parts = [self.window[:, :, tiles], self.first.expand(-1, -1, many, -1, -1)]
        if index.shape[-1]:
            parts.append(self.block.index_select(0, index.flatten()).view(batch, heads, many, -1, width))
        if points is not None:
            parts.append(points.to(self.window.dtype))
        parts.append(self.window.new_zeros(()).expand(batch, heads, many, spare, width))
        return torch.cat(parts, 3).flatten(0, 2)[:, None]


def over_stretches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read: Stretches,
    low: Expansion | None,
    scale: float,
    key_mask: Tensor | None,
    gain: Tensor | None,
) -> Tensor:
    """Attention of tiles over their stretches and what an expansion of the same makes of the others; arguments as `attend`."""
    (batch, heads, n, _), key_heads, (many, tile) = q.shape, k.shape[1], (read.chosen.shape[2], read.tile)
    near = min(read.near, many * tile)
    keys, values = (Padded.of(x, read, near) for x in (k, v))
    index, hidden = _rows_of_blocks(read, near), _hidden(read, near, n, key_mask)
    low = low if low is not None and low.key.shape[2] else None
    counts = (0,) * many if low is None else low.past
    future = torch.full((tile, tile), -torch.inf, device=q.device).triu(1)
    future = F.pad(future, (near, hidden.shape[-1] - near - tile + counts[-1] + LANES))  # (tile, L + m)
    q = lengthened(q, many * tile - n)
    query = q.unflatten(2, (many, tile)).unflatten(1, (key_heads, -1)).transpose(2, 3)  # (B, H_k, T, group, tile, d)
    out = v.new_empty(batch, many, tile, key_heads, heads // key_heads, v.shape[-1])  # as SDPA lays it out
    place = out.permute(0, 3, 1, 4, 2, 5)  # (B, H_k, T, group, tile, e)
    runs = list(runs_of_tiles(hidden.shape[-1], counts, key_heads))
    points = iter([(None, None, None)] * len(runs)) if low is None else expansion.points_by_run(low, runs)
    for (run, _), (point_key, point_value, bias) in zip(runs, points, strict=True):
        rows = hidden[:, :, run].expand(batch, key_heads, -1, -1)
        if bias is not None:
            rows = torch.cat((rows, bias if gain is None else bias + gain[:, None, None]), -1)
        spare = -rows.shape[-1] % LANES
        rows = F.pad(rows, (0, spare), value=-torch.inf).flatten(0, 2)[:, None, None]
        rows = rows + future[:, : rows.shape[-1]]  # (N, 1, tile, L + m)
        key, value = keys.read(run, index, point_key, spare), values.read(run, index, point_value, spare)
        found = call(query[:, :, run].flatten(0, 2), key, value, rows.to(q.dtype), scale)  # (N, group, tile, e)
        place[:, :, run] = found.view_as(place[:, :, run])
        del key, value, rows, found  # each run's tensors go before the next ones come
    return out.flatten(1, 2).flatten(2, 3).transpose(1, 2)[:, :, :n]


def _lead(read: Stretches, near: int) -> int:
    """Zeros before the first key: whole blocks, so that blocks of the sequence are blocks of what they lie in."""
    return -(-near // read.block) * read.block


def _behind(read: Stretches) -> int:
    """Tokens to the end of the last tile, and of its last block."""
    return -(-read.chosen.shape[2] * read.tile // read.block) * read.block


def _rows_of_blocks(read: Stretches, near: int) -> Tensor:
    """Where the chosen blocks of each tile lie in `Padded.block`, (B, H_k, T, p); the sequence's first one for none."""
    batch, heads = read.chosen.shape[:2]
    lead, blocks = _lead(read, near) // read.block, (_lead(read, near) + _behind(read)) // read.block
    start = lead + blocks * torch.arange(batch * heads, device=read.chosen.device).view(batch, heads, 1, 1)
    return start + read.chosen.masked_fill(read.chosen >= read.blocks, 0)


def _hidden(read: Stretches, near: int, n: int, key_mask: Tensor | None) -> Tensor:
    """A bias for what each tile reads, (1 or B, 1 or H_k, T, L): minus infinity where hidden, else 0."""
    device, tiles, shape = read.chosen.device, read.chosen.shape[2], (read.blocks, read.block)
    start = read.tile * torch.arange(tiles, device=device)[:, None]  # (T, 1)
    token = start + torch.arange(-near, read.tile, device=device)
    first = torch.arange(min(read.first, n), device=device)
    own = (token >= 0) & (token < n)
    keep = torch.cat((own, first < start - read.near), 1)[None, None]  # (1, 1, T, near + tile + first)
    if key_mask is not None:
        token = torch.cat((token.clamp(0, n - 1), first.expand(tiles, -1)), 1)
        keep = keep & key_mask[:, token][:, None]
    if read.chosen.shape[-1]:
        real = torch.arange(shape[0] * shape[1], device=device)[None]
        real = (real >= len(first)) & (real < n)  # a first token counts once
        if key_mask is not None:
            real = real & F.pad(key_mask, (0, max(real.shape[1] - n, 0)))[:, : real.shape[1]]
        valid = real.unflatten(1, shape)[:, None].expand(*read.chosen.shape[:2], -1, -1)
        far = take(valid, read.chosen.clamp(max=read.blocks - 1)) & (read.chosen < read.blocks)[..., None]
        keep = torch.cat((keep.expand(*far.shape[:2], -1, -1), far.flatten(-2)), -1)
    return torch.zeros(keep.shape, device=device).masked_fill(~keep, -torch.inf)
