"""Triton kernels for blocks of keys: means of stretches of rows, the best blocks of a tile, and the points of blocks.

expansion.py has the mathematics, blocks.py the choice; the plain forms are in plain.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain
from .common import operator, padded, plain_rows, precision, product

HELD = 1 << 15  # numbers of a block's keys, or values: what a program has room for
TILES = 64  # tiles whose points one program computes from one reading of a block
ROWS = 64  # rows of a stretch that are added at once


@triton.jit
def _means(
    x, mask, out, counts, scale, n, size, group, width, stretches, key_heads, first, x_b, x_h, x_n, mask_b,
    MASKED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    stretch, batch, head = tl.program_id(0), tl.program_id(1) // key_heads, tl.program_id(1) % key_heads
    d = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    count = 0.0
    for start in range(0, size, ROWS):
        at = start + tl.arange(0, ROWS)
        row = stretch * size + at
        real = (at < size) & (row < n) & (row >= first)
        if MASKED:
            real = real & (tl.load(mask + batch * mask_b + row, mask=real, other=0) != 0)
        count += tl.sum(real.to(tl.float32), 0)
        for one in range(0, group):
            place = x + batch.to(tl.int64) * x_b + (head * group + one).to(tl.int64) * x_h + row[:, None] * x_n
            rows = tl.load(place + d[None, :], mask=real[:, None] & (d < width)[None, :], other=0.0)
            total += tl.sum(rows.to(tl.float32), 0)
    to = (tl.program_id(1).to(tl.int64) * stretches + stretch) * width
    tl.store(out + to + d, total * (scale / tl.maximum(count * group, 1.0)), mask=d < width)
    if head == 0:
        tl.store(counts + batch * stretches + stretch, count)


def _mean_shapes(
    x: Tensor, mask: Tensor | None, size: int, heads: int, first: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, stretches = x.shape[0], -(-x.shape[2] // size)
    mean = x.new_empty(batch, heads, stretches, x.shape[-1], dtype=torch.float32)
    return mean, x.new_empty(batch, stretches, dtype=torch.float32)


@operator("stretch_means", _mean_shapes, plain.stretch_means)
def stretch_means(
    x: Tensor, mask: Tensor | None, size: int, heads: int, first: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`scale` times means of x (B, H, n, d) over stretches of `size` rows, the last one ragged, and over the heads that share
    one of `heads`.

    mask: (B, n or more) bool, rows that count; rows before `first` do not. Returns (B, heads, s, d) float32 for
    s = ceil(n / size) stretches, and how many rows of each count, (B, s) float32; the mean of none is zero.
    """
    batch, every, n, width = x.shape
    x = plain_rows(x)
    stretches = triton.cdiv(n, size)
    out = torch.empty(batch, heads, stretches, width, dtype=torch.float32, device=x.device)
    counts = torch.empty(batch, stretches, dtype=torch.float32, device=x.device)
    _means[(stretches, batch * heads)](
        x, x if mask is None else mask, out, counts, scale, n, size, every // heads, width, stretches, heads, first,
        *x.stride()[:3], 0 if mask is None else mask.stride(0), MASKED=mask is not None, ROWS=ROWS, WIDTH=padded(width),
    )  # fmt: skip
    return out, counts


