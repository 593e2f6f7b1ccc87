"""Triton kernels for k-means: the nearest centre of each key, and sums over the members of each cluster, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain
from .common import operator, padded, plain_rows, precision, product

KEYS = 128  # keys of a program
CENTRES = 64  # centres or clusters that it looks at together
PROGRAMS = 1024  # that `cluster_sums` is split into, about: enough to fill a device
LEAST = 256  # keys of one of them


@triton.jit
def _nearest(
    k, centre, index, score, n, many, width, heads, k_b, k_h, k_n,
    KEYS: tl.constexpr, CENTRES: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    row, d = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, WIDTH)
    place = k + (pair // heads) * k_b + (pair % heads) * k_h + row[:, None] * k_n + d[None, :]
    keys = tl.load(place, mask=(row < n)[:, None] & (d < width)[None, :], other=0.0)  # (n, d)
    best = tl.full([KEYS, CENTRES], float("-inf"), tl.float32)  # by key and place among CENTRES: reduced once, at the end
    found = tl.zeros([KEYS, CENTRES], tl.int32)
    centre += pair * many * width
    for start in range(0, many, CENTRES):
        c = start + tl.arange(0, CENTRES)
        inside = (c < many)[None, :] & (d < width)[:, None]
        centres = tl.load(centre + c[None, :] * width + d[:, None], mask=inside, other=0.0)  # (d, m)
        half = tl.where(c < many, tl.sum(centres.to(tl.float32) * centres.to(tl.float32), 0) / 2, float("inf"))
        level = product(keys, centres, tl.zeros([KEYS, CENTRES], tl.float32), PRECISION) - half[None, :]
        found = tl.where(level > best, start, found)
        best = tl.maximum(level, best)
    most = tl.max(best, 1)
    found = found + tl.arange(0, CENTRES)[None, :]
    found = tl.min(tl.where(best == most[:, None], found, many), 1)
    tl.store(index + pair * n + row, found.to(tl.int64), mask=row < n)
    tl.store(score + pair * n + row, most, mask=row < n)


def _nearest_shapes(k: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape[:3], dtype=torch.int64), k.new_empty(k.shape[:3], dtype=torch.float32)


@operator("nearest_centre", _nearest_shapes, None)
def nearest_centre(k: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """As `kmeans.nearest`: k (B, H, n, d), centre (B, H, m, d) -> index int64 and score float32, (B, H, n) both."""
    batch, heads, n, width = k.shape
    k, centre = plain_rows(k), centre.to(k.dtype).contiguous()
    index = torch.empty(batch, heads, n, dtype=torch.int64, device=k.device)
    score = torch.empty(batch, heads, n, dtype=torch.float32, device=k.device)
    _nearest[(triton.cdiv(n, KEYS), batch * heads)](
        k, centre, index, score, n, centre.shape[2], width, heads, *k.stride()[:3],
        KEYS=KEYS, CENTRES=CENTRES if width <= 128 else CENTRES // 2, WIDTH=padded(width), PRECISION=precision(k.dtype),
        num_warps=8, num_stages=3 if width <= 64 else 2,
    )  # fmt: skip
    return index, score


@triton.jit
def _sums(
    rows, index, mask, out, counts, n, many, width, heads, splits, step,
    rows_b, rows_h, rows_n, index_b, index_h, mask_b,
    MASKED: tl.constexpr, KEYS: tl.constexpr, CENTRES: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    c, e = tl.program_id(0) * CENTRES + tl.arange(0, CENTRES), tl.arange(0, WIDTH)
    split, pair = tl.program_id(1), tl.program_id(2).to(tl.int64)
    index += (pair // heads) * index_b + (pair % heads) * index_h
    rows += (pair // heads) * rows_b + (pair % heads) * rows_h
    total, count = tl.zeros([CENTRES, WIDTH], tl.float32), tl.zeros([CENTRES], tl.float32)
    for start in range(split * step, tl.minimum(split * step + step, n), KEYS):
        row = start + tl.arange(0, KEYS)
        own = tl.load(index + row, mask=row < n, other=-1).to(tl.int32)
        if MASKED:
            own = tl.where(tl.load(mask + (pair // heads) * mask_b + row, mask=row < n, other=0) != 0, own, -1)
        place = rows + row[:, None] * rows_n + e[None, :]
        values = tl.load(place, mask=(row < n)[:, None] & (e < width)[None, :], other=0.0)
        member = tl.where(own[None, :] == c[:, None], 1.0, 0.0)  # (m, n)
        count += tl.sum(member, 1)
        total = product(member.to(values.dtype), values, total, PRECISION)
    to = (pair * splits + split) * many + c
    tl.store(out + to[:, None] * width + e[None, :], total, mask=(c < many)[:, None] & (e < width)[None, :])
    tl.store(counts + to, count, mask=c < many)


def _sum_shapes(rows: Tensor, index: Tensor, mask: Tensor | None, many: int) -> tuple[Tensor, Tensor]:
    lead = (*rows.shape[:2], many)
    return rows.new_empty(*lead, rows.shape[-1], dtype=torch.float32), rows.new_empty(*lead, dtype=torch.float32)


@operator("cluster_sums", _sum_shapes, plain.cluster_sums)
def cluster_sums(rows: Tensor, index: Tensor, mask: Tensor | None, many: int) -> tuple[Tensor, Tensor]:
    """Sum of the rows (B, H, n, e) of each of `many` clusters, (B, H, m, e), and their number, (B, H, m); both float32.

    index (B, H, n); mask (B, n) bool: rows that count. A product with the one-hot matrix, in parts that are added in their
    order: the same bits on every run, as atomic additions would not give them. Multiply-adds: n m e, in matrix units.
    """
    batch, heads, n, width = rows.shape
    rows = plain_rows(rows)
    index = index if index.stride(-1) == 1 else index.contiguous()
    wide = rows.dtype == torch.float32 or width > 128
    centres, keys = min(64 if wide else 128, padded(many)), 32 if wide else 64
    programs = triton.cdiv(many, centres) * batch * heads
    splits = max(1, min(triton.cdiv(PROGRAMS, programs), n // LEAST))
    step = triton.cdiv(triton.cdiv(n, splits), keys) * keys
    out = torch.empty(batch, heads, splits, many, width, dtype=torch.float32, device=rows.device)
    counts = torch.empty(batch, heads, splits, many, dtype=torch.float32, device=rows.device)
    _sums[(triton.cdiv(many, centres), splits, batch * heads)](
        rows, index, rows if mask is None else mask, out, counts, n, many, width, heads, splits, step,
        *rows.stride()[:3], *index.stride()[:2], 0 if mask is None else mask.stride(0),
        MASKED=mask is not None, KEYS=keys, CENTRES=centres, WIDTH=padded(width), PRECISION=precision(rows.dtype),
        num_warps=4, num_stages=2 if wide else 3,
    )  # fmt: skip
    return (out[:, :, 0], counts[:, :, 0]) if splits == 1 else (out.sum(2), counts.sum(2))
