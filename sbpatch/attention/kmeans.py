"""k-means over keys: static shapes, the same bits on every run, no (n, m) tensor beyond a chunk of keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1024  # keys scored at once
SAMPLE = 16  # keys a centre that the Lloyd steps look at; the final assignment looks at all


def nearest(k: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of each key and the squared distance to it: k (B, H, n, d), centre (B, H, m, d) -> two (B, H, n).

    By |k - c|^2 = |k|^2 - 2 (k.c - |c|^2 / 2): the largest score is the nearest.
    """
    bias = centre.square().sum(-1).flatten(0, 1)[:, None, :]  # (B * H, 1, m)
    index, distance = [], []
    for keys in k.split(CHUNK, 2):
        score = torch.baddbmm(bias, keys.flatten(0, 1), centre.flatten(0, 1).mT, beta=-0.5)
        best, where = score.unflatten(0, k.shape[:2]).max(-1)
        index.append(where)
        distance.append(keys.square().sum(-1) - 2 * best)
    return torch.cat(index, -1), torch.cat(distance, -1)


def counts(index: Tensor, m: int, keep: Tensor) -> Tensor:
    """Members of each cluster, (B, H, m, 1) float32; `keep` (B, 1, n) is 1 for real keys. Whole numbers: exact in any order."""
    empty = torch.zeros(*index.shape[:2], m, device=index.device)
    return empty.scatter_add(-1, index, keep.expand(-1, index.shape[1], -1))[..., None]


def sums(rows: Tensor, index: Tensor, m: int, keep: Tensor | None) -> Tensor:
    """Sum of the rows (B, H, n, e) of each cluster: (B, H, m, e).

    On a CPU rows are added in their order. On a GPU that would be a race, so there it is a product with the one-hot matrix.
    """
    batch, heads, _, e = rows.shape
    if not rows.is_cuda:
        first = torch.arange(batch * heads, device=rows.device).view(batch, heads, 1) * m
        out = rows.new_zeros(batch * heads * m, e)
        for part, where in _chunks(rows, index, keep):
            out = out.index_add(0, (where + first).flatten(), part.reshape(-1, e))
        return out.view(batch, heads, m, e)
    total = rows.new_zeros(batch, heads, m, e)
    for part, where in _chunks(rows, index, keep):
        one_hot = rows.new_zeros(*where.shape, m).scatter(-1, where[..., None], 1.0)
        total = total + one_hot.mT @ part
    return total


def means(rows: Tensor, index: Tensor, centre: Tensor, count: Tensor, keep: Tensor) -> Tensor:
    """Mean of the `count` rows of each cluster, (B, H, m, e); one without any stays at its centre."""
    return torch.where(count == 0, centre, sums(rows, index, centre.shape[-2], keep) / count.clamp(min=1))


def _chunks(rows: Tensor, index: Tensor, keep: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs of `CHUNK` rows, zero where they are padding, and their clusters."""
    kept = [None] * len(rows.split(CHUNK, 2)) if keep is None else keep.split(CHUNK, 2)
    for part, where, real in zip(rows.split(CHUNK, 2), index.split(CHUNK, 2), kept, strict=True):
        yield part if real is None else part * real[..., None], where


def strided(k: Tensor, key_mask: Tensor | None, count: int, once: bool = False) -> Tensor:
    """`count` keys at even strides over those that are not padding, (B, H, count, d); zeros where all is padding.

    Where there are fewer than that, keys repeat; `once`: each comes once, and what follows them is to be ignored.
    """
    n, odd = k.shape[-2], 2 * torch.arange(count, device=k.device) + 1
    if key_mask is None:
        return k.index_select(2, odd * n // (2 * count))
    seen = key_mask.cumsum(-1)  # (B, n)
    place = torch.where(key_mask, seen - 1, n)  # the t-th real token at place t, padding past the end
    real = seen.new_zeros(seen.shape[0], n + 1).scatter(-1, place, torch.arange(n, device=k.device).expand_as(seen))
    every = seen[:, -1:]  # (B, 1) real tokens
    of = every.clamp(min=1, max=count) if once else count
    index = real.gather(-1, (odd * every // (2 * of)).clamp(max=n - 1))  # (B, count)
    chosen = k.gather(2, index[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[-1]))
    return chosen.masked_fill(~key_mask.any(-1)[:, None, None, None], 0)


def lloyd(k: Tensor, key_mask: Tensor | None, m: int, steps: int) -> Tensor:
    """Centres (B, H, m, d) of the keys (B, H, n, d) after `steps` Lloyd steps from strided starts.

    The steps see at most `SAMPLE` keys a centre, at even strides: centres need no more, and it makes them cheap. A cluster
    that ran empty moves to one of the keys farthest from their centres. In images many keys are alike (a plain
    background), strided starts repeat them, and without this most of the rank would be spent on nothing.
    """
    n = k.shape[-2]
    seen = min(n, SAMPLE * m)
    start = strided(k, key_mask, m)
    if seen < n:
        k = strided(k, key_mask, seen, once=True)
        if key_mask is not None:  # fewer real keys than that: as if the padding were not there
            key_mask = torch.arange(seen, device=k.device) < key_mask.sum(-1, keepdim=True)
    keep = k.new_ones(k.shape[0], 1, seen) if key_mask is None else key_mask.to(k.dtype)[:, None, :].expand(-1, 1, seen)
    centre = start
    for _ in range(steps):
        index, distance = nearest(k, centre)
        count = counts(index, m, keep)
        farthest, far = (distance * keep).topk(min(m, seen), dim=-1)  # (B, H, m); padding is at distance 0
        empty = count == 0
        turn = (empty.cumsum(-2) - 1).clamp(min=0, max=far.shape[-1] - 1).squeeze(-1)  # the t-th empty cluster takes
        key = far.gather(-1, turn)[..., None].expand(-1, -1, -1, k.shape[-1])  # the t-th farthest key
        moved = torch.where(farthest.gather(-1, turn)[..., None] > 0, k.gather(2, key), centre)
        centre = means(k, index, moved, count, keep)
    return centre
