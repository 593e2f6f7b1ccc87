"""The fast form of `attend`: tiles whose queries share one list of keys and points, in fused calls of many tiles.

    softmax over [keys of the tile | points of the other keys], bias [0 | ln(count left) + gain]

is A' normalised: exact on the support, L elsewhere. A key that a tile reads leaves its point's count and value sum once a tile.
Multiply-adds: n (L + m) (d + e) in the call. Tiles go in runs that together read `ROWS` keys and points, so that what is
gathered for them, (L + m) (d + e) elements a tile, stays in cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .core import Landmarks, Points, Tiles, take
from .kmeans import added, runs

ROWS = 1 << 13  # keys and points that the tiles of one call read together, of one sample
UNEVEN = 1.25  # lists of one call are padded to the longest, which is at most so many times the shortest
LOW, HIGH = 0.97, 4.0  # Nystrom row sum over cluster row sum, outside of which the clusters are believed


def over_points(q: Tensor, points: Points, scale: float) -> Tensor:
    """Attention over the points alone, log-counts as bias: one call. q (B, H, n, d), points of H or fewer heads."""
    group = q.shape[1] // points.key.shape[1]
    rows = q.unflatten(1, (-1, group)).flatten(2, 3)  # (B, H_k, group n, d), no copy where group is 1
    bias = points.counts.log()[:, :, None].to(q.dtype).expand(-1, -1, rows.shape[-2], -1)  # empty: -inf
    out = F.scaled_dot_product_attention(
        rows, points.key.to(q.dtype), points.value.to(q.dtype), attn_mask=bias, scale=scale
    )
    return out.reshape(*q.shape[:-1], out.shape[-1])


def over_landmarks(q: Tensor, low: Landmarks, dtype: torch.dtype) -> Tensor:
    """Each row's weights exp(y.l) times what the landmarks weigh: q (B, H, n, d) -> (B, H, n, e), in runs of rows."""
    (batch, heads, n, _), width = q.shape, low.both.shape[-1] - 1
    to_query, landmark, both = (x.flatten(0, 1) for x in low)  # (B H, ...)
    value, total = both[..., :-1].contiguous(), both[..., -1].unflatten(-1, (2, -1))
    out = q.new_empty(batch, heads, n, width, dtype=dtype)
    for rows in runs(n, heads * (3 * landmark.shape[1] + width)):
        y = torch.bmm(to_query.mT, q[:, :, rows].flatten(0, 1).float().mT)  # few rows are faster than as few columns
        out[:, :, rows] = _read(y, landmark.mT, value, total).unflatten(0, (batch, heads))
    return out


def _read(y: Tensor, landmark: Tensor, value: Tensor, total: Tensor) -> Tensor:
    """y (G, r, rows), landmark (G, r, m), value (G, 2 m, e), total (G, 2, m), see `core.Landmarks` -> (G, rows, e).

    Row sums first: a row's m weights then go to that half of `value` which is believed. Where no row strays, which a CPU
    can say at once, the other half is left out.
    """
    m = landmark.shape[-1]
    weight = torch.bmm(y.mT, landmark).softmax(-1)  # (G, rows, m)
    nystrom, cluster = torch.bmm(total, weight.mT).unbind(1)  # (G, rows)
    wrong = strays(nystrom, cluster)
    if y.is_cpu and not torch.compiler.is_compiling() and not wrong.any():
        return torch.bmm(weight / nystrom[..., None], value[:, :m])
    sums = torch.where(wrong, cluster, nystrom)
    weight, wrong = weight / sums.masked_fill(sums == 0, 1)[..., None], wrong[..., None]
    return torch.bmm(torch.cat((weight.masked_fill(wrong, 0), weight.masked_fill(~wrong, 0)), dim=-1), value)


def strays(nystrom: Tensor, cluster: Tensor) -> Tensor:
    """Rows whose Nystrom sum is not to be believed, by the sum of clusters around the same landmarks."""
    return (nystrom <= LOW * cluster) | (nystrom > HIGH * cluster)


