"""Triton kernels for few clusters: keys go to their nearest centres and are summed there in one reading, and centres move.

A Lloyd step is two launches, and the final assignment with the sums of keys and values is one. clusters.py has what any number
of clusters takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain
from .common import operator, padded, plain_rows, precision, product

MOST = 128  # centres that one program compares keys with, and whose sums it holds
SEEN = 4096  # keys whose distances one program ranks
PROGRAMS = 264  # that the keys are split into, about: two for each multiprocessor
LEAST = 256  # keys of one of them


def fits(k: Tensor, many: int) -> bool:
    """Whether so many clusters of rows k (..., n, d) are few and narrow enough for the memory of a multiprocessor."""
    return many <= MOST and k.shape[-1] * k.element_size() <= 256


@triton.jit
def _place(i, n, every):
    """Where the i-th of n keys lies that are taken of all at even strides, as `kmeans.strided` takes them."""
    return ((2 * i.to(tl.int64) + 1) * every // (2 * n)).to(tl.int32)


@triton.jit
def _assigned(
    k, v, centre, mask, index, distance, out, counts,
    n, every, many, width, width_v, heads, splits, step, k_b, k_h, k_n, v_b, v_h, v_n, mask_b,
    VALUES: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr, CENTRES: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k += (pair // heads) * k_b + (pair % heads) * k_h
    v += (pair // heads) * v_b + (pair % heads) * v_h
    mask += (pair // heads) * mask_b
    c, d, e = tl.arange(0, CENTRES), tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    place = centre + (pair * many + c)[None, :] * width + d[:, None]
    centres = tl.load(place, mask=(c < many)[None, :] & (d < width)[:, None], other=0.0)
    centres = centres.to(k.dtype.element_ty)  # (d, m), rounded as the products need them
    norm = tl.sum(centres.to(tl.float32) * centres.to(tl.float32), 0)
    half = tl.where(c < many, 0.5 * norm, float("inf"))
    total = tl.zeros([CENTRES, WIDTH], tl.float32)
    total_v = tl.zeros([CENTRES, WIDTH_V], tl.float32)
    number = tl.zeros([CENTRES, 16], tl.float32)
    ones = tl.full([KEYS, 16], 1.0, tl.float32).to(k.dtype.element_ty)  # members are counted in the matrix units too
    stop = tl.minimum(split * step + step, n)
    for start in range(split * step, stop, KEYS):
        row = start + tl.arange(0, KEYS)
        inside = row < stop
        at = row
        if not VALUES:
            at = _place(row, n, every)
        keys = tl.load(k + at[:, None] * k_n + d[None, :], mask=inside[:, None] & (d < width)[None, :], other=0.0)
        level = product(keys, centres, tl.zeros([KEYS, CENTRES], tl.float32), PRECISION) - half[None, :]  # (n, m)
        best = tl.max(level, 1)
        own = tl.min(tl.where(level == best[:, None], c[None, :], many), 1)
        real = inside
        if MASKED:
            real = real & (tl.load(mask + row, mask=inside, other=0) != 0)
        if VALUES:
            tl.store(index + pair * n + row, own.to(tl.int64), mask=inside)
        else:
            wide = keys.to(tl.float32)
            far = tl.where(real, tl.sum(wide * wide, 1) - 2.0 * best, 0.0)
            tl.store(distance + pair * n + row, far, mask=inside)
        own = tl.where(real, own, -1)
        member = tl.trans(tl.where(own[:, None] == c[None, :], 1.0, 0.0).to(keys.dtype))  # (m, n), one-hot by key
        total = product(member, keys, total, PRECISION)
        number = product(member, ones, number, PRECISION)
        if VALUES:
            values = tl.load(
                v + row[:, None] * v_n + e[None, :], mask=inside[:, None] & (e < width_v)[None, :], other=0.0
            )
            total_v = product(member, values, total_v, PRECISION)
    to = (pair * splits + split) * many + c
    out += to[:, None] * (width + width_v)
    tl.store(out + d[None, :], total, mask=(c < many)[:, None] & (d < width)[None, :])
    if VALUES:
        tl.store(out + width + e[None, :], total_v, mask=(c < many)[:, None] & (e < width_v)[None, :])
    tl.store(counts + to, tl.max(number, 1), mask=c < many)


def _parts(k: Tensor, v: Tensor | None, centre: Tensor, mask: Tensor | None, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of n keys, all where there are values: the index of the centre of each, or without values its squared distance, and what
    each part of the keys adds to the sums (B, H, parts, m, d + e) and numbers (B, H, parts, m) of the clusters.
    """
    (batch, heads, every, width), many = k.shape, centre.shape[2]
    k, centre = plain_rows(k), centre.contiguous()
    v = v if v is None else plain_rows(v)
    width_v = 0 if v is None else v.shape[-1]
    half = k.element_size() == 2
    keys = (128 if max(width, width_v) <= 64 else 64) if half else 32
    splits = max(1, min(round(PROGRAMS / (batch * heads)), n // LEAST))
    step = triton.cdiv(triton.cdiv(n, splits), keys) * keys
    out = torch.empty(batch, heads, splits, many, width + width_v, dtype=torch.float32, device=k.device)
    counts = torch.empty(batch, heads, splits, many, dtype=torch.float32, device=k.device)
    found = torch.empty(batch, heads, n, dtype=torch.float32 if v is None else torch.int64, device=k.device)
    _assigned[(splits, batch * heads)](
        k, k if v is None else v, centre, k if mask is None else mask, found, found, out, counts,
        n, every, many, width, width_v, heads, splits, step, *k.stride()[:3], *(k if v is None else v).stride()[:3],
        0 if mask is None else mask.stride(0),
        VALUES=v is not None, MASKED=mask is not None, KEYS=keys, CENTRES=padded(many), WIDTH=padded(width),
        WIDTH_V=padded(width_v) if width_v else 16, PRECISION=precision(k.dtype), num_warps=8,
        num_stages=3 if half else 2,
    )  # fmt: skip
    return found, out, counts


def _sum_shapes(k: Tensor, v: Tensor, centre: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, n), many = k.shape[:3], centre.shape[2]
    total = k.new_empty(batch, heads, many, k.shape[-1] + v.shape[-1], dtype=torch.float32)
    return k.new_empty(batch, heads, n, dtype=torch.int64), total, k.new_empty(batch, heads, many, dtype=torch.float32)


@operator("assigned_sums", _sum_shapes, plain.assigned_sums)
def assigned_sums(k: Tensor, v: Tensor, centre: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of the centres (B, H, m, d) to each key k (B, H, n, d), (B, H, n) int64, the sums of the keys and values
    v (B, H, n, e) of each, (B, H, m, d + e) float32, and their number, (B, H, m) float32. mask (B, n) bool: keys that count.

    Multiply-adds: n m (2 d + e), in matrix units. Bytes: keys and values once.
    """
    index, total, count = _parts(k, v, centre, mask, k.shape[2])
    return (index, total[:, :, 0], count[:, :, 0]) if total.shape[2] == 1 else (index, total.sum(2), count.sum(2))


@triton.jit
def _moved(
    k, centre, distance, parts, counts, out, n, every, many, width, heads, splits, k_b, k_h, k_n,
    SEEN: tl.constexpr, CENTRES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    k += (pair // heads) * k_b + (pair % heads) * k_h
    c, d, j = tl.arange(0, CENTRES), tl.arange(0, WIDTH), tl.arange(0, SEEN)
    inside = (c < many)[:, None] & (d < width)[None, :]
    total = tl.zeros([CENTRES, WIDTH], tl.float32)
    number = tl.zeros([CENTRES], tl.float32)
    for part in range(0, splits):
        to = (pair * splits + part) * many + c
        total += tl.load(parts + to[:, None] * width + d[None, :], mask=inside, other=0.0)
        number += tl.load(counts + to, mask=c < many, other=0.0)
    place = (pair * many + c)[:, None] * width + d[None, :]
    empty = (number == 0.0) & (c < many)
    turn = tl.where(empty, tl.cumsum(empty.to(tl.int32), 0), 0)  # the t-th empty cluster takes the t-th farthest key
    mean = total / tl.maximum(number, 1.0)[:, None]
    mean = tl.where(empty[:, None], tl.load(centre + place, mask=inside, other=0.0), mean)
    far = tl.load(distance + pair * n + j, mask=j < n, other=0.0)
    for t in range(0, tl.sum(empty.to(tl.int32), 0)):
        farthest, which = tl.max(far, 0), tl.argmax(far, 0)
        far = tl.where(j == which, 0.0, far)
        key = tl.load(k + _place(which, n, every) * k_n + d, mask=d < width, other=0.0).to(tl.float32)
        takes = turn == tl.where(farthest > 0.0, t + 1, -1)
        mean = tl.where(takes[:, None], key[None, :], mean)
    tl.store(out + place, mean, mask=inside)


def _step_shapes(k: Tensor, centre: Tensor, mask: Tensor | None, seen: int) -> Tensor:
    return torch.empty_like(centre, dtype=torch.float32, memory_format=torch.contiguous_format)


@operator("lloyd_step", _step_shapes, None)
def lloyd_step(k: Tensor, centre: Tensor, mask: Tensor | None, seen: int) -> Tensor:
    """The means of the keys that are nearest to each of the centres (B, H, m, d): (B, H, m, d) float32.

    A centre without keys takes one of the keys farthest from theirs, the t-th such the t-th farthest.

    k (B, H, n, d): `seen` of them count, at even strides, at most `SEEN`; with a mask (B, n) bool these are all.
    """
    (batch, heads, every, width), many = k.shape, centre.shape[2]
    k, centre = plain_rows(k), centre.float().contiguous()
    distance, parts, counts = _parts(k, None, centre, mask, seen)
    out = torch.empty_like(centre)
    _moved[(batch * heads,)](
        k, centre, distance, parts, counts, out, seen, every, many, width, heads, parts.shape[2], *k.stride()[:3],
        SEEN=padded(seen), CENTRES=padded(many), WIDTH=padded(width), num_warps=8,
    )  # fmt: skip
    return out
