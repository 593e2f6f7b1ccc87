"""The fast form of `attend`: tiles whose queries share one list of keys and points, in fused calls of many tiles.

    softmax over [keys of the tile | points of the other keys], bias [0 | ln(keys left) or entropy, + gain]

is A' normalised: exact on the support, L elsewhere. A key that a tile reads leaves its point's count and value sum once a tile.
Multiply-adds: n (L + m) (d + e) in the call. Tiles go in runs that together read `ROWS` keys and points, so that what is
gathered for them, (L + m) (d + e) elements a tile, stays in cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import expansion
from .core import Expansion, Landmarks, Points, Tiles, known_at_once, lengthened, places, repeated, take
from .kmeans import added, runs, sums
from .patterns import listed

LANES = 16  # numbers in a CPU's widest vector registers: of points between multiples SDPA takes half as long again
ROWS = 1 << 12  # keys and points that the tiles of one call read together, of one sample
UNEVEN = 1.25  # lists of one call are padded to the longest, which is at most so many times the shortest
LOW, HIGH = 0.97, 4.0  # Nystrom row sum over cluster row sum, outside of which the clusters are believed


def over_points(q: Tensor, points: Points, scale: float) -> Tensor:
    """Attention over the points alone, log-counts as bias: one call. q (B, H, n, d), points of H or fewer heads."""
    group = q.shape[1] // points.key.shape[1]
    rows = q.unflatten(1, (-1, group)).flatten(2, 3)  # (B, H_k, group n, d), no copy where group is 1
    spare = -points.key.shape[2] % LANES  # empty points, which have a bias of -inf
    key, value = (lengthened(x.to(q.dtype), spare) for x in (points.key, points.value))
    bias = F.pad(points.counts, (0, spare)).log()[:, :, None].to(q.dtype).expand(-1, -1, rows.shape[-2], -1)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=bias, scale=scale)
    return out.reshape(*q.shape[:-1], out.shape[-1])


def over_landmarks(q: Tensor, v: Tensor, low: Landmarks) -> Tensor:
    """Each row's weights exp(y.l) times what the landmarks weigh: q (B, H, n, d) -> (B, H, n, e), in runs of rows.

    Row sums first: a row's m weights then go to the Nystrom weights or, where their sum strays, to the sums of the clusters'
    values. Few rows stray, so a CPU, which can say at once whether any does, takes these sums only then.
    """
    (batch, heads, n, _), width = q.shape, low.weight.shape[-1] - 1
    to_query, landmark, nystrom, count = (x.flatten(0, 1) for x in low[:4])  # (B H, ...)
    value, total = nystrom[..., :-1].contiguous(), torch.cat((nystrom[..., -1:], count), dim=-1).mT  # (B H, 2, m)
    cluster = None if known_at_once(q) else _cluster_values(v, low)
    out = v.new_empty(batch, heads, n, width)
    for rows in runs(n, heads * (3 * landmark.shape[1] + width), q.device):
        y = torch.bmm(to_query.mT, q[:, :, rows].flatten(0, 1).float().mT)  # few rows are faster than as few columns
        weight = torch.bmm(y.mT, landmark.mT).softmax(-1)  # (B H, rows, m)
        nystrom_sum, cluster_sum = torch.bmm(total, weight.mT).unbind(1)  # (B H, rows)
        wrong = strays(nystrom_sum, cluster_sum)
        if known_at_once(q) and not wrong.any():
            found = torch.bmm(weight / nystrom_sum[..., None], value)
        else:
            cluster = _cluster_values(v, low) if cluster is None else cluster
            row_sum, wrong = torch.where(wrong, cluster_sum, nystrom_sum), wrong[..., None]
            weight = weight / row_sum.masked_fill(row_sum == 0, 1)[..., None]
            weight = torch.cat((weight.masked_fill(wrong, 0), weight.masked_fill(~wrong, 0)), dim=-1)
            found = torch.bmm(weight, torch.cat((value, cluster), dim=1))
        out[:, :, rows] = found.unflatten(0, (batch, heads))
    return out


def _cluster_values(v: Tensor, low: Landmarks) -> Tensor:
    """Sums of the values v (B, H, n, e) of each landmark's cluster, (B H, m, e)."""
    m = low.landmark.shape[2]
    return sums(v, low.own, m + 1)[:, :, :m].flatten(0, 1)


def strays(nystrom: Tensor, cluster: Tensor) -> Tensor:
    """Rows whose Nystrom sum is not to be believed, by the sum of clusters around the same landmarks."""
    return (nystrom <= LOW * cluster) | (nystrom > HIGH * cluster)


def over_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    low: Points | Expansion | None,
    scale: float,
    key_mask: Tensor | None,
    causal: bool,
    gain: Tensor | None,
) -> Tensor:
    """Attention of tiles over their keys and what is left of the points; arguments as `attend`."""
    (batch, heads, n, _), (key_heads, width) = q.shape, (k.shape[1], v.shape[-1])
    group, place = heads // key_heads, places(tiles)
    # As SDPA lays it out; the last row is for padding slots.
    out = v.new_empty(batch, n + 1, heads, width).transpose(1, 2)
    if tiles.key.ndim > 2:  # else each run would copy all of them, where the model has them in another order
        k, v = k.contiguous(), v.contiguous()
    many, keys = tiles.key.shape[-2:]
    counts = low.past if isinstance(low, Expansion) else (0 if low is None else low.key.shape[2],) * many
    runs = list(runs_of_tiles(keys, counts, key_heads))
    expanded = expansion.points_by_run(low, runs) if isinstance(low, Expansion) else None
    for run, _ in runs:
        part = tiles._replace(
            query=tiles.query[..., run, :], key=tiles.key[..., run, :], valid=tiles.valid[..., run, :, :]
        )
        key, value, bias = lists(k, v, part, key_mask)
        if isinstance(low, Points):
            key, value, bias = _with_points((key, value, bias), remainder(low, part, bias[..., 0, :], value), gain)
        elif expanded is not None:
            key, value, bias = _with_points((key, value, bias), next(expanded), gain)
        key, value, bias = (x.flatten(0, 2)[:, None] for x in (key, value, bias))
        if causal:
            bias = _without_future(bias, part)
        found = call(_rows(q, part.query, group), key, value, bias.to(q.dtype), scale)
        del key, value, bias  # each run's tensors go before the next ones come
        _put(out, place[..., run, :], found.unflatten(0, (batch, key_heads, -1)))
        del found
    return out[:, :, :n]


