"""Keys of a past in blocks of alike ones, all of one size, by repeated halving.

A group of keys is cut in two equal halves at the median along the direction in which its keys differ most, until a group is a
block. Equal sizes keep every block one stretch of memory, so that a step of decoding copies whole blocks, and needs no list of
where each one ends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 3  # of the power method; the cut needs a good direction, not the best one
SAMPLE = 64  # keys of a group that the direction is found from


def halves(keys: Tensor, block: int, real: Tensor | None = None) -> Tensor:
    """An order of keys (B, H, n, d) in which every `block` consecutive ones are alike -> index (B, H, n), int64.

    `real` (B, H, n): False for padding, which gathers in the first blocks. n is `block` times any whole number: where that is
    no power of two, stretches of the sequence that are powers of two are divided each by itself, the longest first.

    Multiply-adds: at most (2 `ITERATIONS` + 1) n d log2(n / block) a head.
    """
    found, start, count = [], 0, keys.shape[2] // block
    while count:
        size = block << (count.bit_length() - 1)
        part = slice(start, start + size)
        found.append(_halved(keys[:, :, part], block, None if real is None else real[:, :, part]) + start)
        start, count = start + size, count - size // block
    return torch.cat(found, dim=-1)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, n, d) at index (B, H, i) along n -> (B, H, i, d); whole rows are copied, which gather does number by number."""
    start = torch.arange(0, x.shape[0] * x.shape[1] * x.shape[2], x.shape[2], device=x.device)
    flat = (index.flatten(0, 1) + start[:, None]).flatten()
    return x.reshape(-1, x.shape[3]).index_select(0, flat).view(*index.shape, x.shape[3])


def _halved(keys: Tensor, block: int, real: Tensor | None) -> Tensor:
    """`halves` of a number of blocks that is a power of two."""
    heads, n, width = keys.shape[:2], keys.shape[2], keys.shape[3]
    x = keys.float()
    order = torch.arange(n, device=keys.device).expand(*heads, n)
    size = n
    while size > block:
        groups = (n // size, size)
        kept = None if real is None else real.unflatten(2, groups)
        within = _along(x.view(*heads, *groups, width), kept).argsort(stable=True, dim=-1)  # (B, H, groups, size)
        index = (within + torch.arange(0, n, size, device=keys.device)[:, None]).flatten(2)
        x, order = rows(x, index), order.gather(2, index)
        real = None if real is None else real.gather(2, index)
        size //= 2
    return order


def _along(x: Tensor, kept: Tensor | None) -> Tensor:
    """Where each key of (B, H, groups, size, d) lies along its group's longest direction; padding before all others."""
    step = max(1, x.shape[-2] // SAMPLE)
    some = x[..., ::step, :]
    if kept is None:
        some = some - some.mean(-2, keepdim=True)
    else:
        weight = kept[..., ::step, None].to(x.dtype)
        some = (some - (some * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp(min=1)) * weight
    farthest = some.square().sum(-1).argmax(-1)  # the power method starts from the key farthest from the mean
    direction = some.gather(-2, farthest[..., None, None].expand(*farthest.shape, 1, x.shape[-1]))
    # products by element: groups are many and small, and a batch of matrix products is slower
    for _ in range(ITERATIONS):
        weight = (some * direction).sum(-1, keepdim=True)
        direction = F.normalize((some * weight).sum(-2, keepdim=True), dim=-1)  # (B, H, groups, 1, d)
    along = (x * direction).sum(-1)
    return along if kept is None else along.masked_fill(~kept, -torch.inf)
