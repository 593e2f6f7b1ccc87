"""Gradients of attention by tiles over lists of keys and weighted points, in Triton: weights are formed anew, none is kept.

With p_ij the weight of key or point j for query i, o_i its output and g_i the gradient of that output,

    s_ij = p_ij (g_i.v_j - g_i.o_i),   dq_i = scale sum_j s_ij k_j,   dk_j = scale sum_i s_ij q_i,   dv_j = sum_i p_ij g_i,

and the bias of a point gets sum_i s_ij. `_to_queries` computes rows of one tile, in two turns: the logarithm of each row's sum,
then s. `_to_keys` computes one stretch of a tile's keys, or of points, over the rows that read it. Each number is written once,
by one program; PyTorch then adds what a key gets from the tiles that list it.

Multiply-adds: n (L + m) (5 d + 3 e) in matrix units, with float32 sums, where the forward pass has n (L + m) (d + e). Bytes,
beside inputs and gradients: T (L + m) (d + e) float32, of what tiles give to their keys.

`plain.attend_tiles` under autograd is the reference. No GPU has run this yet, so `kernels.GRADIENTS` has to ask for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain
from .common import LOG2_E, padded, precision, product, seen_keys

PROGRAMS = 1024  # about, for points that all tiles share: each then goes through some of the tiles


@triton.jit
def _rows_of(q, query, place, of_out, part, pair, tile, group, size, n, width, width_v, tiles,
             BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr):  # fmt: skip
    """Rows of a tile: queries (M, d) and the gradients of their outputs (M, e), where they lie in (B H n), which are written,
    their places in the sequence and in the tile, and which are the tile's at all."""
    row = part * BLOCK_M + tl.arange(0, BLOCK_M)  # of the tile's group * size rows, head by head
    live, slot, head = row < group * size, row % size, pair * group + row // size
    d, e = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    of_slot = (pair * tiles + tile) * size + slot
    at, to = tl.load(query + of_slot, mask=live, other=0), tl.load(place + of_slot, mask=live, other=n)
    written = live & (to < n)
    start, end = head * n + at, head * n + to
    queries = tl.load(q + start[:, None] * width + d[None, :], mask=live[:, None] & (d < width)[None, :], other=0.0)
    place = of_out + end[:, None] * width_v + e[None, :]
    of_rows = tl.load(place, mask=written[:, None] & (e < width_v)[None, :], other=0.0)
    return queries, of_rows, start, end, written, at, slot, live


@triton.jit
def _points_of(point_key, point_value, point_bias, first, column, here, width, width_v,
               WIDTH: tl.constexpr, WIDTH_V: tl.constexpr):  # fmt: skip
    """Keys (N, d), values (N, e) and bias (N), in units of ln 2, of the first `here` points behind `first`."""
    d, e, inside = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V), column < here
    at = (first + column)[:, None]
    keys = tl.load(point_key + at * width + d[None, :], mask=inside[:, None] & (d < width)[None, :], other=0.0)
    values = tl.load(point_value + at * width_v + e[None, :], mask=inside[:, None] & (e < width_v)[None, :], other=0.0)
    return keys, values, tl.load(point_bias + first + column, mask=inside, other=float("-inf")) * LOG2_E


@triton.jit
def _of_logits(logits, level, of_rows, values, with_out, PRECISION: tl.constexpr):
    """Weights p and gradients s of logits (M, N), from the level (M) that makes weights of them, and g_i.o_i (M)."""
    weight = tl.exp2(logits - level[:, None])
    of_weight = product(of_rows, tl.trans(values), tl.zeros(logits.shape, tl.float32), PRECISION)
    return weight, weight * (of_weight - with_out[:, None])


