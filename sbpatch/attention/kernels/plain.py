"""The kernels' operators in PyTorch's own operations: what tests hold them to, and where their gradients come from.

Arguments and results are those of the operators of the same names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import expansion
from ..core import Expansion, places, repeated, take
from ..patterns import BLOCK, listed

LOWEST = torch.finfo(torch.float32).min


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
    (batch, heads, n, _), key_heads = q.shape, k.shape[1]
    query, place, key = (x.expand(batch, key_heads, -1, -1) for x in (query, place, key))
    keep = valid.expand(batch, key_heads, -1, query.shape[-1], -1)
    if key_mask is not None:
        keep = keep & take(key_mask[:, None, :, None].expand(-1, key_heads, -1, -1), key).mT
    if causal:
        keep = keep & (key[..., None, :] <= query[..., None])
    keys, values = take(k.contiguous(), key).float(), take(v.contiguous(), key).float()  # (B, H_k, T, L, d or e)
    bias = torch.zeros(keep.shape, device=q.device).masked_fill(~keep, -torch.inf)
    if point_key is not None and point_value is not None and point_bias is not None and counts is not None:
        lead = key.shape[:3]
        late = torch.arange(point_bias.shape[-1], device=q.device) >= counts[:, None]
        far = point_bias.expand(*lead, -1).masked_fill(late, -torch.inf)[..., None, :].expand(*keep.shape[:-1], -1)
        bias = torch.cat((bias, far), -1)
        # what lies behind `counts` was never written, and may be anything
        late = late[..., None].expand(*lead, -1, 1)
        keys = torch.cat((keys, point_key.expand(*lead, -1, -1).masked_fill(late, 0).float()), 3)
        values = torch.cat((values, point_value.expand(*lead, -1, -1).masked_fill(late, 0).float()), 3)
    rows = take(q, repeated(query, heads)).float()  # (B, H, T, g, d)
    keys, values, bias = (repeated(x, heads) for x in (keys, values, bias))
    logits = rows @ keys.mT * scale + bias
    weight = (logits - logits.detach().amax(-1, keepdim=True).clamp(min=LOWEST)).exp()
    total = weight.sum(-1, keepdim=True)
    found = (weight @ values) / total.masked_fill(total == 0, 1)
    out = found.new_zeros(batch, heads, n + 1, v.shape[-1])
    index = repeated(place, heads).flatten(2)[..., None].expand(-1, -1, -1, v.shape[-1])
    return out.scatter(2, index, found.flatten(2, 3))[:, :, :n].to(v.dtype)


def attend_points(q: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    key, value, bias = (repeated(x, q.shape[1]).float() for x in (key, value, bias))
    logits = q.float() @ key.mT * scale + bias[..., None, :]
    return (logits.softmax(-1) @ value).to(q.dtype)


def attend_blocks(*inputs: Any) -> Tensor:
    return attend_tiles(*blocks_as_tiles(*inputs))


def blocks_as_tiles(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, exact: Tensor, point_key: Tensor, point_value: Tensor,
    point_bias: Tensor, gain: Tensor | None, scale: float, tile: int, near: int, first: int, block: int,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of `attend_tiles` for those of `attend_blocks`."""
    n, shape = k.shape[2], (point_bias.shape[-1], block)
    key, value = (x[:, :, : shape[0] * block].unflatten(2, shape) for x in (k, v))
    low = Expansion(key, value, exact, exact, tile, near, first, mask)  # lists do not need where the mean queries lie
    tiles = listed(low.read, n)
    bias = point_bias if gain is None else point_bias + gain[:, None, None]
    return (
        q, k, v, tiles.query, places(tiles), tiles.key, tiles.valid, mask, point_key, point_value, bias, low.counts(),
        scale, True,
    )  # fmt: skip


def points_as_tiles(q: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Any, ...]:
    """The same for those of `attend_points`: tiles of queries that list no keys."""
    n, many = q.shape[2], key.shape[2]
    row = torch.arange(-(-n // BLOCK) * BLOCK, device=q.device).view(-1, BLOCK)
    none = row[:, :0]
    return (
        q, key[:, :, :0], value[:, :, :0], row.clamp(max=n - 1), row.clamp(max=n), none, none[:, None].bool(), None,
        key[:, :, None], value[:, :, None], bias[:, :, None], row.new_full((len(row),), many), scale, False,
    )  # fmt: skip


def stretch_means(
    x: Tensor, mask: Tensor | None, size: int, heads: int, first: int, scale: float
) -> tuple[Tensor, Tensor]:
    n = x.shape[2]
    real = (torch.arange(n, device=x.device) >= first).expand(len(x), -1)
    real = (real if mask is None else real & mask[:, :n]).float()
    over = -n % size
    kept = F.pad(x.float() * real[:, None, :, None], (0, 0, 0, over)).unflatten(2, (-1, size)).sum(3)
    count = F.pad(real, (0, over)).unflatten(1, (-1, size)).sum(2)  # (B, s)
    summed = kept.unflatten(1, (heads, -1)).sum(2)
    return scale * summed / (count[:, None, :, None] * (x.shape[1] // heads)).clamp(min=1), count


def block_points(
    about: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, exact: Tensor, tile: int, near: int, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    low = Expansion(key, value, about, exact, tile, near, first, mask)
    point_key, point_value, bias = expansion.points(low, slice(None), key.shape[2])
    return point_key.to(key.dtype), point_value.to(value.dtype), bias


def cluster_sums(a: Tensor, b: Tensor | None, index: Tensor, mask: Tensor | None, many: int) -> tuple[Tensor, Tensor]:
    member = F.one_hot(index, many).float()
    if mask is not None:
        member = member * mask[:, None, :, None]
    rows = a.float() if b is None else torch.cat((a, b), -1).float()
    return member.mT @ rows, member.sum(2)


def assigned_sums(k: Tensor, v: Tensor, centre: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    centre = centre.to(k.dtype).float()  # as the kernel multiplies them
    level = k.detach().float() @ centre.mT - centre.square().sum(-1)[:, :, None] / 2
    index = level.argmax(-1)
    return (index, *cluster_sums(k, v, index, mask, centre.shape[2]))
