"""LevAttention: one set of keys that holds every large entry of every row (Kannan et al., arXiv 2410.05462).

For the f-attention with f(x) = |x|^p, normalised by row,

    A_ij = |q_i.k_j|^p / sum_l |q_i.k_l|^p <= sup_y |y.k_j|^p / |K y|_p^p,   the l_p sensitivity of key j,

whatever the query. At p = 2 the sensitivity is the leverage score k_j^T (K^T K)^+ k_j, and these sum to at most d; at other
p it is at most d^max(0, p/2 - 1) times the Lewis weight of the key, and those sum to at most d too. So the keys of largest
score form a universal set: every entry A_ij above d^max(1, p/2) / |U| lies in a column of U, for all queries at once.

The bound is for this A, not for softmax attention: here U serves as the support of exp(q.k), as the paper does in its vision
models, and whether it holds the large entries of the softmax is up to the model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import Tiles
from .patterns import shared_keys
from .registry import Geometry, Sparse, register

NULL = 1e-13  # directions with less than this share of the largest squared length are rounding
STEPS = 40  # of the fixed point for the Lewis weights; it contracts by |1 - p/2| or 1 - 2/p a step


def leverage_scores(k: Tensor, gram: Tensor | None = None) -> Tensor:
    """k_j^T G^+ k_j for rows k (..., n, d) -> (..., n) float64; G = K^T K of these rows, unless given."""
    k = k.double()
    return (k @ _whitening(k.mT @ k if gram is None else gram)).square().sum(-1)


def _whitening(gram: Tensor) -> Tensor:
    """W (..., d, d) with W W^T = G^+, for G (..., d, d) float64."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > NULL * values[..., -1:].clamp(min=1e-300)
    return vectors * (values.masked_fill(~kept, 1).rsqrt() * kept)[..., None, :]


def lewis_weights(k: Tensor, power: float) -> Tensor:
    """l_p Lewis weights of the rows, w_j = leverage of row j in W^(1/2 - 1/p) K (Cohen and Peng, arXiv 1412.0588)."""
    k = k.double()
    weight = leverage_scores(k)
    for _ in range(STEPS if power != 2 else 0):
        scale = weight.clamp(min=1e-30).pow(0.5 - 1 / power)
        score = leverage_scores(k * scale[..., None])
        weight = score if power > 2 else (score / scale.square()).pow(power / 2)
    return weight


def universal_set(k: Tensor, key_mask: Tensor | None, keys: int, power: float) -> Tensor:
    """Indices of the `keys` rows of k (B, H, n, d) with the largest Lewis weight, (B, H, keys), no more than n; no gradients.

    Padding (key_mask (B, n) bool, True for real keys) scores nothing and comes last.
    """
    return lewis_weights(_real(k, key_mask), power).topk(min(keys, k.shape[-2]), dim=-1).indices


def _real(k: Tensor, key_mask: Tensor | None) -> Tensor:
    k = k.detach()
    return k if key_mask is None else k * key_mask[:, None, :, None]


def sketched_scores(k: Tensor, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Leverage scores from two sketches: rows k (..., n, d) -> (..., n) float32, or float64 where k is that.

    A CountSketch adds each row, with a random sign, to one of `rows` sums, and G is that of the sums: n d operations in place
    of n d^2. At rows of the order d^2 / eps^2 the scores are within 1 +- eps with high probability (Clarkson and Woodruff,
    arXiv 1207.6365). The lengths of k_j G^(-1/2) are then those of `columns` random projections of it, with relative errors
    near sqrt(2 / columns) in their squares (Drineas et al., arXiv 1109.3843); 0: of itself, n d^2 operations again.
    """
    n, device = k.shape[-2], k.device
    k = k if k.dtype == torch.float64 else k.float()
    place = torch.randint(rows, (n,), generator=generator).to(device)
    sign = (2 * torch.randint(2, (n, 1), generator=generator) - 1).to(k)
    sums = k.new_zeros(*k.shape[:-2], rows, k.shape[-1]).index_add_(k.ndim - 2, place, k * sign).double()
    white = _whitening(sums.mT @ sums)
    if columns:
        random = torch.randn(k.shape[-1], columns, dtype=torch.float64, generator=generator)
        white = white @ (random / columns**0.5).to(device)
    return (k @ white.to(k.dtype)).square().sum(-1)


def stream_leverage(chunks: Iterable[Tensor], keys: int) -> Tensor:
    """The universal set in one pass: chunks of rows (..., c, d) -> indices (..., keys) into their concatenation.

    Kept are K^T K so far and the best `keys` rows under it: memory d^2 + keys d, time linear in n. A score only falls as
    rows are added, and fewer than `keys` rows can ever be above d / keys, so that none which ends there is dropped: the
    bound of the whole set holds, with nothing approximated. -1 where there were fewer rows.
    """
    gram: Tensor | None = None
    first = 0
    for chunk in chunks:
        rows = chunk.double()
        index = torch.arange(first, first + rows.shape[-2], device=rows.device).expand(rows.shape[:-1])
        first += rows.shape[-2]
        if gram is None:
            gram = rows.mT @ rows
            kept = rows.new_zeros(*rows.shape[:-2], keys, rows.shape[-1])
            held = index.new_full((*index.shape[:-1], keys), -1)
        else:
            gram = gram + rows.mT @ rows
        rows, index = torch.cat((kept, rows), dim=-2), torch.cat((held, index), dim=-1)
        score = leverage_scores(rows, gram).masked_fill(index < 0, -1)
        best = score.topk(keys, dim=-1).indices
        kept, held = rows.gather(-2, best[..., None].expand(*best.shape, rows.shape[-1])), index.gather(-1, best)
    if gram is None:
        raise SbpatchError("no keys to score")
    return held


@register("leverage")
class Leverage(Sparse):
    """All queries read the `keys` of largest score: leverage for `power` 2, else Lewis weights of that power.

    With `chunk` above 0 (and power 2) the set is found in one pass over the keys in chunks of that many; otherwise all keys
    are scored at once. Bidirectional: the scores are those among all keys.
    """

    rectangular = True

    def __init__(self, site: Geometry, seed: int, keys: int, power: int = 2, chunk: int = 0) -> None:
        super().__init__()
        if keys < 1 or power < 1 or chunk < 0:
            raise SbpatchError(f"leverage needs keys and power of at least 1, not {keys} and {power}")
        if chunk and power != 2:
            raise SbpatchError(f"leverage scores stream; Lewis weights of power {power} do not: leave out chunk")
        if site.causal:
            raise SbpatchError("leverage scores are those among all keys, the future included, and cannot be causal")
        self.keys, self.power, self.chunk, self.heads = keys, power, chunk, site.heads
        self.nnz = float(min(keys, site.tokens))

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"keys": int(stored)} if stored >= 1 else None

    def bound(self, width: int) -> float:
        """Every entry of A above this lies in a column of the universal set."""
        return width ** max(1.0, self.power / 2) / self.keys

    def universal(self, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """The universal set of each head, (B, H, keys); padding scores nothing and comes last."""
        if self.chunk:
            return stream_leverage(_real(k, key_mask).split(self.chunk, dim=-2), min(self.keys, k.shape[-2]))
        return universal_set(k, key_mask, self.keys, self.power)

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> list[Tiles]:
        index = self.universal(k, key_mask)
        return [shared_keys(index, torch.ones_like(index, dtype=torch.bool), q.shape[-2], self.heads)]

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        n = k.shape[-2]
        inside = torch.zeros(*k.shape[:2], n, dtype=torch.bool, device=k.device)
        return inside.scatter(-1, self.universal(k, key_mask), True)[..., None, :]
