"""The Scatterbrain layer: one sparse and one low-rank part, nothing counted twice (arXiv 2110.15343, eq. 1 and 2).

    A' = L + S,  S_ij = exp(q_i.k_j) - L_ij on the support, 0 elsewhere;  output = A'V / A'1

so that A' is exact on the support and L elsewhere. The sparse part is summed as exp(q.k), and what L holds on the support
is taken off L's own sums; the two are merged in logarithmic scale like two blocks of a streaming softmax. L may carry a
factor exp(gain) a head, which calibration learns: clusters, for one, always weigh less than their keys (Jensen).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SbpatchError
from .clusters import Clusters
from .pages import Pages
from .registry import NAIVE, PARTS, Geometry, Summary, Tiles, parse_method
from .sinks import Sinks
from .tiles import restore, split_groups, take
from .window import Window

Sums = tuple[
    Tensor, Tensor, Tensor
]  # shift (B, H, n, 1), numerator (B, H, n, e), denominator (B, H, n, 1), by exp(-shift)
TILE_ENTRIES = 1 << 17  # pairs of one sample and head that are worked on at once


class Scatterbrain(nn.Module):
    """Attention of one site by `method` (see `registry.parse_method`) with the parts' parameters.

    Everything random is drawn here, from `seed`, into buffers. The parameters of both parts share one flat namespace.

    Raises:
        SbpatchError: unknown method or parameter, or a combination that cannot hold for this site.
    """

    gain: Tensor | None  # (H,), in nats

    def __init__(self, method: str, site: Geometry, seed: int, **parameters: int) -> None:
        super().__init__()
        sparse, low_rank = parse_method(method)
        self.method, self.site, self.parameters_used = method, site, dict(parameters)
        self.naive = method.startswith(NAIVE)  # the paper's baseline: L + exp(q.k) on the support, counted twice there
        self.support = self._part(sparse, site, seed, parameters)
        self.low_rank = self._part(low_rank, site, seed + 1, parameters)
        both = sparse is not None and low_rank is not None and not self.naive
        self.register_buffer("gain", torch.zeros(site.heads) if both else None, persistent=False)
        if parameters:
            raise SbpatchError(f"method '{method}' takes no parameter '{', '.join(sorted(parameters))}'")
        if site.causal and isinstance(self.low_rank, Clusters):
            reach = self.support.window if isinstance(self.support, (Window, Sinks, Pages)) else 0
            if reach < self.low_rank.CAUSAL_CHUNK:
                raise SbpatchError(
                    f"causal {low_rank} summarise whole chunks of {self.low_rank.CAUSAL_CHUNK} keys, so the sparse part must "
                    f"be a window of at least that many, not {reach}"
                )

    @staticmethod
    def _part(name: str | None, site: Geometry, seed: int, parameters: dict[str, int]) -> Any:
        if name is None:
            return None
        part = PARTS[name]
        accepted = list(inspect.signature(part).parameters.values())[2:]  # after site and seed
        missing = [p.name for p in accepted if p.default is p.empty and p.name not in parameters]
        if missing:
            raise SbpatchError(f"method part '{name}' needs a value for {', '.join(missing)}")
        return part(site, seed, **{p.name: parameters.pop(p.name) for p in accepted if p.name in parameters})

    @property
    def nnz(self) -> float:
        """Exact pairs per query row, on average."""
        return self.support.nnz if self.support is not None else 0.0

    @property
    def rank(self) -> int:
        return self.low_rank.rank if self.low_rank is not None else 0

    @property
    def stored(self) -> float:
        """Entries stored for one query row, on average: nnz + 2m for feature maps, nnz + m + 1 for clusters.

        The budget is this over `site.row_keys`.
        """
        return self.nnz + (self.low_rank.stored if self.low_rank is not None else 0.0)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """q, k (B, H, n, d), v (B, H, n, e), key_mask (B, n) bool with True for real keys -> (B, H, n, e) in q's dtype.

        k and v may have fewer heads than q, each shared by a run of query heads (grouped queries). A query that no real key
        is left for gets zeros, as in PyTorch's own attention.
        """
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if self.support is None and hasattr(self.low_rank, "attend") and not self.site.causal:
            return self.low_rank.attend(q, k, v, key_mask, scale)
        if self.low_rank is not None and self.low_rank.kind == "whole":
            k, v = self._all_heads(q, k, v)
            return self.low_rank(q * scale**0.5, k * scale**0.5, v, key_mask)
        exact, low = self.split(q, k, v, key_mask, scale)
        return self.merged(exact, low, self.gain).to(v.dtype)

    def split(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
    ) -> tuple[Sums | None, Sums | None]:
        """Sums of exp(q.k) over the support and of L over the pairs outside it (all pairs, where the sum is naive)."""
        k, v = self._all_heads(q, k, v)
        q, k = q * scale**0.5, k * scale**0.5  # from here on the logits are q.k
        summary = self.low_rank.summarise(q, k, v, key_mask) if self.low_rank is not None else None
        exact, covered = self._sparse(q, k, v, key_mask, None if self.naive else summary)
        if summary is None:
            return exact, None
        return exact, _plain(summary) if covered is None else _remainder(summary, covered)

    @staticmethod
    def merged(exact: Sums | None, low: Sums | None, gain: Tensor | None) -> Tensor:
        """The output (B, H, n, e) of both sums, the low-rank one times exp(gain), gain (H,)."""
        if low is not None and gain is not None:
            low = (low[0] + gain[:, None, None], low[1], low[2])
        both = low if exact is None else exact if low is None else _merge(exact, low)
        assert both is not None
        _, numerator, denominator = both
        return numerator / denominator.masked_fill(denominator == 0, 1)

    @staticmethod
    def _all_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v with as many heads as q; of size n d, beside which a tile's pairs are the larger part."""
        group = q.shape[1] // k.shape[1]
        return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))

    def _allowed(self, tiles: Tiles, key_mask: Tensor | None) -> Tensor:
        """The valid pairs of a round that are neither padding nor, where the site is causal, in the future."""
        valid = tiles.valid
        if self.site.causal:
            valid = valid & (tiles.key[..., None, :] <= tiles.query[..., :, None])
        if key_mask is not None:
            heads = self.site.heads if tiles.key.ndim > 2 else 1  # hashed tiles differ by head
            keep = take(key_mask[:, None, :, None].expand(-1, heads, -1, -1), tiles.key).squeeze(-1)  # (B, H, G, bk)
            valid = valid & keep[..., None, :]
        return valid

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, summary: Summary | None
    ) -> tuple[Sums | None, tuple[Tensor, Tensor] | None]:
        """(shift, numerator, denominator) of exp(q.k) over the support, and what L holds there."""
        exact: Sums | None = None
        covered: tuple[Tensor, Tensor] | None = None
        if self.support is None:
            return None, None
        for tiles in self.support.rounds(q, k, key_mask):
            parts = [self._tile_sums(part, q, k, v, key_mask, summary) for part in split_groups(tiles, TILE_ENTRIES)]
            shift, numerator, denominator, *low = (
                restore(torch.cat(x, 2), tiles.slot) for x in zip(*parts, strict=True)
            )
            found = (shift, numerator, denominator)
            exact = found if exact is None else _merge(exact, found)
            if low:
                covered = (low[0], low[1]) if covered is None else (covered[0] + low[0], covered[1] + low[1])
        return exact, covered

    def _tile_sums(
        self, tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, summary: Summary | None
    ) -> list[Tensor]:
        """Over the pairs of each tile row: shift, sums of exp(q.k) v and exp(q.k); then of L v and L, where there is an L."""
        valid = self._allowed(tiles, key_mask)
        values = take(v, tiles.key).float()  # (B, H, G, bk, e)
        logits = take(q, tiles.query).float() @ take(k, tiles.key).float().mT  # (B, H, G, bq, bk)
        logits = logits.masked_fill(~valid, -torch.inf)
        shift = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        weight = (logits - shift).exp()
        sums = [shift, weight @ values, weight.sum(-1, keepdim=True)]
        if summary is not None:
            low = summary.entries(tiles).masked_fill(~valid, 0)
            sums += [low @ values.to(low.dtype), low.sum(-1, keepdim=True)]
        return sums


