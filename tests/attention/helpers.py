"""Inputs, and the definitions written a second time: loops and float64, sharing no code with sbpatch.attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.attention.clusters import Clusters
from sbpatch.attention.favor import Favor
from sbpatch.attention.kmeans import SAMPLE
from sbpatch.attention.lsh import Lsh
from sbpatch.attention.window import Window

GRID, PREFIX = (7, 11), 2  # neither side is a multiple of a tile

PARAMETERS: dict[str, dict[str, int]] = {
    "window": {"window": 5},
    "window2d": {"window": 3},
    "lsh": {"bucket": 7, "rounds": 3},
    "favor": {"rank": 12},
    "clusters": {"rank": 9},
    "window+favor": {"window": 6, "rank": 12},
    "window+clusters": {"window": 6, "rank": 9, "steps": 1},
    "window2d+favor": {"window": 4, "rank": 12},
    "window2d+clusters": {"window": 3, "rank": 9},
    "lsh+favor": {"bucket": 5, "rounds": 3, "rank": 12},
    "lsh+clusters": {"bucket": 5, "rounds": 2, "rank": 9},
}
METHODS = list(PARAMETERS)
CAUSAL_METHODS = ["window", "lsh", "favor", "window+favor", "lsh+favor"]
ANY_LENGTH = [m for m in METHODS if "window2d" not in m]  # window2d is tied to its grid
CASES = [(m, False) for m in METHODS] + [(m, True) for m in CAUSAL_METHODS]


def build(
    method: str, n: int, *, heads: int = 2, d: int = 8, causal: bool = False, seed: int = 0, **change: int
) -> Any:
    """A layer with the small parameters above; `n` is ignored by window2d, whose tokens are GRID after PREFIX."""
    parameters = PARAMETERS[method] | change
    on_grid = "window2d" in method
    tokens = GRID[0] * GRID[1] + PREFIX if on_grid else n
    grid, prefix = (GRID, PREFIX) if on_grid else (None, 0)
    return Scatterbrain(method, Geometry(tokens, heads, d, causal, grid, prefix), seed, **parameters)


def draw(layer: Scatterbrain, *, batch: int = 2, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh standard normal q, k and v that fit the layer."""
    site = layer.site
    shape = (batch, site.heads, site.tokens, site.head_dim)
    values = (*shape[:3], width or site.head_dim)
    return torch.randn(shape), torch.randn(shape), torch.randn(values)


def padding(batch: int, n: int, seed: int = 0) -> Tensor:
    """A key mask with about a third of the keys, anywhere, padded; sample 0 keeps its first key, causal rows need one."""
    mask = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) > 0.35
    mask[0, 0] = True
    return mask