def over_blocks(q: Tensor, k: Tensor, v: Tensor, low: Expansion, scale: float, gain: Tensor | None) -> Tensor:
    """Attention of tiles over the keys and points that an expansion gives them; arguments as `attend`."""
    points = low if low.key.shape[2] else None
    return over_tiles(q, k, v, listed(low.read, k.shape[2]), points, scale, low.key_mask, True, gain)


def _rows(q: Tensor, query: Tensor, group: int) -> Tensor:
    """Rows of q (B, H, n, d) at `query` (T, g) or (B, H_k, T, g), for the heads that share keys: (B H_k T, group, g, d)."""
    index = query if query.ndim == 2 else repeated(query, q.shape[1])
    return take(q, index).unflatten(1, (-1, group)).transpose(2, 3).flatten(0, 2)


def _put(out: Tensor, place: Tensor, found: Tensor) -> None:
    """Write found (B, H_k, T, group, g, e) to rows `place` (T, g) or (B, H_k, T, g) of out (B, H, n, e)."""
    found = found.transpose(2, 3).flatten(1, 2).flatten(2, 3)  # (B, H, T g, e)
    if place.ndim == 2:
        out.index_copy_(2, place.flatten(), found)
    else:
        index = repeated(place, out.shape[1]).flatten(2)[..., None].expand_as(found)
        out.scatter_(2, index, found)


def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
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


def runs_of_tiles(keys: int, points: Sequence[int], heads: int) -> Iterator[tuple[slice, int]]:
    """Consecutive tiles for one call, and how many points it has to hold: each reads so many keys and its points."""
    start, many = 0, len(points)
    for stop in range(1, many + 1):
        longer = keys + points[min(stop, many - 1)]  # they never fall
        if stop < many and heads * (stop + 1 - start) * longer <= ROWS and longer <= UNEVEN * (keys + points[start]):
            continue
        yield slice(start, stop), points[stop - 1]
        start = stop


def lists(k: Tensor, v: Tensor, tiles: Tiles, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of each tile, their values and a bias for each: (B, H_k, T, L, d or e) and (B, H_k, T, 1 or g, L)."""
    return take(k, tiles.key), take(v, tiles.key), hiding(k, tiles, key_mask)


def hiding(k: Tensor, tiles: Tiles, key_mask: Tensor | None) -> Tensor:
    """A bias for the keys k (B, H_k, n, d) that each tile lists, (B, H_k, T, 1 or g, L): minus infinity where hidden, or 0."""
    keep = tiles.valid  # (..., T, 1 or g, L)
    if key_mask is not None:
        same = tiles.key if tiles.key.ndim > 2 else tiles.key.expand(k.shape[0], 1, -1, -1)
        keep = keep & take(key_mask[:, None, :, None].expand(-1, same.shape[1], -1, -1), same).mT
    bias = torch.zeros(keep.shape, device=k.device).masked_fill(~keep, -torch.inf)
    return bias.expand(*k.shape[:2], -1, -1, -1)


def _with_points(
    lists: tuple[Tensor, Tensor, Tensor], points: tuple[Tensor, Tensor, Tensor], gain: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists as `lists` gives them, lengthened by points: (B, H_k, T, m, d), (B, H_k, T, m, e), and bias (B, H_k, T, m)."""
    (key, value, bias), (mean, rest, weight) = lists, points
    weight = (weight if gain is None else weight + gain[:, None, None])[..., None, :].expand(*bias.shape[:-1], -1)
    return (
        torch.cat((key, mean.to(key.dtype)), 3),
        torch.cat((value, rest.to(value.dtype)), 3),
        torch.cat((bias, weight), -1),
    )


def remainder(points: Points, tiles: Tiles, bias: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each tile does not read exactly of each point: its key (…, m, d), mean of the values left (…, m, e), ln(left)."""
    (batch, heads, many, _), count = bias.shape, points.key.shape[2]
    own = take(points.own[..., None], tiles.key.expand(batch, heads, -1, -1)).squeeze(-1)  # (B, H, T, L)
    own = torch.where(bias == 0, own, count)  # of no point here
    covered = torch.zeros(batch, heads, many, count + 1, device=bias.device)
    covered = covered.scatter_add(-1, own, (bias == 0).float())
    left = points.counts[:, :, None] - covered[..., :count]
    taken = value.new_zeros(batch * heads * many, count + 1, value.shape[-1], dtype=torch.float32)
    taken = added(taken, value.flatten(0, 2).float(), own.flatten(0, 2)).view(batch, heads, many, count + 1, -1)
    total = (points.value * points.counts[..., None])[:, :, None]
    rest = (total - taken[..., :count, :]) / left[..., None].clamp(min=1)
    return points.key[:, :, None].expand(-1, -1, many, -1, -1), rest, left.log()


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