@triton.jit
def _to_queries(
    q, k, v, query, place, key, valid, mask, point_key, point_value, point_bias, counts, of_out, with_outs, levels, of_q,
    scale, group, size, many, points, width, width_v, n, n_keys, key_heads, tiles, row_blocks,
    key_b, key_h, valid_b, valid_h,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, BY_QUERY: tl.constexpr, POINTS: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, part, pair = (tl.program_id(0) // row_blocks).to(tl.int64), tl.program_id(0) % row_blocks, tl.program_id(1)
    batch, key_head, pair = pair // key_heads, pair % key_heads, pair.to(tl.int64)
    queries, of_rows, start, end, written, at, slot, live = _rows_of(
        q, query, place, of_out, part, pair, tile, group, size, n, width, width_v, tiles,
        BLOCK_M, WIDTH, WIDTH_V,
    )  # fmt: skip
    with_out = tl.load(with_outs + end, mask=written, other=0.0)
    key += batch * key_b + key_head * key_h + tile * many
    valid += batch * valid_b + key_head * valid_h + tile * many * (size if BY_QUERY else 1)
    mask += batch * n_keys
    k += pair * n_keys * width
    v += pair * n_keys * width_v
    d, e = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    level, found = total, tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for turn in tl.static_range(2):
        for unit in range(0, many, BLOCK_N):
            index, seen = seen_keys(
                key, valid, mask, unit + tl.arange(0, BLOCK_N), slot, at, live, many, 1, many, 1, CAUSAL, MASKED, BY_QUERY
            )  # fmt: skip
            keys = tl.load(k + index[:, None] * width + d[None, :], mask=(d < width)[None, :], other=0.0)
            logits = product(queries, tl.trans(keys), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION) * scale
            logits = tl.where(seen, logits, float("-inf"))
            if turn == 0:
                top, total = _merged(top, total, logits)
            else:
                values = tl.load(v + index[:, None] * width_v + e[None, :], mask=(e < width_v)[None, :], other=0.0)
                _, of_logits = _of_logits(logits, level, of_rows, values, with_out, PRECISION)
                found = product(of_logits.to(keys.dtype), keys, found, PRECISION)
        if POINTS:
            here = tl.load(counts + tile)
            for unit in range(0, here, BLOCK_N):
                keys, values, bias = _points_of(
                    point_key, point_value, point_bias, (pair if SHARED else pair * tiles + tile) * points,
                    unit + tl.arange(0, BLOCK_N), here, width, width_v, WIDTH, WIDTH_V,
                )  # fmt: skip
                logits = product(queries, tl.trans(keys), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION) * scale
                logits += bias[None, :]
                if turn == 0:
                    top, total = _merged(top, total, logits)
                else:
                    _, of_logits = _of_logits(logits, level, of_rows, values, with_out, PRECISION)
                    found = product(of_logits.to(keys.dtype), keys, found, PRECISION)
        if turn == 0:  # a row without keys has weights of 0
            level = tl.where(total == 0.0, float("inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)))
    tl.store(levels + end, level, mask=written)
    place = of_q + start[:, None] * width + d[None, :]
    tl.store(place, (found * (scale / LOG2_E)).to(of_q.dtype.element_ty), mask=written[:, None] & (d < width)[None, :])


@triton.jit
def _merged(top, total, logits):
    """The largest of logits (M, N) so far, in units of ln 2, and the sum of their exponentials over it."""
    highest = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, total * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)


@triton.jit
def _to_keys(
    q, k, v, query, place, key, valid, mask, point_key, point_value, point_bias, counts, of_out, with_outs, levels,
    of_key, of_value, of_bias,
    scale, group, size, many, points, width, width_v, n, n_keys, key_heads, tiles, row_blocks, step,
    key_b, key_h, valid_b, valid_h,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, BY_QUERY: tl.constexpr, POINTS: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    run, pair = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    batch, key_head = pair // key_heads, pair % key_heads
    column, columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), points if POINTS else many
    d, e = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    key += batch * key_b + key_head * key_h
    valid += batch * valid_b + key_head * valid_h
    mask += batch * n_keys
    found_key, found_value = tl.zeros([BLOCK_N, WIDTH], tl.float32), tl.zeros([BLOCK_N, WIDTH_V], tl.float32)
    found_bias = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(run * step, tl.minimum(run * step + step, tiles)):
        if POINTS:
            keys, values, bias = _points_of(
                point_key, point_value, point_bias, (pair if SHARED else pair * tiles + tile) * points,
                column, tl.load(counts + tile), width, width_v, WIDTH, WIDTH_V,
            )  # fmt: skip
        else:
            index = tl.load(key + tile * many + column, mask=column < many, other=0)
            place_k = k + (pair * n_keys + index)[:, None] * width + d[None, :]
            keys = tl.load(place_k, mask=(d < width)[None, :], other=0.0)
            place_v = v + (pair * n_keys + index)[:, None] * width_v + e[None, :]
            values = tl.load(place_v, mask=(e < width_v)[None, :], other=0.0)
        for part in range(0, row_blocks):
            queries, of_rows, _, end, written, at, slot, live = _rows_of(
                q, query, place, of_out, part, pair, tile, group, size, n, width, width_v, tiles,
                BLOCK_M, WIDTH, WIDTH_V,
            )  # fmt: skip
            level = tl.load(levels + end, mask=written, other=float("inf"))
            logits = product(queries, tl.trans(keys), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION) * scale
            if POINTS:
                logits += bias[None, :]
            else:
                _, seen = seen_keys(
                    key + tile * many, valid + tile * many * (size if BY_QUERY else 1), mask, column, slot, at, live,
                    many, 1, many, 1, CAUSAL, MASKED, BY_QUERY,
                )  # fmt: skip
                logits = tl.where(seen, logits, float("-inf"))
            with_out = tl.load(with_outs + end, mask=written, other=0.0)
            weight, of_logits = _of_logits(logits, level, of_rows, values, with_out, PRECISION)
            found_value = product(tl.trans(weight).to(of_rows.dtype), of_rows, found_value, PRECISION)
            found_key = product(tl.trans(of_logits).to(queries.dtype), queries, found_key, PRECISION)
            found_bias += tl.sum(of_logits, 0)
    to = (pair * tl.num_programs(1) + run) * columns + column
    inside = (column < columns)[:, None]
    tl.store(
        of_key + to[:, None] * width + d[None, :], found_key * (scale / LOG2_E), mask=inside & (d < width)[None, :]
    )
    tl.store(of_value + to[:, None] * width_v + e[None, :], found_value, mask=inside & (e < width_v)[None, :])
    if POINTS:
        tl.store(of_bias + to, found_bias, mask=column < columns)


def of_tiles(of_out: Tensor, out: Tensor, *inputs: Any) -> list[Tensor | None]:
    """Gradients of each of the arguments `inputs` of `tiles.attend_tiles`, from that of its output; both (B, H, n, e)."""
    q, k, v, *points = _launched(of_out, out, *inputs)
    return [q, k, v, *[None] * 5, *(points or [None] * 3), *[None] * 3]


def of_points(of_out: Tensor, out: Tensor, *inputs: Any) -> list[Tensor | None]:
    """The same of `points.attend_points`."""
    q, _, _, *points = _launched(of_out, out, *plain.points_as_tiles(*inputs))
    return [q, *(x.squeeze(2) for x in points), None]


def of_blocks(of_out: Tensor, out: Tensor, *inputs: Any) -> list[Tensor | None]:
    """The same of `rows.attend_blocks`."""
    *of_all, of_bias = _launched(of_out, out, *plain.blocks_as_tiles(*inputs))
    of_gain = None if inputs[8] is None else of_bias.sum((0, 2, 3))
    return [*of_all[:3], None, None, *of_all[3:], of_bias, of_gain, *[None] * 5]


def _settings(row: int, rows: int) -> dict[str, int]:
    """Sizes of a program by the bytes of a row and the rows of a tile: registers spill least, and shared memory suffices."""
    return {
        "BLOCK_M": min(64 if row <= 256 else 32, padded(rows)),
        "BLOCK_N": 64 if row <= 128 else 32 if row <= 512 else 16,
        "num_warps": 4 if row <= 128 else 8,
        "num_stages": 2 if row <= 256 else 1,
    }


def _shapes(of_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, *(x for x in rest[5:8] if x is not None))]


def _of_tiles(
    of_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, query: Tensor, place: Tensor, key: Tensor,
    valid: Tensor, key_mask: Tensor | None, point_key: Tensor | None, point_value: Tensor | None,
    point_bias: Tensor | None, counts: Tensor | None, scale: float, causal: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k and v, and of the points where there are any."""
    (batch, heads, n, width), (key_heads, n_keys, width_v) = q.shape, (*k.shape[1:3], v.shape[-1])
    (tiles, size), many, group, lead = query.shape[-2:], key.shape[-1], heads // key_heads, (batch, key_heads)
    query, place = (x.expand(*lead, -1, -1).contiguous() for x in (query, place))
    key = key.contiguous().expand(*lead, -1, -1)
    valid = valid.expand(*valid.shape[:-3], tiles, -1, -1).contiguous().expand(*lead, -1, -1, -1)
    q, k, v, of_out = (x.contiguous() for x in (q, k, v, of_out))
    with_outs, levels = (of_out.float() * out.float()).sum(-1), torch.empty(q.shape[:3], device=q.device)
    given = () if point_key is None else (point_key, point_value, point_bias)
    points = [x.contiguous() for x in given if x is not None] or [q] * 3  # of which nothing is read
    shared, most = points[2].shape[2] == 1, points[2].shape[-1] if given else 0
    blocks = _settings(max(width, width_v) * q.element_size(), group * size)
    row_blocks, pairs = triton.cdiv(group * size, blocks["BLOCK_M"]), batch * key_heads
    inputs = (
        q, k, v, query, place, key, valid, query if key_mask is None else key_mask.contiguous(), *points,
        query if counts is None else counts, of_out, with_outs, levels,
    )  # fmt: skip
    numbers = (
        scale * math.log2(math.e), group, size, many, most, width, width_v, n, n_keys, key_heads, tiles, row_blocks,
    )  # fmt: skip
    strides = tuple(stride for x in (key, valid) for stride in x.stride()[:2])
    kinds = {
        "CAUSAL": causal, "MASKED": key_mask is not None, "BY_QUERY": valid.shape[-2] != 1, "SHARED": shared,
        "WIDTH": padded(width), "WIDTH_V": padded(width_v), "PRECISION": precision(q.dtype), **blocks,
    }  # fmt: skip

    of_q = torch.zeros_like(q)
    _to_queries[(tiles * row_blocks, pairs)](*inputs, of_q, *numbers, *strides, POINTS=bool(given), **kinds)

    def to_keys(columns: int, runs: int, pointed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What `runs` runs of tiles give to each of their keys or points: (B, H_k, runs, columns, d or e), and to a bias."""
        lengths = (width, width_v, 1)
        found = [torch.empty(*lead, runs, columns, x, device=q.device) for x in lengths]
        if columns:
            grid = triton.cdiv(columns, blocks["BLOCK_N"]), runs, pairs
            step = triton.cdiv(tiles, runs)
            _to_keys[grid](*inputs, *found, *numbers, step, *strides, POINTS=pointed, **kinds)
        return found[0], found[1], found[2].squeeze(-1)

    of_keys = (_added(x, key, n_keys).to(k.dtype) for x in to_keys(many, tiles, False)[:2])
    if not given:
        return [of_q, *of_keys]
    if not shared:
        return [of_q, *of_keys, *(x.to(y.dtype) for x, y in zip(to_keys(most, tiles, True), points, strict=True))]
    step = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, pairs * triton.cdiv(most, blocks["BLOCK_N"]))))
    found = to_keys(most, triton.cdiv(tiles, step), True)
    return [of_q, *of_keys, *(x.sum(2, keepdim=True).to(y.dtype) for x, y in zip(found, points, strict=True))]


def _added(rows: Tensor, key: Tensor, n: int) -> Tensor:
    """What each of n keys gets of rows (B, H, T, L, d) for the keys (B, H, T, L) that tiles list: (B, H, n, d)."""
    batch, heads, _, _, width = rows.shape
    index = key + n * torch.arange(batch * heads, device=key.device).view(batch, heads, 1, 1)
    total = rows.new_zeros(batch * heads * n, width)
    return total.index_add_(0, index.flatten(), rows.flatten(0, 3)).view(batch, heads, n, width)


_launched = torch.library.custom_op("sbpatch::attend_tiles_gradients", mutates_args=())(_of_tiles)
_launched.register_fake(_shapes)
