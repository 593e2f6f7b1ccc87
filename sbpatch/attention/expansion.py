"""Blocks of keys as points: the log-sum-exp of a block, expanded to first order about the mean query of a tile.

    ln sum_j exp(q.k_j)  ~  q.k'+ H(p),     p = softmax_j(q'.k_j),  k' = sum_j p_j k_j,  H(p) = -sum_j p_j ln p_j

q' is the mean query, j are the keys of the block. The left side is convex in q and the right side its tangent: exact at q', and
nowhere above. Where p is even, the point is the mean key with bias ln(count); where q' likes one key, it is that key, bias 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .core import Expansion

AHEAD = 16  # tiles whose points are computed together
LEAST = -200.0  # ln p below which a key adds nothing to the entropy, not even its gradient


def points_by_run(low: Expansion, runs: Sequence[tuple[slice, int]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`points` of each run of tiles and so many blocks, computed for up to `AHEAD` tiles together, which read the keys once."""
    start = 0
    while start < len(runs):
        first, stop = runs[start][0].start, start + 1
        while stop < len(runs) and runs[stop][0].stop <= first + AHEAD:
            stop += 1
        some, start = runs[start:stop], stop
        key, value, bias = points(low, slice(first, some[-1][0].stop), some[-1][1])
        for run, count in some:
            tiles = slice(run.start - first, run.stop - first)
            yield key[:, :, tiles, :count], value[:, :, tiles, :count], bias[:, :, tiles, :count]
        del key, value, bias  # before the next tiles' come


def points(low: Expansion, tiles: slice, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of t tiles its first `count` blocks: key (B, H, t, m, d), value (B, H, t, m, e), bias (B, H, t, m), float32.

    The bias is H(p), and minus infinity for blocks that the tile may not read, reads exactly, or that are empty.

    Multiply-adds: t m c (2 d + e). Each product runs over all tiles at once, and over the blocks as a batch.
    """
    about = low.about[:, :, tiles].float()  # (B, H, t, d)
    key, value = low.key[:, :, :count].float(), low.value[:, :, :count].float()  # (B, H, m, c, d or e)
    valid = low.valid()[:, :, :count]
    log_p = _log_shares(key, about, valid)  # (B, H, m, c, t)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-2)  # (B, H, m, t)
    del log_p
    read = _read(low, tiles, count) & valid.any(-1)[:, :, None]
    mean, rest = (_by_head(p.mT, x).transpose(2, 3) for x in (key, value))
    return mean, rest, entropy.mT.masked_fill(~read, -torch.inf)


def _log_shares(key: Tensor, about: Tensor, valid: Tensor) -> Tensor:
    """ln p, at least `LEAST`: keys (B, H, m, c, d), mean queries (B, H, t, d), valid (B, 1, m, c) -> (B, H, m, c, t)."""
    logits = _by_head(key.flatten(2, 3), about.mT).unflatten(2, key.shape[2:4])
    return logits.masked_fill(~valid[..., None], torch.finfo(torch.float32).min).log_softmax(-2).clamp(min=LEAST)


def _by_head(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of tensors (B, H, ...), a head at a time: the first blocks of one head lie together, those of all heads do not."""
    return torch.stack([x @ y for x, y in zip(a.unbind(1), b.unbind(1), strict=True)], dim=1)


def _read(low: Expansion, tiles: slice, count: int) -> Tensor:
    """Which of the first `count` blocks each of the tiles reads as a point, (B, H, t, m)."""
    exact = low.exact[:, :, tiles]
    read = (torch.arange(count + 1, device=exact.device) < low.counts()[tiles, None]).expand(*exact.shape[:3], -1)
    return read.scatter(-1, exact.clamp(max=count), False)[..., :count]
