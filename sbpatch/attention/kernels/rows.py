"""The Triton kernel for consecutive tiles of queries: points that all share, or blocks of the past (attention/blocks.py).

One program computes `BLOCK_M` rows of one tile, the queries of all heads that share its keys side by side. It reads stretches
of keys, `BLOCK_N` at a time, and needs no lists: near keys and the tile's best blocks, then what needs a mask, the tile itself
and the first tokens, then the points. Multiply-adds: rows (keys + points) (d + e), in matrix units, with float32 sums.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..core import output_of
from . import gradients, plain
from .common import LOG2_E, online, operator, padded, plain_rows, precision, product, stages

ROWS = 128  # queries of a tile, where all read the same points


@triton.jit
def _rows(
    q, k, v, mask, exact, point_key, point_value, point_bias, gain, out,
    scale, group, n, tile, near, first, block, blocks, listed, width, width_v, key_heads,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    KEYS: tl.constexpr, POINTS: tl.constexpr, MASKED: tl.constexpr, GAIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(tile * group, BLOCK_M)
    tiles = tl.num_programs(0) // row_blocks
    t = tiles - 1 - tl.program_id(0) // row_blocks  # the last tiles first: they read most
    part = tl.program_id(0) % row_blocks
    pair = tl.program_id(1).to(tl.int64)
    batch, key_head = pair // key_heads, pair % key_heads
    start = t * tile
    row = part * BLOCK_M + tl.arange(0, BLOCK_M)  # of the tile's tile * group rows, token by token
    at, head = start + row // group, key_head * group + row % group
    live = (row < tile * group) & (at < n)
    d, e, j = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V), tl.arange(0, BLOCK_N)
    in_d, in_e = d < width, e < width_v
    place = q + batch * q_b + head[:, None] * q_h + at[:, None] * q_n + d[None, :]
    queries = tl.load(place, mask=live[:, None] & in_d[None, :], other=0.0)  # (M, d)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
    past = tl.maximum(start - near, 0)  # where the near keys begin

    if KEYS:
        k += batch * k_b + key_head * k_h
        v += batch * v_b + key_head * v_h
        mask += batch * n
        exact += (pair * tiles + t) * listed
        close, each = (start - past) // BLOCK_N, block // BLOCK_N  # stretches of near keys, and of a block
        for unit in range(0, close + tl.minimum(listed, past // block) * each):
            far = tl.maximum(unit - close, 0)
            chosen = tl.load(exact + far // each, mask=unit >= close, other=0).to(tl.int32)
            index = tl.where(unit < close, past + unit * BLOCK_N, chosen * block + far % each * BLOCK_N) + j
            keep = (index >= first) | (unit < close)  # the first tokens come by themselves, where they are not near
            if MASKED:
                # There may be fewer blocks with real keys than listed.
                keep = keep & ((unit < close) | (chosen < blocks))
                keep = keep & (tl.load(mask + index, mask=index < n, other=0) != 0)
            keys = tl.load(k + index[None, :] * k_n + d[:, None], mask=in_d[:, None] & (index < n)[None, :], other=0.0)
            logits = product(queries, keys, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
            logits = tl.where(keep[None, :], logits, float("-inf"))
            values = tl.load(
                v + index[:, None] * v_n + e[None, :], mask=in_e[None, :] & (index < n)[:, None], other=0.0
            )
            accumulator, top, total = online(accumulator, top, total, logits, scale, values, PRECISION)
        last = tl.minimum(tl.minimum((part * BLOCK_M + BLOCK_M - 1) // group + 1, tile) + start, n)
        own = (last - start + BLOCK_N - 1) // BLOCK_N
        lead = (tl.minimum(first, past) + BLOCK_N - 1) // BLOCK_N
        for unit in range(0, own + lead):
            index = tl.where(unit < own, start + unit * BLOCK_N, (unit - own) * BLOCK_N) + j
            keep = index < tl.where(unit < own, last, tl.minimum(first, past))
            if MASKED:
                keep = keep & (tl.load(mask + index, mask=keep, other=0) != 0)
            keys = tl.load(k + index[None, :] * k_n + d[:, None], mask=in_d[:, None] & keep[None, :], other=0.0)
            logits = product(queries, keys, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
            logits = tl.where(keep[None, :] & (index[None, :] <= at[:, None]), logits, float("-inf"))
            values = tl.load(v + index[:, None] * v_n + e[None, :], mask=in_e[None, :] & keep[:, None], other=0.0)
            accumulator, top, total = online(accumulator, top, total, logits, scale, values, PRECISION)

    if POINTS:
        many = past // block if KEYS else blocks
        before = (pair * tiles + t) * blocks if KEYS else pair * blocks  # points of other tiles
        point_key += before * width
        point_value += before * width_v
        point_bias += before
        more = tl.load(gain + key_head) * LOG2_E if GAIN else 0.0
        for unit in range(0, many, BLOCK_N):
            index = unit + j
            bias = tl.load(point_bias + index, mask=index < many, other=float("-inf")) * LOG2_E + more
            inside = index < many
            keys = tl.load(
                point_key + index[None, :] * width + d[:, None], mask=inside[None, :] & in_d[:, None], other=0.0
            )
            logits = product(queries, keys, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION) * scale + bias[None, :]
            values = tl.load(
                point_value + index[:, None] * width_v + e[None, :], mask=inside[:, None] & in_e[None, :], other=0.0
            )
            accumulator, top, total = online(accumulator, top, total, logits, 1.0, values, PRECISION)

    found = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
    place = out + ((batch * n + at) * key_heads * group + head)[:, None] * width_v + e[None, :]
    tl.store(place, found.to(out.dtype.element_ty), mask=live[:, None] & in_e[None, :])


def _settings(width: int, size: int, rows: int, stretch: int) -> dict[str, int]:
    """Sizes of a program by head width, bytes of a number, rows of a tile, and what lengths of stretches are multiples of.

    The best of eleven on an H200; with fewer registers a second program fits beside each.
    """
    block = 128 if rows >= 128 and width <= 128 else min(64, padded(rows))
    found = {
        "BLOCK_M": block,
        "BLOCK_N": min(32, stretch & -stretch),
        "num_warps": 4 if width <= 128 else 8,
        "num_stages": stages(width * size),
    }
    return found | ({"maxnreg": 168} if width <= 64 and block == 128 else {})


def fits(block: int) -> bool:
    """Whether stretches of a multiple of so many keys go into the matrix units."""
    return block % 16 == 0


Lengths = tuple[int, int, int, int]  # tile, near, first, block


def _launch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, exact: Tensor | None, points: tuple[Tensor, Tensor, Tensor],
    gain: Tensor | None, scale: float, lengths: Lengths,
) -> Tensor:  # fmt: skip
    """`points`: key and value (B, H_k, T, m, d or e) and bias (B, H_k, T, m), or without T where all tiles share them.

    Few arguments: each costs a launch more than a microsecond of the host's time.
    """
    (batch, heads, n, width), (key_heads, width_v) = q.shape, (k.shape[1], v.shape[-1])
    q, k, v = (plain_rows(x) for x in (q, k, v))
    key, value, bias = (x.contiguous() for x in points)
    group, tile = heads // key_heads, lengths[0]
    settings = _settings(max(width, width_v), q.element_size(), group * tile, lengths[3])
    out = output_of(q, v)
    grid = triton.cdiv(n, tile) * triton.cdiv(group * tile, settings["BLOCK_M"]), batch * key_heads
    _rows[grid](
        q, k, v, q if mask is None else mask.contiguous(), q if exact is None else exact.contiguous(), key, value, bias,
        q if gain is None else gain, out, scale * math.log2(math.e), group, n, *lengths, bias.shape[-1],
        0 if exact is None else exact.shape[-1], width, width_v, key_heads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        KEYS=exact is not None, POINTS=bias.shape[-1] > 0, MASKED=mask is not None, GAIN=gain is not None,
        WIDTH=padded(width), WIDTH_V=padded(width_v), PRECISION=precision(q.dtype), **settings,
    )  # fmt: skip
    return out


def of_points(q: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """As `points.attend_points`, for any number of points."""
    return _launch(q, key, value, None, None, (key, value, bias), None, scale, (ROWS, 0, 0, ROWS))


def _of_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, exact: Tensor, point_key: Tensor, point_value: Tensor,
    point_bias: Tensor, gain: Tensor | None, scale: float, tile: int, near: int, first: int, block: int,
) -> Tensor:  # fmt: skip
    return output_of(q, v)


@operator("attend_blocks", _of_blocks, plain.attend_blocks, gradients.of_blocks)
def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, exact: Tensor, point_key: Tensor, point_value: Tensor,
    point_bias: Tensor, gain: Tensor | None, scale: float, tile: int, near: int, first: int, block: int,
) -> Tensor:  # fmt: skip
    """Causal attention of tiles over what `core.Expansion` says: exact, tile, near and first are its own; block its c.

    q (B, H, n, d), k and v (B, H_k, n, d or e), mask (B, n) bool, points as `block_points` gives them, gain (H_k,) float32
    nats added to the points' bias -> (B, H, n, e).
    """
    points = point_key, point_value, point_bias
    return _launch(q, k, v, mask, exact, points, gain, scale, (tile, near, first, block))
