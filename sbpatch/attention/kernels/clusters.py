"""Triton kernels for k-means: the nearest centre of each key, and sums over the members of each cluster, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain
from .common import differentiable, padded, plain_rows, precision, product

KEYS = 128  # keys of a program, or read at once
SPLIT = 4096  # rows of one partial sum: partial sums are added in their order, so the same bits on every run


@triton.jit
def _nearest(
    k, centre, index, score, n, many, width, heads, k_b, k_h, k_n,
    KEYS: tl.constexpr, CENTRES: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    row, d = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, WIDTH)
    keys = tl.load(
        k + (pair // heads) * k_b + (pair % heads) * k_h + row[:, None].to(tl.int64) * k_n + d[None, :],
        mask=(row < n)[:, None] & (d < width)[None, :], other=0.0,
    )  # (n, d)
    best = tl.full([KEYS], float("-inf"), tl.float32)
    found = tl.zeros([KEYS], tl.int32)
    for start in range(0, many, CENTRES):
        c = start + tl.arange(0, CENTRES)
        centres = tl.load(
            centre + pair * many * width + c[None, :] * width + d[:, None],
            mask=(c < many)[None, :] & (d < width)[:, None], other=0.0,
        )  # (d, m)
        half = tl.sum(centres.to(tl.float32) * centres.to(tl.float32), 0) / 2
        level = product(keys, centres, tl.zeros([KEYS, CENTRES], tl.float32), PRECISION) - half[None, :]
        level = tl.where((c < many)[None, :], level, float("-inf"))
        here = tl.max(level, 1)
        which = tl.argmax(level, 1).to(tl.int32) + start
        found = tl.where(here > best, which, found)
        best = tl.maximum(here, best)
    tl.store(index + pair * n + row, found.to(tl.int64), mask=row < n)
    tl.store(score + pair * n + row, best, mask=row < n)


@torch.library.custom_op("sbpatch::nearest_centre", mutates_args=())
def nearest_centre(k: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """As `kmeans.nearest`: k (B, H, n, d), centre (B, H, m, d) -> index int64 and score float32, (B, H, n) both."""
    batch, heads, n, width = k.shape
    k = plain_rows(k)
    centre = centre.to(k.dtype).contiguous()
    index = torch.empty(batch, heads, n, dtype=torch.int64, device=k.device)
    score = torch.empty(batch, heads, n, dtype=torch.float32, device=k.device)
    _nearest[(triton.cdiv(n, KEYS), batch * heads)](
        k, centre, index, score, n, centre.shape[2], width, heads, *k.stride()[:3],
        KEYS=KEYS, CENTRES=64, WIDTH=padded(width), PRECISION=precision(k.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
    return index, score


@nearest_centre.register_fake
def _nearest_shapes(k: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape[:3], dtype=torch.int64), k.new_empty(k.shape[:3], dtype=torch.float32)


@triton.jit
def _sums(
    rows, index, out, n, many, width, heads, splits, rows_b, rows_h, rows_n, index_b, index_h,
    KEYS: tl.constexpr, CENTRES: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    c, e = tl.program_id(0) * CENTRES + tl.arange(0, CENTRES), tl.arange(0, WIDTH)
    split, pair = tl.program_id(1), tl.program_id(2).to(tl.int64)
    index += (pair // heads) * index_b + (pair % heads) * index_h
    rows += (pair // heads) * rows_b + (pair % heads) * rows_h
    total = tl.zeros([CENTRES, WIDTH], tl.float32)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, n), KEYS):
        row = start + tl.arange(0, KEYS)
        own = tl.load(index + row, mask=row < n, other=-1)
        values = tl.load(
            rows + row[:, None].to(tl.int64) * rows_n + e[None, :], mask=(row < n)[:, None] & (e < width)[None, :], other=0.0
        )
        member = own[None, :] == c[:, None]
        total = product(member.to(tl.float32).to(values.dtype), values, total, PRECISION)
    to = ((pair * splits + split) * many + c[:, None]) * width + e[None, :]
    tl.store(out + to, total, mask=(c < many)[:, None] & (e < width)[None, :])


@torch.library.custom_op("sbpatch::cluster_sums", mutates_args=())
def cluster_sums(rows: Tensor, index: Tensor, many: int) -> Tensor:
    """Sum of the rows (B, H, n, e) of each of `many` clusters: (B, H, m, e) float32. index (B, H, n); m or more: of none."""
    batch, heads, n, width = rows.shape
    rows = plain_rows(rows)
    index = index if index.stride(-1) == 1 else index.contiguous()
    splits, centres = triton.cdiv(n, SPLIT), min(128 if width <= 128 else 64, padded(many))
    out = torch.empty(batch, heads, splits, many, width, dtype=torch.float32, device=rows.device)
    _sums[(triton.cdiv(many, centres), splits, batch * heads)](
        rows, index, out, n, many, width, heads, splits, *rows.stride()[:3], *index.stride()[:2],
        KEYS=64, CENTRES=centres, WIDTH=padded(width), SPLIT=SPLIT, PRECISION=precision(rows.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
    return out.sum(2)


@cluster_sums.register_fake
def _sum_shapes(rows: Tensor, index: Tensor, many: int) -> Tensor:
    return rows.new_empty(*rows.shape[:2], many, rows.shape[-1], dtype=torch.float32)


differentiable(cluster_sums, plain.cluster_sums)
