"""Triton kernels for k-means: the nearest centre of each key, and sums over the members of each cluster, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain
from .common import operator, padded, plain_rows, precision, product

KEYS = 128  # keys of a program
PROGRAMS = 792  # that `cluster_sums` is split into, about: enough to fill a device
LEAST = 256  # keys of one of them


@triton.jit
def _nearest(
    k, centre, half, index, score, square, n, many, width, heads, k_b, k_h, k_n,
    KEYS: tl.constexpr, CENTRES: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    row, d = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, WIDTH)
    place = k + (pair // heads) * k_b + (pair % heads) * k_h + row[:, None] * k_n + d[None, :]
    keys = tl.load(place, mask=(row < n)[:, None] & (d < width)[None, :], other=0.0)  # (n, d)
    wide = keys.to(tl.float32)
    tl.store(square + pair * n + row, tl.sum(wide * wide, 1), mask=row < n)
    best = tl.full([KEYS], float("-inf"), tl.float32)
    found = tl.zeros([KEYS], tl.int32)
    centre += pair * many * width
    half += pair * many
    for start in range(0, many, CENTRES):
        c = start + tl.arange(0, CENTRES)
        inside = (c < many)[None, :] & (d < width)[:, None]
        centres = tl.load(centre + c[None, :] * width + d[:, None], mask=inside, other=0.0)  # (d, m)
        bias = tl.load(half + c, mask=c < many, other=float("inf"))
        level = product(keys, centres, tl.zeros([KEYS, CENTRES], tl.float32), PRECISION) - bias[None, :]
        here = tl.max(level, 1)
        which = tl.min(tl.where(level == here[:, None], c[None, :], many), 1)
        found = tl.where(here > best, which, found)
        best = tl.maximum(here, best)
    tl.store(index + pair * n + row, found.to(tl.int64), mask=row < n)
    tl.store(score + pair * n + row, best, mask=row < n)


def _nearest_shapes(k: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    score, square = (k.new_empty(k.shape[:3], dtype=torch.float32) for _ in range(2))
    return k.new_empty(k.shape[:3], dtype=torch.int64), score, square


@operator("nearest_centre", _nearest_shapes, None)
def nearest_centre(k: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `kmeans.nearest`: k (B, H, n, d), centre (B, H, m, d) -> index int64, score and |k|^2 float32, (B, H, n) each."""
    batch, heads, n, width = k.shape
    k, centre = plain_rows(k), centre.to(k.dtype).contiguous()
    half = centre.float().square().sum(-1) / 2
    index = torch.empty(batch, heads, n, dtype=torch.int64, device=k.device)
    score, square = (torch.empty(batch, heads, n, dtype=torch.float32, device=k.device) for _ in range(2))
    keys = KEYS if width * k.element_size() <= 512 else KEYS // 2
    _nearest[(triton.cdiv(n, keys), batch * heads)](
        k, centre, half, index, score, square, n, centre.shape[2], width, heads, *k.stride()[:3],
        KEYS=keys, CENTRES=64 if width <= 128 else 32, WIDTH=padded(width), PRECISION=precision(k.dtype),
        num_warps=4, num_stages=3 if width <= 64 else 2,
    )  # fmt: skip
    return index, score, square


