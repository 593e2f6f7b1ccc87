"""Triton kernels for blocks of keys: means of stretches of rows, and the points of blocks (expansion.py has the mathematics)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain
from .common import differentiable, padded, plain_rows, precision, product

TILES = 64  # tiles whose points one program computes from one reading of a block
ROWS = 64  # rows of a stretch that are added at once


@triton.jit
def _means(
    x, mask, out, n, size, group, width, stretches, key_heads, x_b, x_h, x_n, mask_b,
    MASKED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    stretch, batch, head = tl.program_id(0), tl.program_id(1) // key_heads, tl.program_id(1) % key_heads
    d = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    count = 0.0
    for start in range(0, size, ROWS):
        at = start + tl.arange(0, ROWS)
        row = stretch * size + at
        real = (at < size) & (row < n)
        if MASKED:
            real = real & (tl.load(mask + batch * mask_b + row, mask=real, other=0) != 0)
        count += tl.sum(real.to(tl.float32), 0)
        for one in range(0, group):
            place = x + batch.to(tl.int64) * x_b + (head * group + one).to(tl.int64) * x_h + row[:, None] * x_n
            rows = tl.load(place + d[None, :], mask=real[:, None] & (d < width)[None, :], other=0.0)
            total += tl.sum(rows.to(tl.float32), 0)
    to = (tl.program_id(1).to(tl.int64) * stretches + stretch) * width
    tl.store(out + to + d, total / tl.maximum(count * group, 1.0), mask=d < width)


@torch.library.custom_op("sbpatch::stretch_means", mutates_args=())
def stretch_means(x: Tensor, mask: Tensor | None, size: int, heads: int) -> Tensor:
    """Means of x (B, H, n, d) over stretches of `size` rows, the last one ragged, and over the heads that share one of `heads`.

    mask: (1 or B, n) bool, rows that count. Returns (B, heads, ceil(n / size), d) float32; zeros where no row counts.
    """
    batch, every, n, width = x.shape
    x = plain_rows(x)
    stretches = triton.cdiv(n, size)
    out = torch.empty(batch, heads, stretches, width, dtype=torch.float32, device=x.device)
    mask_b = 0 if mask is None or len(mask) == 1 else mask.stride(0)
    _means[(stretches, batch * heads)](
        x, x if mask is None else mask, out, n, size, every // heads, width, stretches, heads, *x.stride()[:3], mask_b,
        MASKED=mask is not None, ROWS=ROWS, WIDTH=padded(width),
    )  # fmt: skip
    return out


@stretch_means.register_fake
def _mean_shapes(x: Tensor, mask: Tensor | None, size: int, heads: int) -> Tensor:
    return x.new_empty(x.shape[0], heads, -(-x.shape[2] // size), x.shape[-1], dtype=torch.float32)


differentiable(stretch_means, plain.stretch_means)


@triton.jit
def _points(
    about, k, v, valid, exact, point_key, point_value, bias,
    tiles, blocks, size, tile, near, listed, width, width_v, key_heads, valid_b,
    about_b, about_h, about_t, k_b, k_h, k_n, v_b, v_h, v_n, exact_b, exact_h, exact_t,
    TILES: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, first, pair = tl.program_id(0), tl.program_id(1) * TILES, tl.program_id(2)
    batch, head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    last = tl.minimum(first + TILES, tiles) - 1
    if (last * tile - near) // size > block:  # some tile of these may read the block
        t, j, d, e = first + tl.arange(0, TILES), tl.arange(0, SIZE), tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
        row = (block * size + j).to(tl.int64)
        real = j < size
        real = real & (tl.load(valid + batch * valid_b + block * size + j, mask=real, other=0) != 0)
        mean = tl.load(
            about + batch * about_b + head * about_h + t[:, None] * about_t + d[None, :],
            mask=(t < tiles)[:, None] & (d < width)[None, :], other=0.0,
        )  # (T, d)
        keys = tl.load(
            k + batch * k_b + head * k_h + row[:, None] * k_n + d[None, :],
            mask=real[:, None] & (d < width)[None, :], other=0.0,
        )  # (c, d)
        values = tl.load(
            v + batch * v_b + head * v_h + row[:, None] * v_n + e[None, :],
            mask=real[:, None] & (e < width_v)[None, :], other=0.0,
        )  # fmt: skip
        logits = product(mean.to(keys.dtype), tl.trans(keys), tl.zeros([TILES, SIZE], tl.float32), PRECISION)
        top = tl.max(tl.where(real[None, :], logits, float("-inf")), 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        logits = tl.where(real[None, :], logits - top[:, None], 0.0)
        p = tl.where(real[None, :], tl.exp(logits), 0.0)
        total = tl.sum(p, 1)
        p = p / tl.where(total == 0.0, 1.0, total)[:, None]
        entropy = tl.log(total) - tl.sum(p * logits, 1)  # ln 0: no key, minus infinity
        for i in range(0, listed):
            read = tl.load(exact + batch * exact_b + head * exact_h + t * exact_t + i, mask=t < tiles, other=-1)
            entropy = tl.where(read == block, float("-inf"), entropy)
        to = (pair.to(tl.int64) * tiles + t) * blocks + block
        mine = (t < tiles)[:, None]
        found = product(p.to(keys.dtype), keys, tl.zeros([TILES, WIDTH], tl.float32), PRECISION)
        tl.store(point_key + to[:, None] * width + d[None, :], found.to(point_key.dtype.element_ty), mask=mine & (d < width)[None, :])
        found = product(p.to(values.dtype), values, tl.zeros([TILES, WIDTH_V], tl.float32), PRECISION)
        tl.store(point_value + to[:, None] * width_v + e[None, :], found.to(point_value.dtype.element_ty), mask=mine & (e < width_v)[None, :])
        tl.store(bias + to, entropy, mask=t < tiles)


@torch.library.custom_op("sbpatch::block_points", mutates_args=())
def block_points(
    about: Tensor, key: Tensor, value: Tensor, valid: Tensor, exact: Tensor, tile: int, near: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The points of m blocks of c keys for each of T tiles; arguments as `core.Expansion` has them.

    Returns (B, H, T, m, d) and (B, H, T, m, e) in the dtype of the keys, and the bias (B, H, T, m) float32, minus infinity
    for blocks without keys and those of `exact`. What a tile may not read yet is not written.
    """
    (batch, heads, blocks, size, width), width_v, tiles = key.shape, value.shape[-1], about.shape[2]
    k, v = (x.flatten(2, 3) for x in (key, value))  # no copy: blocks are stretches of keys
    k, v = (plain_rows(x) for x in (k, v))
    about, exact, valid = about.contiguous(), exact.contiguous(), valid.contiguous()
    point_key, point_value = (key.new_empty(batch, heads, tiles, blocks, x) for x in (width, width_v))
    bias = torch.empty(batch, heads, tiles, blocks, dtype=torch.float32, device=key.device)
    many = TILES if max(width, width_v, size) <= 128 else TILES // 2
    _points[(blocks, triton.cdiv(tiles, many), batch * heads)](
        about, k, v, valid, exact, point_key, point_value, bias,
        tiles, blocks, size, tile, near, exact.shape[-1], width, width_v, heads, 0 if len(valid) == 1 else valid.stride(0),
        *about.stride()[:3], *k.stride()[:3], *v.stride()[:3], *exact.stride()[:3],
        TILES=many, SIZE=padded(size), WIDTH=padded(width), WIDTH_V=padded(width_v), PRECISION=precision(k.dtype),
        num_warps=4 if size <= 128 else 8, num_stages=1,
    )  # fmt: skip
    return point_key, point_value, bias


@block_points.register_fake
def _point_shapes(
    about: Tensor, key: Tensor, value: Tensor, valid: Tensor, exact: Tensor, tile: int, near: int
) -> tuple[Tensor, Tensor, Tensor]:
    lead = (*about.shape[:3], key.shape[2])
    return key.new_empty(*lead, key.shape[-1]), key.new_empty(*lead, value.shape[-1]), key.new_empty(*lead, dtype=torch.float32)


differentiable(block_points, plain.block_points)
