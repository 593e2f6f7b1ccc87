"""The functions of fused.py on a CUDA device: the same arguments and results, each in one call of a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import Expansion, Points, Tiles, places, take
from ..fused import hiding, remainder
from . import plain
from .blocks import block_points
from .points import attend_points
from .rows import attend_blocks, fits
from .tiles import attend_tiles


def over_points(q: Tensor, points: Points, scale: float) -> Tensor:
    return attend_points(q, points.key.to(q.dtype), points.value.to(q.dtype), points.counts.log(), scale)


def over_blocks(q: Tensor, k: Tensor, v: Tensor, low: Expansion, scale: float, gain: Tensor | None) -> Tensor:
    block = low.key.shape[3]
    points = block_points(low.about, low.key, low.value, low.key_mask, low.exact, low.tile, low.near, low.first)
    call = (q, k, v, low.key_mask, low.exact, *points, gain, scale, low.tile, low.near, low.first, block)
    return attend_blocks(*call) if fits(block) else attend_tiles(*plain.blocks_as_tiles(*call))


def over_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    low: Points | None,
    scale: float,
    key_mask: Tensor | None,
    causal: bool,
    gain: Tensor | None,
) -> Tensor:
    key = value = bias = counts = None
    if low is not None:
        low = low._replace(key=low.key.to(q.dtype))
        key, value, bias = remainder(low, tiles, hiding(k, tiles, key_mask)[..., 0, :], take(v, tiles.key))
        bias = bias if gain is None else bias + gain[:, None, None]
        value, counts = value.to(q.dtype), torch.full((key.shape[2],), key.shape[3], device=q.device)
    return attend_tiles(
        q, k, v, tiles.query, places(tiles), tiles.key, tiles.valid, key_mask, key, value, bias, counts, scale, causal
    )
