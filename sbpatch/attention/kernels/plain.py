"""The kernels' operators in PyTorch's own operations: what tests hold them to, and where their gradients come from.

Arguments and results are those of the operators of the same names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import repeated, take

LEAST = -200.0  # ln p below which a key adds nothing to the entropy, not even its gradient
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
    """The first result alone: (B, H, n, e)."""
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


def stretch_means(x: Tensor, mask: Tensor | None, size: int, heads: int) -> Tensor:
    n = x.shape[2]
    real = torch.ones(1, n, device=x.device) if mask is None else mask.float()
    over = -n % size
    kept = F.pad(x.float() * real[:, None, :, None], (0, 0, 0, over)).unflatten(2, (-1, size)).sum(3)
    summed = kept.unflatten(1, (heads, -1)).sum(2)
    count = F.pad(real, (0, over)).unflatten(1, (-1, size)).sum(2)[:, None, :, None] * (x.shape[1] // heads)
    return summed / count.clamp(min=1)


def block_points(
    about: Tensor, key: Tensor, value: Tensor, valid: Tensor, exact: Tensor, tile: int, near: int
) -> tuple[Tensor, Tensor, Tensor]:
    tiles, blocks, size = about.shape[2], *key.shape[2:4]
    logits = torch.einsum("bhmcd,bhtd->bhtmc", key.float(), about).masked_fill(~valid[:, :, None], LOWEST)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    bias = -(p * log_p.clamp(min=LEAST)).sum(-1)
    start = tile * torch.arange(tiles, device=about.device)
    read = torch.arange(blocks + 1, device=about.device) < ((start - near).clamp(min=0) // size)[:, None]
    read = read.expand(*exact.shape[:3], -1).scatter(-1, exact.clamp(max=blocks), False)[..., :blocks]
    found = (torch.einsum("bhtmc,bhmcx->bhtmx", p, x.float()).to(x.dtype) for x in (key, value))
    return (*found, bias.masked_fill(~(read & valid.any(-1)[:, :, None]), -torch.inf))  # type: ignore[return-value]


def cluster_sums(rows: Tensor, index: Tensor, many: int) -> Tensor:
    member = F.one_hot(index.clamp(max=many), many + 1)[..., :many].float()
    return member.mT @ rows.float()
