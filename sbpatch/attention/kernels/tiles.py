"""The Triton kernel behind `attend`: tiles of queries against a list of keys and weighted points, by an online softmax.

One program computes up to `BLOCK_M` rows of one tile, the queries of all heads that share its keys. It walks over the list of
keys, gathering them by index, and then over the points, which lie together. Nothing but the output is written.

Multiply-adds: rows (L + m) (d + e) in matrix units, float32 sums. Bytes from memory: each tile's (L + m) (d + e), most of them
from the cache of the device, as neighbouring tiles read much the same.

`fused.over_tiles` is the same in PyTorch's own operations, and the reference.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..core import output_of
from . import gradients, plain
from .common import LOG2_E, online, operator, padded, plain_rows, precision, product, seen_keys, stages


@triton.jit
def _attend(
    q, k, v, query, place, key, valid, mask, point_key, point_value, point_bias, counts, out,
    scale, group, size, listed, width, width_v, n, key_heads, row_blocks,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    query_b, query_h, query_t, query_g, place_b, place_h, place_t, place_g,
    key_b, key_h, key_t, key_l, valid_b, valid_h, valid_t, valid_g, valid_l, mask_b,
    point_key_b, point_key_h, point_key_t, point_key_m, point_value_b, point_value_h, point_value_t, point_value_m,
    bias_b, bias_h, bias_t, bias_m, out_b, out_h, out_n,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, BY_QUERY: tl.constexpr, POINTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, part = (tl.program_id(0) // row_blocks).to(tl.int64), tl.program_id(0) % row_blocks
    batch, key_head = (tl.program_id(1) // key_heads).to(tl.int64), (tl.program_id(1) % key_heads).to(tl.int64)
    row = part * BLOCK_M + tl.arange(0, BLOCK_M)  # of the tile's group * size rows, head by head
    live = row < group * size
    head, slot = key_head * group + row // size, row % size
    at = tl.load(query + batch * query_b + key_head * query_h + tile * query_t + slot * query_g, mask=live, other=0)
    to = tl.load(place + batch * place_b + key_head * place_h + tile * place_t + slot * place_g, mask=live, other=n)
    d, e = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    in_d, in_e = d < width, e < width_v
    queries = tl.load(
        q + batch * q_b + head[:, None] * q_h + at[:, None] * q_n + d, mask=live[:, None] & in_d[None, :], other=0.0
    )  # (M, d)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)

    key += batch * key_b + key_head * key_h + tile * key_t
    valid += batch * valid_b + key_head * valid_h + tile * valid_t
    k += batch * k_b + key_head * k_h
    v += batch * v_b + key_head * v_h
    for start in range(0, listed, BLOCK_N):
        index, seen = seen_keys(
            key, valid, mask + batch * mask_b, start + tl.arange(0, BLOCK_N), slot, at, live,
            listed, key_l, valid_g, valid_l, CAUSAL, MASKED, BY_QUERY,
        )  # fmt: skip
        keys = tl.load(k + index[None, :] * k_n + d[:, None], mask=in_d[:, None], other=0.0)  # (d, N)
        logits = product(queries, keys, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        logits = tl.where(seen, logits, float("-inf"))
        values = tl.load(v + index[:, None] * v_n + e[None, :], mask=in_e[None, :], other=0.0)  # (N, e)
        accumulator, top, total = online(accumulator, top, total, logits, scale, values, PRECISION)

    if POINTS:
        many = tl.load(counts + tile)
        point_key += batch * point_key_b + key_head * point_key_h + tile * point_key_t
        point_value += batch * point_value_b + key_head * point_value_h + tile * point_value_t
        point_bias += batch * bias_b + key_head * bias_h + tile * bias_t
        for start in range(0, many, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            inside = column < many
            bias = tl.load(point_bias + column * bias_m, mask=inside, other=float("-inf"))
            keys = tl.load(
                point_key + column[None, :] * point_key_m + d[:, None], mask=inside[None, :] & in_d[:, None], other=0.0
            )
            logits = (
                product(queries, keys, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION) * scale
                + bias[None, :] * LOG2_E
            )
            values = tl.load(
                point_value + column[:, None] * point_value_m + e[None, :],
                mask=inside[:, None] & in_e[None, :], other=0.0,
            )  # fmt: skip
            accumulator, top, total = online(accumulator, top, total, logits, 1.0, values, PRECISION)

    found = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
    written = live & (to < n)
    where = out + batch * out_b + head[:, None] * out_h + to[:, None] * out_n + e[None, :]
    tl.store(where, found.to(out.dtype.element_ty), mask=written[:, None] & in_e[None, :])


def _settings(row: int, rows: int) -> dict[str, int]:
    """Sizes of a program by the bytes of a row of keys or values and by the rows of a tile."""
    block = 128 if rows >= 128 and row <= 256 else min(64, padded(rows))
    return {
        "BLOCK_M": block,
        "BLOCK_N": 64 if row <= 256 else 32,
        "num_warps": 8 if block == 128 else 4,
        "num_stages": stages(row),
    }


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, query: Tensor, place: Tensor, key: Tensor, valid: Tensor, key_mask: Tensor | None,
    point_key: Tensor | None, point_value: Tensor | None, point_bias: Tensor | None, counts: Tensor | None,
    scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    return output_of(q, v)


@operator("attend_tiles", _shapes, plain.attend_tiles, gradients.of_tiles)
def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query: Tensor,
    place: Tensor,
    key: Tensor,
    valid: Tensor,
    key_mask: Tensor | None,
    point_key: Tensor | None,
    point_value: Tensor | None,
    point_bias: Tensor | None,
    counts: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """Attention of all tiles over their keys and points.

    Args:
        q, k, v: (B, H, n, d), (B, H_k, n_k, d), (B, H_k, n_k, e), the last dimension without gaps.
        query, place: (T, g) or (B, H_k, T, g) int64: rows of q, and rows of the output; n is written nowhere.
        key, valid: (..., T, L) int64 and (..., T, 1 or g, L) bool, see `core.Tiles`.
        key_mask: (B, n_k) bool, True for real keys.
        point_key, point_value, point_bias: (B, H_k, T or 1, m, d), (..., m, e) in the dtype of q, and (..., m) float32.
        counts: (T,) int64, how many points each tile reads, the first ones.

    Returns:
        (B, H, n, e), laid out as by SDPA.
    """
    (batch, heads, n, width), (key_heads, width_v) = q.shape, (k.shape[1], v.shape[-1])
    tiles, size = query.shape[-2:]
    group, lead = heads // key_heads, (batch, key_heads, tiles)
    out = output_of(q, v)
    settings = _settings(max(width, width_v) * q.element_size(), group * size)
    row_blocks = triton.cdiv(group * size, settings["BLOCK_M"])
    query, place, key = (x.expand(*lead, -1) for x in (query, place, key))
    valid = valid.expand(*lead, -1, -1)
    by_query = valid.shape[-2] != 1
    q, k, v = (plain_rows(x) for x in (q, k, v))
    pointed = point_key is not None
    if point_key is None or point_value is None or point_bias is None or counts is None:
        point_key = point_value = q[:, :, None]  # never read
        point_bias, counts = q[:, :, None, :, 0], query
    point_key, point_value, point_bias = (
        x.expand(*lead, *x.shape[3:]) if pointed else x for x in (point_key, point_value, point_bias)
    )
    _attend[(tiles * row_blocks, batch * key_heads)](
        q, k, v, query, place, key, valid, query if key_mask is None else key_mask,
        point_key, point_value, point_bias, counts, out,
        scale * math.log2(math.e), group, size, key.shape[-1], width, width_v, n, key_heads, row_blocks,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *query.stride(), *place.stride(), *key.stride(), *valid.stride(),
        0 if key_mask is None else key_mask.stride(0),
        *point_key.stride()[:4], *point_value.stride()[:4], *point_bias.stride(), *out.stride()[:3],
        CAUSAL=causal, MASKED=key_mask is not None, BY_QUERY=by_query, POINTS=pointed,
        WIDTH=padded(width), WIDTH_V=padded(width_v), PRECISION=precision(q.dtype), **settings,
    )  # fmt: skip
    return out
