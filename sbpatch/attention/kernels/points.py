"""The Triton kernel for few points that all queries of a head share: a program holds them while tiles of queries pass.

There are few enough for one softmax, and none is read twice. rows.py has what any number of points takes.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..core import output_of
from . import gradients, plain, rows
from .common import LOG2_E, operator, padded, plain_rows, precision, product

PROGRAMS = 792  # about: six for each multiprocessor
ROWS = 64  # queries of a tile
HELD = 1 << 16  # points times width times the square of a number's bytes: what registers and memory hold


@triton.jit
def _shared(
    q, key, value, bias, out, scale, group, n, many, width, width_v, heads, step, q_b, q_h, q_n,
    ROWS: tl.constexpr, POINTS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    m, d, e = tl.arange(0, POINTS), tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    in_d, in_e = d < width, e < width_v
    own = (batch * (heads // group) + head // group) * many
    key += own * width
    value += own * width_v
    bias += own
    keys = tl.load(key + m[None, :] * width + d[:, None], mask=(m < many)[None, :] & in_d[:, None], other=0.0)  # (d, m)
    values = tl.load(value + m[:, None] * width_v + e[None, :], mask=(m < many)[:, None] & in_e[None, :], other=0.0)
    level = tl.load(bias + m, mask=m < many, other=float("-inf")) * LOG2_E
    q += batch * q_b + head * q_h
    out += (batch * n * heads + head) * width_v
    stop = tl.minimum(part * step + step, n)
    for start in range(part * step, stop, ROWS):
        at = start + tl.arange(0, ROWS)
        live = at < stop
        queries = tl.load(q + at[:, None] * q_n + d[None, :], mask=live[:, None] & in_d[None, :], other=0.0)  # (M, d)
        logits = product(queries, keys, tl.zeros([ROWS, POINTS], tl.float32), PRECISION) * scale + level[None, :]
        top = tl.max(logits, 1)
        weight = tl.exp2(logits - tl.where(top == float("-inf"), 0.0, top)[:, None])
        total = tl.sum(weight, 1)
        found = product(weight.to(values.dtype), values, tl.zeros([ROWS, WIDTH_V], tl.float32), PRECISION)
        found = found / tl.where(total == 0.0, 1.0, total)[:, None]
        place = out + at.to(tl.int64)[:, None] * (heads * width_v) + e[None, :]
        tl.store(place, found.to(out.dtype.element_ty), mask=live[:, None] & in_e[None, :])


def _shapes(q: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    return output_of(q, value)


@operator("attend_points", _shapes, plain.attend_points, gradients.of_points)
def attend_points(q: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """q (B, H, n, d), key and value (B, H_k, m, d or e) of its dtype, bias (B, H_k, m) float32 -> (B, H, n, e).

    Multiply-adds: n m (d + e), in matrix units. Bytes: queries and outputs once.
    """
    (batch, heads, n, width), (key_heads, many), width_v = q.shape, key.shape[1:3], value.shape[-1]
    widest, points = padded(max(width, width_v)), padded(many)
    if points * widest * q.element_size() ** 2 > HELD:
        return rows.of_points(q, key, value, bias, scale)
    q, key, value, bias = plain_rows(q), key.contiguous(), value.contiguous(), bias.contiguous()
    out = output_of(q, value)
    step = triton.cdiv(triton.cdiv(n, max(1, round(PROGRAMS / (batch * heads)))), ROWS) * ROWS
    _shared[(triton.cdiv(n, step), batch * heads)](
        q, key, value, bias, out, scale * math.log2(math.e), heads // key_heads, n, many, width, width_v, heads, step,
        *q.stride()[:3],
        ROWS=ROWS, POINTS=points, WIDTH=padded(width), WIDTH_V=padded(width_v), PRECISION=precision(q.dtype),
        num_warps=4, num_stages=3 if widest * q.element_size() <= 128 else 2,
    )  # fmt: skip
    return out