def probe(layer: Scatterbrain, q: Tensor, k: Tensor, key_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The normalised rows of A' as the layer itself computes them: its answer to v = identity."""
    identity = torch.eye(k.shape[-2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return layer(q, k, identity, key_mask, scale)


def unnormalise(rows: Tensor, logits: Tensor, support: Tensor) -> Tensor:
    """A' before the row sums are divided out: the entries' scale is read off each row's largest exact pair."""
    anchor = logits.masked_fill(~support, -torch.inf).argmax(-1, keepdim=True)
    return rows.double() * (logits.gather(-1, anchor).exp() / rows.double().gather(-1, anchor))


# -- the definitions -----------------------------------------------------------------------------------------------


def allowed(n: int, causal: bool, key_mask: Tensor | None) -> Tensor:
    """Real keys, and the past where causal: (1 or B, 1, n, n)."""
    pairs = torch.tensor([[j <= i or not causal for j in range(n)] for i in range(n)])[None, None]
    return pairs if key_mask is None else pairs & key_mask[:, None, None, :]


def window_pairs(n: int, window: int, causal: bool) -> Tensor:
    """The `window` keys that end at the query (causal), or lie around it with the odd one out on the left."""
    pairs = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        first = i - window + 1 if causal else i - window // 2
        for j in range(max(first, 0), min(first + window, n)):
            pairs[i, j] = True
    return pairs


def window2d_pairs(grid: tuple[int, int], prefix: int, window: int) -> Tensor:
    """Patches read the patches within the window and every class token; class tokens read the class tokens."""
    n = grid[0] * grid[1] + prefix
    pairs = torch.zeros(n, n, dtype=torch.bool)
    pairs[:, :prefix] = True
    for i in range(prefix, n):
        row, col = divmod(i - prefix, grid[1])
        for a in range(row - window // 2, row - window // 2 + window):
            for b in range(col - window // 2, col - window // 2 + window):
                if 0 <= a < grid[0] and 0 <= b < grid[1]:
                    pairs[i, prefix + a * grid[1] + b] = True
    return pairs


def lsh_pairs(part: Lsh, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
    """SMYRF: lift, project, sort, cut into equal buckets; the union over the rounds. (B, H, n, n)"""
    batch, heads, n, _ = q.shape
    pairs = torch.zeros(batch, heads, n, n, dtype=torch.bool)
    for b in range(batch):
        real = torch.arange(n) if key_mask is None else key_mask[b].nonzero()[:, 0]
        padded = [j for j in range(n) if j not in set(real.tolist())]
        for h in range(heads):
            if not len(real):
                continue
            q_sq, k_sq = (x[b, h, real].square().sum(-1) for x in (q, k))
            limit = q_sq.max() + k_sq.max()
            zero_q, zero_k = torch.zeros_like(q_sq), torch.zeros_like(k_sq)
            lifted_q = torch.cat((q[b, h, real], zero_q[:, None], (limit - q_sq).sqrt()[:, None]), 1)
            lifted_k = torch.cat((k[b, h, real], (limit - k_sq).sqrt()[:, None], zero_k[:, None]), 1)
            for line in part.projection[h]:
                # padding fills the last buckets, of queries and of keys
                q_order, k_order = (real[(x @ line).argsort()].tolist() + padded for x in (lifted_q, lifted_k))
                for first in range(0, n, part.bucket):
                    cut = slice(first, first + part.bucket)
                    pairs[b, h, torch.tensor(q_order[cut])[:, None], torch.tensor(k_order[cut])[None]] = True
    return pairs


def favor_entries(part: Favor, q: Tensor, k: Tensor) -> Tensor:
    """phi(q).phi(k) as Choromanski et al. write it, in float64."""

    def phi(x: Tensor) -> Tensor:
        return (x.double() @ part.projection.double().mT - x.double().square().sum(-1, keepdim=True) / 2).exp()

    return phi(q) @ phi(k).mT / part.rank


def cluster_of(k: Tensor, rank: int, steps: int, key_mask: Tensor | None = None) -> Tensor:
    """The cluster (B, H, n) of each key by Lloyd's algorithm from strided starts, -1 for padding. Loops, float64.

    The steps look at `SAMPLE` keys a centre, and the t-th cluster that ran empty moves to the t-th farthest key.
    """
    batch, heads, n, _ = k.shape
    out = torch.full((batch, heads, n), -1)
    for b in range(batch):
        real = torch.arange(n) if key_mask is None else key_mask[b].nonzero()[:, 0]
        for h in range(heads if len(real) else 0):
            x = k[b, h, real].detach().double()
            centre = x[[(2 * t + 1) * len(real) // (2 * rank) for t in range(rank)]].clone()
            seen = x
            if SAMPLE * rank < n:
                seen = x[[(2 * t + 1) * len(real) // (2 * SAMPLE * rank) for t in range(SAMPLE * rank)]]
            for _ in range(steps):
                distance, nearest = (seen[:, None] - centre[None]).square().sum(-1).min(1)
                far = iter(distance.argsort(descending=True).tolist())
                for c in range(rank):
                    if (nearest == c).any():
                        centre[c] = seen[nearest == c].mean(0)
                    elif (j := next(far, None)) is not None and distance[j] > 1e-5:
                        centre[c] = seen[j]
            out[b, h, real] = (x[:, None] - centre[None]).square().sum(-1).argmin(1)
    return out


def cluster_entries(part: Clusters, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
    """exp(q.c[a(j)]) with c the mean of the keys of a cluster; differentiable in q and k, zero at padding."""
    cluster = cluster_of(k, part.rank, part.steps, key_mask)
    member = (cluster[..., None] == torch.arange(part.rank)).double()  # (B, H, n, m)
    mean = member.mT @ k.double() / member.sum(-2).clamp(min=1)[..., None]
    return (q.double() @ mean.mT).exp() @ member.mT


def support_pairs(layer: Scatterbrain, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
    """The support by definition, before causality and padding are applied; q and k already scaled."""
    part, site = layer.support, layer.site
    if part is None:
        return torch.zeros(site.tokens, site.tokens, dtype=torch.bool)
    if isinstance(part, Lsh):
        return lsh_pairs(part, q, k, key_mask)
    if isinstance(part, Window):
        return window_pairs(q.shape[-2], part.window, site.causal)
    return window2d_pairs(site.grid, site.prefix, part.window)


def entries_by_definition(layer: Scatterbrain, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """A' before normalisation: exp(q.k) on the support, L elsewhere, zero where not allowed. q and k already scaled."""
    low: Any = layer.low_rank
    if low is None:
        entries = torch.zeros(*q.shape[:-1], k.shape[-2], dtype=torch.float64)
    elif isinstance(low, Favor):
        entries = favor_entries(low, q, k)
    elif layer.site.causal:
        entries = low.dense(q, k, key_mask)  # already a loop over chunks and keys
    else:
        entries = cluster_entries(low, q, k, key_mask)
    entries = torch.where(support_pairs(layer, q, k, key_mask), (q.double() @ k.double().mT).exp(), entries)
    return entries.masked_fill(~allowed(q.shape[-2], layer.site.causal, key_mask), 0)


def attention_by_definition(
    layer: Scatterbrain, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> Tensor:
    """A'V / A'1 in float64; a row without keys gives zeros."""
    entries = entries_by_definition(layer, q * scale**0.5, k * scale**0.5, key_mask)
    total = entries.sum(-1, keepdim=True)
    return entries @ v.double() / total.masked_fill(total == 0, 1)
