"""The general form of `attend`: any support, in any number of rounds, with any low-rank part, pair by pair.

The sparse part is summed as exp(q.k); what L holds on the support is taken off L's own sums; the two are merged in logarithmic
scale like two blocks of a streaming softmax. Sums that are subtracted from are in float64 where L is a feature map, whose
remainder may be 1e-7 of the whole, which is nothing in float32. Shifts cancel in the output, so that gradients need not go
through them; those of points do, where a clamp stands in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from . import expansion
from .core import (
    Expansion,
    Features,
    Landmarks,
    LowRankData,
    Points,
    Selection,
    Stretches,
    Tiles,
    repeated,
    restore,
    take,
)  # fmt: skip
from .patterns import listed

Sums = tuple[
    Tensor, Tensor, Tensor
]  # shift (B, H, n, 1), numerator (B, H, n, e), denominator (B, H, n, 1), by exp(-shift)
TILE_ENTRIES = 1 << 17  # pairs of one sample and head that are worked on at once
ROWS = 1024  # queries whose logits with all points are formed at once
CHUNK = 64  # keys a step of the causal prefix sums
LOWEST = torch.finfo(torch.float32).min


class Summary(Protocol):
    """L contracted with the values, and its entries on the pairs of tiles in the same scaling by exp(-shift)."""

    sums: Sums

    def entries(self, tiles: Tiles) -> Tensor:
        """L_ij of the pairs of each tile, (B, H, T, g, L)."""


def split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    scale: float,
    key_mask: Tensor | None,
    causal: bool,
    naive: bool,
) -> tuple[Sums | None, Sums | None]:
    """Sums of exp(scale q.k) over the support, and of L over the pairs outside it (all pairs, where the sum is naive)."""
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    q, k = q * scale**0.5, k * scale**0.5  # from here on the logits are q.k
    low_rank = selection.low_rank
    expanded = low_rank if isinstance(low_rank, Expansion) else None  # which leaves out by itself what its tiles read
    summary = None if low_rank is None or expanded is not None else _summary(low_rank, q, v, scale, causal)
    exact: Sums | None = None
    covered: tuple[Tensor, Tensor] | None = None
    read = selection.tiles if expanded is None else [expanded.read]
    rounds = [listed(one, k.shape[2]) if isinstance(one, Stretches) else one for one in read]
    for tiles in rounds:
        parts = [
            _tile_sums(part, q, k, v, key_mask, causal, None if naive else summary)
            for part in _split_tiles(_for_heads(tiles, q.shape[1]), TILE_ENTRIES)
        ]
        slot = tiles.slot if tiles.slot.ndim == 1 else repeated(tiles.slot, q.shape[1])
        shift, numerator, denominator, *low = (restore(torch.cat(x, 2), slot) for x in zip(*parts, strict=True))
        found = (shift, numerator, denominator)
        exact = found if exact is None else _merge(exact, found)
        if low:
            covered = (low[0], low[1]) if covered is None else (covered[0] + low[0], covered[1] + low[1])
    if expanded is not None:
        return exact, _expansion_sums(expanded, rounds[0], q, scale) if expanded.key.shape[2] else None
    if summary is None:
        return exact, None
    return exact, summary.sums if covered is None else _remainder(summary.sums, covered)


def merged(exact: Sums | None, low: Sums | None, gain: Tensor | None) -> Tensor:
    """The output (B, H, n, e) of both sums, the low-rank one times exp(gain), gain (H,) or of the key heads."""
    if low is not None and gain is not None:
        low = (low[0] + gain.repeat_interleave(low[0].shape[1] // len(gain))[:, None, None], low[1], low[2])
    both = low if exact is None else exact if low is None else _merge(exact, low)
    if both is None:
        raise ValueError("nothing was selected")
    _, numerator, denominator = both
    return numerator / denominator.masked_fill(denominator == 0, 1)


def _merge(a: Sums, b: Sums) -> Sums:
    """Add two (shift, numerator, denominator), each scaled by exp(-shift), in the scale of the larger one."""
    shift = torch.maximum(a[0], b[0])
    scale_a, scale_b = (a[0] - shift).exp(), (b[0] - shift).exp()
    return shift, a[1] * scale_a + b[1] * scale_b, a[2] * scale_a + b[2] * scale_b


def _remainder(sums: Sums, covered: tuple[Tensor, Tensor]) -> Sums:
    """L over the pairs outside the support. Below the rounding of the sum it came from, it is zero: there all is covered."""
    rounding = 1e-12 if sums[2].dtype == torch.float64 else 1e-6
    denominator = sums[2] - covered[1]
    gone = denominator <= rounding * sums[2]
    # by the row's own total, not by a scale that keys outside the row (the future) may have set: float32 holds no e^-100
    total = sums[2].masked_fill(gone, 1)
    shift = (sums[0] + total.log()).masked_fill(gone, LOWEST)
    left = (sums[1] - covered[0]).masked_fill(gone, 0), denominator.masked_fill(gone, 0)
    return shift.float(), (left[0] / total).float(), (left[1] / total).float()


# -- the sparse part -------------------------------------------------------------------------------------------------


def _for_heads(tiles: Tiles, heads: int) -> Tiles:
    """Tiles of key heads, for every query head that shares one."""
    if tiles.key.ndim == 2 or tiles.key.shape[1] == heads:
        return tiles
    query = tiles.query if tiles.query.ndim == 2 else repeated(tiles.query, heads)
    valid = tiles.valid if tiles.valid.ndim == 3 else repeated(tiles.valid, heads)
    return tiles._replace(query=query, key=repeated(tiles.key, heads), valid=valid)


def _split_tiles(tiles: Tiles, entries: int) -> Iterator[Tiles]:
    """Runs of tiles of at most `entries` pairs (one tile at least)."""
    size = max(1, entries // (tiles.query.shape[-1] * tiles.key.shape[-1]))
    runs = (tiles.query.split(size, -2), tiles.key.split(size, -2), tiles.valid.split(size, -3))
    for query, key, valid in zip(*runs, strict=True):
        yield Tiles(query, key, valid, tiles.slot)


def _allowed(tiles: Tiles, key_mask: Tensor | None, causal: bool) -> Tensor:
    """The valid pairs of a round that are neither padding nor, where the site is causal, in the future."""
    valid = tiles.valid
    if causal:
        valid = valid & (tiles.key[..., None, :] <= tiles.query[..., :, None])
    if key_mask is not None:
        heads = tiles.key.shape[1] if tiles.key.ndim > 2 else 1  # tiles found by content differ by head
        keep = take(key_mask[:, None, :, None].expand(-1, heads, -1, -1), tiles.key).squeeze(-1)  # (B, H, T, L)
        valid = valid & keep[..., None, :]
    return valid


def _tile_sums(
    tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal: bool, summary: Summary | None
) -> list[Tensor]:
    """Over the pairs of each tile row: shift, sums of exp(q.k) v and exp(q.k); then of L v and L, where there is an L."""
    valid = _allowed(tiles, key_mask, causal)
    values = take(v, tiles.key).float()  # (B, H, T, L, e)
    logits = take(q, tiles.query).float() @ take(k, tiles.key).float().mT  # (B, H, T, g, L)
    logits = logits.masked_fill(~valid, -torch.inf)
    shift = logits.detach().amax(-1, keepdim=True).clamp(min=LOWEST)
    weight = (logits - shift).exp()
    sums = [shift, weight @ values, weight.sum(-1, keepdim=True)]
    if summary is not None:
        low = summary.entries(tiles).masked_fill(~valid, 0)
        sums += [low @ values.to(low.dtype), low.sum(-1, keepdim=True)]
    return sums


# -- the low-rank part -----------------------------------------------------------------------------------------------


def _summary(low: LowRankData, q: Tensor, v: Tensor, scale: float, causal: bool) -> Summary:
    if isinstance(low, Points):
        return _PointSums(low, q, v, scale)
    if isinstance(low, Features):
        return _FactorSums(*_scaled(low), v, causal)
    if isinstance(low, Landmarks):
        raise ValueError("landmarks that are contracted with the values have no entries to subtract")
    if isinstance(low, Expansion):
        raise ValueError("an expansion leaves out what its own tiles read; it has nothing to subtract")
    return _FactorSums(low.shift, low.left, low.right, v, causal)


def _expansion_sums(low: Expansion, tiles: Tiles, q: Tensor, scale: float) -> Sums:
    """Over the points of each tile; q as `split` has it at that stage."""
    key, value, bias = (repeated(x, q.shape[1]) for x in expansion.points(low, slice(None), low.key.shape[2]))
    logits = take(q, tiles.query).float() @ (key * scale**0.5).mT + bias[..., None, :]  # (B, H, T, g, m)
    shift = logits.detach().amax(-1, keepdim=True).clamp(min=LOWEST)
    weight = (logits - shift).exp()
    shift, numerator, denominator = (
        restore(x, tiles.slot) for x in (shift, weight @ value, weight.sum(-1, keepdim=True))
    )
    return shift, numerator, denominator


def columns(x: Tensor, index: Tensor) -> Tensor:
    """Per-query values at per-key columns: x (B, H, T, g, m), index (B, H, T, L) -> (B, H, T, g, L)."""
    return x.gather(-1, index[..., None, :].expand(-1, -1, -1, x.shape[-2], -1))


class _PointSums:
    """Over points: sums in float32, since a key that leaves its point cancels nothing (Jensen)."""

    def __init__(self, points: Points, q: Tensor, v: Tensor, scale: float) -> None:
        heads, self.ready = q.shape[1], points.ready
        key, value, count = (repeated(x, heads) for x in (points.key, points.value, points.counts))
        self.own = repeated(points.own, heads)
        self.q, self.mean, self.count = q.float(), key.float() * scale**0.5, count[..., None]  # (B, H, m, 1)
        summed = torch.cat((self.count * value, self.count), dim=-1)  # the last column sums to the denominator
        shifts, sums = [], []
        for start in range(0, q.shape[2], ROWS):
            logits = self._logits(start)
            shifts.append(logits.amax(-1, keepdim=True).clamp(min=LOWEST))
            sums.append((logits - shifts[-1]).exp() @ summed)
        total = torch.cat(sums, 2)
        self.sums = torch.cat(shifts, 2), total[..., :-1], total[..., -1:]

    def _logits(self, start: int) -> Tensor:
        """q.mean of the points that queries from `start` on may read, (B, H, rows, m); minus infinity at others."""
        rows = self.q[:, :, start : start + ROWS]
        logits = (rows @ self.mean.mT).masked_fill(self.count.mT == 0, -torch.inf)
        if self.ready is None:
            return logits
        place = torch.arange(start, start + rows.shape[2], device=rows.device)
        return logits.masked_fill(place[:, None] < self.ready, -torch.inf)

    def entries(self, tiles: Tiles) -> Tensor:
        logits = take(self.q, tiles.query) @ self.mean[:, :, None].mT  # (B, H, T, g, m), cheaper again than kept
        # at most 0 where it counts; above it are points of padding alone, which would be inf here and NaN in gradients
        weight = (logits - take(self.sums[0], tiles.query)).clamp(max=0).exp()
        if self.ready is not None:
            weight = weight.masked_fill(tiles.query[..., None] < self.ready, 0)
        weight = torch.nn.functional.pad(weight, (0, 1))  # a key of no point weighs nothing
        return columns(weight, take(self.own[..., None], tiles.key.expand(*self.own.shape[:2], -1, -1)).squeeze(-1))


class _FactorSums:
    """Over factors exp(shift) left.right: in float64, because what the support covers is subtracted from the sums."""

    def __init__(self, shift: Tensor, left: Tensor, right: Tensor, v: Tensor, causal: bool) -> None:
        self.left, self.right = left, right
        values = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1).double()  # the last column sums to the denominator
        sums = _prefix(left, right, values) if causal else left @ (right.mT @ values)
        self.sums = shift, sums[..., :-1], sums[..., -1:]

    def entries(self, tiles: Tiles) -> Tensor:
        return take(self.left, tiles.query) @ take(self.right, tiles.key).mT


def _scaled(low: Features) -> tuple[Tensor, Tensor, Tensor]:
    """Shift and factors of features, each feature scaled by its largest key and then each query by its largest feature.

    Both cancel in the quotient, and no real key underflows because of another one.
    """
    top = low.log_key.detach().amax(-2, keepdim=True).clamp(min=LOWEST)  # (B, H, 1, m)
    shift = (low.log_query.detach() + top).amax(-1, keepdim=True)  # (B, H, n, 1)
    return shift, (low.log_query + top - shift).double().exp(), (low.log_key - top).double().exp()


def _prefix(left: Tensor, right: Tensor, values: Tensor) -> Tensor:
    """sum_{j <= i} (left_i.right_j) values_j by chunks: a running (m, e) state, and a triangle within the chunk."""
    state = values.new_zeros(*right.shape[:2], right.shape[-1], values.shape[-1])
    out = []
    for a, b, c in zip(left.split(CHUNK, 2), right.split(CHUNK, 2), values.split(CHUNK, 2), strict=True):
        out.append(a @ state + (a @ b.mT).tril() @ c)
        state = state + b.mT @ c
    return torch.cat(out, dim=2)
