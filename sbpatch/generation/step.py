"""One step of decoding over a past in blocks: the best blocks and the recent tokens exactly, every other block as one point.

    |■■■■|░░░░|▓▓▓▓|░░░░|▓▓▓▓|░░░░|────────|     the past as one new token reads it
     └first     └ best exactly  └ points └ recent

A point stands at the mean of its block's keys, with the mean of their values and the logarithm of their number as bias: by
Jensen's inequality it never weighs more than its keys do. The same logits rank the blocks. Heads that share keys share the
choice: a block's rank is its share of the softmax over all points, summed over the heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Past(NamedTuple):
    """What a step reads: keys (B, H, N, d) and values (B, H, N, e) in memory of N tokens, of which n are in use.

    The first m blocks of `block` tokens come first, each a stretch of memory, the very first of them always read exactly; then
    the recent tokens, from m * block to n. `key` (B, H, m, d) and `value` (B, H, m, e) are the means of the blocks, float32.
    `real` (B, H, N // block, block): False for padding inside blocks; `recent` (B, n - m * block) that of the recent tokens;
    `bias` (B, H, m): ln of the real keys of each block. All three None where there is no padding.
    """

    keys: Tensor
    values: Tensor
    tokens: int
    block: int
    key: Tensor
    value: Tensor
    real: Tensor | None = None
    recent: Tensor | None = None
    bias: Tensor | None = None

    def read(self, best: int) -> int:
        """Keys and values that a step reads with so many blocks exactly."""
        count = self.key.shape[2]
        return self.tokens if best >= count else count + (best - count) * self.block + self.tokens


class Scratch:
    """Memory for the blocks that a step copies, used again by the next one, as getting it anew takes longer than the copy."""

    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def of(self, name: str, like: Tensor, rows: int) -> Tensor:
        """(rows, like.shape[1]) of any content, of the dtype and on the device of `like`."""
        key, size = (name, like.dtype, like.device), rows * like.shape[1]
        if key not in self.memory or self.memory[key].numel() < size:
            with torch.inference_mode(False):
                self.memory[key] = like.new_empty(size)
        return self.memory[key][:size].view(rows, like.shape[1])


def attend(q: Tensor, past: Past, best: int, scratch: Scratch) -> Tensor:
    """Attention of one token: q (B, H, g, d), scaled, g query heads on each of H key heads -> (B, H, g, e), q's dtype.

    `best` blocks are read exactly, from 1 to m. Reads m + best * block + n - m * block keys and values a key head; all n, as
    they lie, where no block is left out.
    """
    kind, q = q.dtype, q.float()
    count, block = past.key.shape[2], past.block
    if best >= count:
        return _whole(q, past).to(kind)
    point = q @ past.key.mT  # (B, H, g, m)
    if past.bias is not None:
        point = point + past.bias[:, :, None]
    rank = point.softmax(-1).sum(2)  # (B, H, m)
    rank[..., 0] = torch.inf  # the first tokens, which many heads look at whatever they are
    chosen = rank.topk(best, dim=-1, sorted=False).indices  # (B, H, p)
    width = past.keys.shape[2] // block
    start = torch.arange(0, chosen.shape[0] * chosen.shape[1] * width, width, device=q.device)
    flat = (chosen.flatten(0, 1) + start[:, None]).flatten()
    key, value = (
        _blocks(name, x, flat, block, scratch).view(*chosen.shape[:2], best * block, -1)
        for name, x in (("keys", past.keys), ("values", past.values))
    )
    late = slice(count * block, past.tokens)
    exact, recent = q @ key.float().mT, q @ past.keys[:, :, late].float().mT
    if past.bias is None:
        point = point + torch.log(torch.tensor(float(block), device=q.device))
    if past.real is not None and past.recent is not None:
        kept = past.real.flatten(0, 2)[flat].view(*chosen.shape[:2], 1, -1)
        exact = exact.masked_fill(~kept, -torch.inf)
        recent = recent.masked_fill(~past.recent[:, None, None], -torch.inf)
    point = point.scatter(-1, chosen[:, :, None].expand(-1, -1, q.shape[2], -1), -torch.inf)  # not twice
    weight = torch.cat([point, exact, recent], dim=-1).softmax(-1)
    on_point, on_exact, on_recent = weight.split([count, best * block, past.tokens - count * block], dim=-1)
    out = on_point @ past.value + on_exact @ value.float() + on_recent @ past.values[:, :, late].float()
    return out.to(kind)


def _whole(q: Tensor, past: Past) -> Tensor:
    """Exact attention of one token, for which the order of what is held does not matter."""
    key, value = (x[:, :, : past.tokens].float() for x in (past.keys, past.values))
    kept = None
    if past.real is not None and past.recent is not None:
        inside = past.real[:, :, : past.key.shape[2]].flatten(2)  # (B, H, m * block)
        kept = torch.cat([inside, past.recent[:, None].expand(-1, inside.shape[1], -1)], dim=-1)[:, :, None]
    return F.scaled_dot_product_attention(q, key, value, attn_mask=kept, scale=1.0)


def _blocks(name: str, x: Tensor, index: Tensor, block: int, scratch: Scratch) -> Tensor:
    """Some blocks of memory (B, H, N, d), by their number over all heads, (blocks,) -> (blocks, block * d)."""
    every = x.view(-1, block * x.shape[-1])
    return torch.index_select(every, 0, index, out=scratch.of(name, every, len(index)))