def over_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    points: Points | None,
    scale: float,
    key_mask: Tensor | None,
    causal: bool,
    gain: Tensor | None,
) -> Tensor:
    """Attention of tiles over their keys and what is left of the points; arguments as `attend`."""
    (batch, heads, n, _), (key_heads, width) = q.shape, (k.shape[1], v.shape[-1])
    group, size = heads // key_heads, tiles.query.shape[-1]
    first = n * torch.arange(batch * heads, device=q.device).view(batch, key_heads, 1, group, 1)
    flat = q.reshape(-1, q.shape[-1])
    used = tiles.slot.new_zeros(*tiles.slot.shape[:-1], tiles.query.shape[-2] * size, dtype=torch.bool)
    used = used.scatter(-1, tiles.slot, True).unflatten(-1, (-1, size))  # (..., T, g), False at a padding slot
    out = v.new_empty(batch * heads * n + 1, width)  # the last row is for padding slots
    if points is not None and tiles.whole is not None:  # points are further keys
        k, v = torch.cat((k, points.key.to(k.dtype)), 2), torch.cat((v, points.value.to(v.dtype)), 2)
    for run, keys, count in _runs(tiles, points, key_heads):
        part = tiles._replace(
            query=tiles.query[..., run, :], key=tiles.key[..., run, :keys], valid=tiles.valid[..., run, :, :keys],
            reach=tiles.reach and tiles.reach[run], whole=None if tiles.whole is None else tiles.whole[..., run, :],
        )  # fmt: skip
        key, value, bias = _lists(
            k, v, n, part, points, count, key_mask, gain
        )  # (N, 1, L + m, d or e), (N, 1, 1 or g, L + m)
        if causal:
            bias = _without_future(bias, part)
        rows = part.query[..., None, :] + first  # (B, H_k, T, group, g)
        query = flat.index_select(0, rows.reshape(-1)).view(-1, group, size, flat.shape[-1])
        found = _call(query, key, value, bias.to(q.dtype), scale)
        place = torch.where(used[..., run, :][..., None, :], rows, out.shape[0] - 1)
        out.index_copy_(0, place.reshape(-1), found.reshape(-1, width))
    return out[:-1].view(batch, heads, n, width)


def _call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """One fused call: query (N, group, g, d), key and value (N, 1, L, d or e), bias (N, 1, 1 or g, L) -> (N, group, g, e).

    A row whose every key is hidden gives zeros. In exported files, whose softmax makes NaN of it, that is written out.
    """
    (group, size), hidden = query.shape[1:3], torch.finfo(bias.dtype).min
    exported = torch.compiler.is_exporting()
    found = F.scaled_dot_product_attention(
        query, key.expand(-1, group, -1, -1), value.expand(-1, group, -1, -1),
        attn_mask=(bias.clamp(min=hidden) if exported else bias).expand(-1, group, size, -1), scale=scale,
    )  # fmt: skip
    return found * (bias.amax(-1, keepdim=True) > hidden) if exported else found


def _runs(tiles: Tiles, points: Points | None, heads: int) -> Iterator[tuple[slice, int, int]]:
    """Consecutive tiles for one call, and how many keys and points it has to hold."""
    (many, keys), count = tiles.key.shape[-2:], 0 if points is None else points.key.shape[2]
    reach = tiles.reach or ((keys, count),) * many
    start = 0
    while start < many:
        stop, most = start + 1, reach[start]
        while stop < many:
            longer = max(most[0], reach[stop][0]), max(most[1], reach[stop][1])
            rows = sum(longer)
            if heads * (stop + 1 - start) * rows > ROWS or rows > UNEVEN * sum(reach[start]):
                break
            stop, most = stop + 1, longer
        yield slice(start, stop), most[0], min(most[1], count)
        start = stop