@triton.jit
def _best(
    about, mean, counts, exact, tiles, blocks, width, wanted, tile, near, size, key_heads,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    t, m, d = tl.program_id(0) * TILES + tl.arange(0, TILES), tl.arange(0, BLOCKS), tl.arange(0, WIDTH)
    in_d = d < width
    query = tl.load(
        about + (pair * tiles + t)[:, None] * width + d[None, :], mask=(t < tiles)[:, None] & in_d[None, :], other=0.0
    )  # (T, d)
    key = tl.load(
        mean + (pair * blocks + m)[None, :] * width + d[:, None], mask=(m < blocks)[None, :] & in_d[:, None], other=0.0
    )  # (d, m)
    score = product(query, key, tl.zeros([TILES, BLOCKS], tl.float32), PRECISION)
    filled = tl.load(counts + pair // key_heads * blocks + m, mask=m < blocks, other=0.0) > 0
    past = tl.maximum(t * tile - near, 0) // size
    score = tl.where(filled[None, :] & (m[None, :] < past[:, None]), score, float("-inf"))
    for i in range(0, wanted):
        best = tl.max(score, 1)
        which = tl.argmax(score, 1)
        to = exact + (pair * tiles + t) * wanted + i
        tl.store(to, tl.where(best == float("-inf"), blocks, which).to(tl.int64), mask=t < tiles)
        score = tl.where(m[None, :] == which[:, None], float("-inf"), score)


def _best_shapes(about: Tensor, mean: Tensor, counts: Tensor, wanted: int, tile: int, near: int, size: int) -> Tensor:
    return about.new_empty(*about.shape[:3], wanted, dtype=torch.int64)


@operator("best_blocks", _best_shapes, None)
def best_blocks(about: Tensor, mean: Tensor, counts: Tensor, wanted: int, tile: int, near: int, size: int) -> Tensor:
    """The blocks of largest about.mean of those that each tile may read, best first: (B, H, T, wanted) int64; m: too few.

    about (B, H, T, d) and mean (B, H, m, d) float32, counts (B, m): blocks without keys are left out. They have `size` keys.
    """
    (batch, heads, tiles, width), blocks = about.shape, mean.shape[2]
    about, mean = about.contiguous(), mean.contiguous()
    exact = torch.empty(batch, heads, tiles, wanted, dtype=torch.int64, device=about.device)
    if wanted:
        _best[(triton.cdiv(tiles, 16), batch * heads)](
            about, mean, counts.contiguous(), exact, tiles, blocks, width, wanted, tile, near, size, heads,
            TILES=16, BLOCKS=padded(blocks), WIDTH=padded(width), PRECISION=precision(torch.float32),
        )  # fmt: skip
    return exact


@triton.jit
def _points(
    about, k, v, mask, exact, point_key, point_value, bias,
    tiles, blocks, size, tile, near, first, listed, width, width_v, key_heads, mask_b, k_b, k_h, k_n, v_b, v_h, v_n,
    MASKED: tl.constexpr, TILES: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block, start, pair = tl.program_id(0), tl.program_id(1) * TILES, tl.program_id(2).to(tl.int64)
    batch, head = pair // key_heads, pair % key_heads
    last = tl.minimum(start + TILES, tiles) - 1
    if (last * tile - near) // size > block:  # some tile of these may read the block
        t, j, d, e = start + tl.arange(0, TILES), tl.arange(0, SIZE), tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
        row = block * size + j
        real = (j < size) & (row >= first)
        if MASKED:
            real = real & (tl.load(mask + batch * mask_b + row, mask=real, other=0) != 0)
        mine, in_d, in_e = (t < tiles)[:, None], (d < width)[None, :], (e < width_v)[None, :]
        place = about + (pair * tiles + t)[:, None] * width + d[None, :]
        mean = tl.load(place, mask=mine & in_d, other=0.0)  # (T, d)
        place = k + batch * k_b + head * k_h + row[:, None] * k_n + d[None, :]
        keys = tl.load(place, mask=real[:, None] & in_d, other=0.0)  # (c, d)
        place = v + batch * v_b + head * v_h + row[:, None] * v_n + e[None, :]
        values = tl.load(place, mask=real[:, None] & in_e, other=0.0)  # (c, e)
        logits = product(mean.to(keys.dtype), tl.trans(keys), tl.zeros([TILES, SIZE], tl.float32), PRECISION)
        top = tl.max(tl.where(real[None, :], logits, float("-inf")), 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        logits = tl.where(real[None, :], logits - top[:, None], 0.0)
        p = tl.where(real[None, :], tl.exp(logits), 0.0)
        total = tl.sum(p, 1)
        p = p / tl.where(total == 0.0, 1.0, total)[:, None]
        entropy = tl.where(total == 0.0, float("-inf"), tl.log(tl.maximum(total, 1.0)) - tl.sum(p * logits, 1))
        for i in range(0, listed):
            read = tl.load(exact + (pair * tiles + t) * listed + i, mask=t < tiles, other=-1)
            entropy = tl.where(read == block, float("-inf"), entropy)
        to = (pair * tiles + t) * blocks + block
        found = product(p.to(keys.dtype), keys, tl.zeros([TILES, WIDTH], tl.float32), PRECISION)
        tl.store(point_key + to[:, None] * width + d[None, :], found.to(keys.dtype), mask=mine & in_d)
        found = product(p.to(values.dtype), values, tl.zeros([TILES, WIDTH_V], tl.float32), PRECISION)
        tl.store(point_value + to[:, None] * width_v + e[None, :], found.to(values.dtype), mask=mine & in_e)
        tl.store(bias + to, entropy, mask=t < tiles)


def _point_shapes(
    about: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, exact: Tensor, tile: int, near: int, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    lead = (*about.shape[:3], key.shape[2])
    point_key, point_value = (key.new_empty(*lead, x.shape[-1]) for x in (key, value))
    return point_key, point_value, key.new_empty(*lead, dtype=torch.float32)


@operator("block_points", _point_shapes, plain.block_points)
def block_points(
    about: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, exact: Tensor, tile: int, near: int, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The points of m blocks of c keys for each of T tiles; arguments as `core.Expansion` has them.

    Returns (B, H, T, m, d) and (B, H, T, m, e) in the dtype of the keys, and the bias (B, H, T, m) float32, minus infinity
    for blocks without keys and those of `exact`. What a tile may not read yet is not written.

    Multiply-adds: T m c (2 d + e), in matrix units. Bytes: the keys and values once for each `TILES` tiles, and what it writes.
    """
    (batch, heads, blocks, size, width), width_v, tiles = key.shape, value.shape[-1], about.shape[2]
    if padded(size) * padded(max(width, width_v)) > HELD:
        return plain.block_points(about, key, value, mask, exact, tile, near, first)
    k, v = (plain_rows(x.flatten(2, 3)) for x in (key, value))  # blocks are stretches of keys
    about, exact = about.contiguous(), exact.contiguous()
    point_key, point_value = (key.new_empty(batch, heads, tiles, blocks, x) for x in (width, width_v))
    bias = torch.empty(batch, heads, tiles, blocks, dtype=torch.float32, device=key.device)
    many = TILES if max(width, width_v, size) <= 128 else TILES // 2
    _points[(blocks, triton.cdiv(tiles, many), batch * heads)](
        about, k, v, k if mask is None else mask, exact, point_key, point_value, bias,
        tiles, blocks, size, tile, near, first, exact.shape[-1], width, width_v, heads,
        0 if mask is None else mask.stride(0),
        *k.stride()[:3], *v.stride()[:3],
        MASKED=mask is not None, TILES=many, SIZE=padded(size), WIDTH=padded(width), WIDTH_V=padded(width_v),
        PRECISION=precision(k.dtype), num_warps=4 if size <= 128 else 8, num_stages=1,
    )  # fmt: skip
    return point_key, point_value, bias