@triton.jit
def _sums(
    a, b, index, mask, out, counts, n, many, width_a, width_b, heads, splits, step,
    a_b, a_h, a_n, b_b, b_h, b_n, index_b, index_h, mask_b,
    BOTH: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr, CENTRES: tl.constexpr,
    WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    c, d, e = tl.program_id(0) * CENTRES + tl.arange(0, CENTRES), tl.arange(0, WIDTH_A), tl.arange(0, WIDTH_B)
    split, pair = tl.program_id(1), tl.program_id(2).to(tl.int64)
    index += (pair // heads) * index_b + (pair % heads) * index_h
    a += (pair // heads) * a_b + (pair % heads) * a_h
    b += (pair // heads) * b_b + (pair % heads) * b_h
    mask += (pair // heads) * mask_b
    total_a = tl.zeros([CENTRES, WIDTH_A], tl.float32)
    total_b = tl.zeros([CENTRES, WIDTH_B], tl.float32)
    times = tl.zeros([CENTRES, KEYS], tl.float32)  # by place among KEYS: added up once, at the end
    stop = tl.minimum(split * step + step, n)
    later = split * step + tl.arange(0, KEYS)
    following = tl.load(index + later, mask=later < stop, other=-1).to(tl.int32)
    for start in range(split * step, stop, KEYS):
        row = start + tl.arange(0, KEYS)
        own = following
        following = tl.load(index + row + KEYS, mask=row + KEYS < stop, other=-1).to(tl.int32)  # while this one is used
        if MASKED:
            own = tl.where(tl.load(mask + row, mask=row < stop, other=0) != 0, own, -1)
        member = tl.where(own[None, :] == c[:, None], 1.0, 0.0)  # (m, n)
        times += member
        rows = tl.load(
            a + row[:, None] * a_n + d[None, :], mask=(row < stop)[:, None] & (d < width_a)[None, :], other=0.0
        )
        total_a = product(member.to(rows.dtype), rows, total_a, PRECISION)
        if BOTH:
            more = tl.load(
                b + row[:, None] * b_n + e[None, :], mask=(row < stop)[:, None] & (e < width_b)[None, :], other=0.0
            )
            total_b = product(member.to(more.dtype), more, total_b, PRECISION)
    to = (pair * splits + split) * many + c
    out += to[:, None] * (width_a + width_b)
    tl.store(out + d[None, :], total_a, mask=(c < many)[:, None] & (d < width_a)[None, :])
    if BOTH:
        tl.store(out + width_a + e[None, :], total_b, mask=(c < many)[:, None] & (e < width_b)[None, :])
    tl.store(counts + to, tl.sum(times, 1), mask=c < many)


def _sum_shapes(a: Tensor, b: Tensor | None, index: Tensor, mask: Tensor | None, many: int) -> tuple[Tensor, Tensor]:
    width = a.shape[-1] + (0 if b is None else b.shape[-1])
    shapes = (*a.shape[:2], many, width), (*a.shape[:2], many)
    return a.new_empty(shapes[0], dtype=torch.float32), a.new_empty(shapes[1], dtype=torch.float32)


@operator("cluster_sums", _sum_shapes, plain.cluster_sums)
def cluster_sums(a: Tensor, b: Tensor | None, index: Tensor, mask: Tensor | None, many: int) -> tuple[Tensor, Tensor]:
    """Sums of the rows a (B, H, n, d), and b (B, H, n, e) beside them, of each of `many` clusters, and their number.

    index (B, H, n); mask (B, n) bool: rows that count. Returns (B, H, m, d + e) and (B, H, m), both float32.

    A product with the one-hot matrix, in parts that are added in their order: the same bits on every run, as atomic additions
    would not give them. Multiply-adds: n m (d + e), in matrix units.
    """
    batch, heads, n, width = a.shape
    width_b = 0 if b is None else b.shape[-1]
    a = plain_rows(a)
    b = a if b is None else plain_rows(b)
    index = index if index.stride(-1) == 1 else index.contiguous()
    wide = a.dtype == torch.float32 or max(width, width_b) > 64
    centres, keys = min(64, padded(many)), 32 if wide else 64
    programs = triton.cdiv(many, centres) * batch * heads
    splits = max(1, min(triton.cdiv(PROGRAMS, programs), n // LEAST))
    step = triton.cdiv(triton.cdiv(n, splits), keys) * keys
    out = torch.empty(batch, heads, splits, many, width + width_b, dtype=torch.float32, device=a.device)
    counts = torch.empty(batch, heads, splits, many, dtype=torch.float32, device=a.device)
    _sums[(triton.cdiv(many, centres), splits, batch * heads)](
        a, b, index, a if mask is None else mask, out, counts, n, many, width, width_b, heads, splits, step,
        *a.stride()[:3], *b.stride()[:3], *index.stride()[:2], 0 if mask is None else mask.stride(0),
        BOTH=width_b > 0, MASKED=mask is not None, KEYS=keys, CENTRES=centres, WIDTH_A=padded(width),
        WIDTH_B=padded(width_b) if width_b else 16, PRECISION=precision(a.dtype),
        num_warps=4, num_stages=2 if wide else 3,
    )  # fmt: skip
    return (out[:, :, 0], counts[:, :, 0]) if splits == 1 else (out.sum(2), counts.sum(2))