def _lists(
    k: Tensor,
    v: Tensor,
    n: int,
    tiles: Tiles,
    points: Points | None,
    count: int,
    key_mask: Tensor | None,
    gain: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of N = B H_k T tiles its keys and the first `count` points, and their values: two (N, 1, L + m, d or e).

    And a bias for each, (N, 1, 1 or g, L + m).
    """
    lead = (*k.shape[:2], tiles.key.shape[-2])
    keep = tiles.valid  # (..., T, 1 or g, L)
    if key_mask is not None:
        same = tiles.key if tiles.key.ndim > 2 else tiles.key.expand(k.shape[0], 1, -1, -1)
        keep = keep & take(key_mask[:, None, :, None].expand(-1, same.shape[1], -1, -1), same).mT
    bias = torch.zeros(keep.shape, device=k.device).masked_fill(~keep, -torch.inf).expand(*lead, -1, -1)
    listed = tiles.key
    if points is not None and tiles.whole is not None:
        further = torch.arange(n, n + count, device=k.device)
        listed = torch.cat((listed, further.expand(*listed.shape[:-1], -1)), -1)
    key, value = take(k, listed), take(v, listed)  # (B, H_k, T, L or L + m, d or e)
    if points is not None and count:
        if tiles.whole is None:
            left, rest = _remainder(points, count, tiles, keep[..., 0, :].expand(*lead, -1), value)
            mean = points.key[:, :, None, :count].expand(*lead, -1, -1)
            key, value = torch.cat((key, mean.to(key.dtype)), 3), torch.cat((value, rest.to(value.dtype)), 3)
        else:
            left = points.counts[:, :, None, :count].expand(*lead, -1)
            left = left * _readable(tiles, count, k.device)
            left = F.pad(left, (0, 1)).scatter(-1, tiles.whole.clamp(max=count), 0)[..., :count]
        weight = left.log() if gain is None else left.log() + gain[:, None, None]
        bias = torch.cat((bias, weight[..., None, :]), -1)
    return key.flatten(0, 2)[:, None], value.flatten(0, 2)[:, None], bias.flatten(0, 2)[:, None]


def _readable(tiles: Tiles, count: int, device: torch.device) -> Tensor:
    """Which of the first `count` points each tile may read, (T, m)."""
    reach = tiles.reach or ((0, count),) * tiles.query.shape[-2]
    return torch.arange(count, device=device) < torch.tensor([[readable] for _, readable in reach], device=device)


def _remainder(points: Points, count: int, tiles: Tiles, keep: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What each tile does not read exactly of each point: keys left (B, H, T, m), and the mean of their values (…, m, e)."""
    batch, heads, many, _ = keep.shape
    own = take(points.own[..., None], tiles.key.expand(batch, heads, -1, -1)).squeeze(-1)  # (B, H, T, L)
    own = torch.where(keep, own.clamp(max=count), count)  # of no point here
    covered = torch.zeros(batch, heads, many, count + 1, device=keep.device).scatter_add(-1, own, keep.float())
    left = points.counts[:, :, None, :count] - covered[..., :count]
    left = left * _readable(tiles, count, keep.device)
    taken = value.new_zeros(batch * heads * many, count + 1, value.shape[-1], dtype=torch.float32)
    taken = added(taken, value.flatten(0, 2).float(), own.flatten(0, 2)).view(batch, heads, many, count + 1, -1)
    total = (points.value * points.counts[..., None])[:, :, None, :count]
    rest = (total - taken[..., :count, :]) / left[..., None].clamp(min=1)
    return left, rest


def _without_future(bias: Tensor, tiles: Tiles) -> Tensor:
    """The bias (N, 1, 1 or g, L + m) of each tile for each of its queries, (N, 1, g, L + m), minus infinity at later keys."""
    size, listed = tiles.query.shape[-1], tiles.key.shape[-1]
    if tiles.diagonal:
        future = torch.full((size, size), -torch.inf, device=bias.device).triu(1)
        return bias + F.pad(future, (0, bias.shape[-1] - size))
    later = tiles.key[..., None, :] > tiles.query[..., None]  # (..., T, g, L)
    future = torch.zeros(later.shape, device=bias.device).masked_fill(later, -torch.inf)
    future = F.pad(future, (0, bias.shape[-1] - listed)).flatten(0, -3)
    return bias + future.repeat(bias.shape[0] // future.shape[0], 1, 1)[:, None]