def _merge(a: Sums, b: Sums) -> Sums:
    """Add two (shift, numerator, denominator), each scaled by exp(-shift), in the scale of the larger one."""
    shift = torch.maximum(a[0], b[0])
    scale_a, scale_b = (a[0] - shift).exp(), (b[0] - shift).exp()
    return shift, a[1] * scale_a + b[1] * scale_b, a[2] * scale_a + b[2] * scale_b


def _plain(summary: Summary) -> Sums:
    return summary.shift, summary.numerator, summary.denominator


def _remainder(summary: Summary, covered: tuple[Tensor, Tensor]) -> Sums:
    """L over the pairs outside the support. Below the rounding of the sum it came from, it is zero: there all is covered."""
    rounding = 1e-12 if summary.denominator.dtype == torch.float64 else 1e-6
    denominator = summary.denominator - covered[1]
    gone = denominator <= rounding * summary.denominator
    # by the row's own total, not by a scale that keys outside the row (the future) may have set: float32 holds no e^-100
    total = summary.denominator.masked_fill(gone, 1)
    shift = (summary.shift + total.log()).masked_fill(gone, torch.finfo(torch.float32).min)
    left = (summary.numerator - covered[0]).masked_fill(gone, 0), denominator.masked_fill(gone, 0)
    return shift.float(), (left[0] / total).float(), (left[1] / total).float()
