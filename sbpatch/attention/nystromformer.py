"""Nystromformer: softmax attention through segment means, A = F pinv(M) B (Xiong et al., arXiv 2102.03902)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SbpatchError
from . import kmeans
from .core import query_mask
from .registry import Geometry, Whole, register


@register("nystromformer")
class Nystromformer(Whole):
    """`rank` landmarks q' and k', the means of equal stretches of queries and of keys:

        A = softmax(q k'^T) pinv(softmax(q' k'^T)) softmax(q' k^T)

    Each factor is normalised by itself and the product may be negative, so nothing can be added to it: a whole method.
    It stores a row of the first factor and a column of the last, 2 m entries a token.
    """

    rectangular = True
    STEPS = 6  # of the iteration for the pseudo-inverse, as in the paper

    def __init__(self, site: Geometry, seed: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise SbpatchError(f"nystromformer needs at least one landmark, not {rank}")
        if site.causal:
            raise SbpatchError("nystromformer averages over all tokens, the future included, and cannot be causal")
        self.rank, self.stored = rank, 2.0 * rank

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"rank": int(stored / 2)} if stored >= 2 else None

    def _factors(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The three factors, (B, H, n, m), (B, H, m, m) inverted, and (B, H, m, n). Padding has no part in the means."""
        m = min(self.rank, q.shape[-2], k.shape[-2])
        (mean_q, no_query), (mean_k, no_key) = _means(q, m, query_mask(q, key_mask, k)), _means(k, m, key_mask)
        first = _softmax((q @ mean_k.mT).masked_fill(no_key.mT, -torch.inf))
        middle = _softmax((mean_q @ mean_k.mT).masked_fill(no_key.mT, -torch.inf)).masked_fill(no_query, 0)
        last = mean_q @ k.mT
        if key_mask is not None:
            last = last.masked_fill(~key_mask[:, None, None], -torch.inf)
        return first, self._inverse(middle), _softmax(last)

    def _inverse(self, a: Tensor) -> Tensor:
        """Razavi's iteration; it converges to the pseudo-inverse from a^T / (|a|_1 |a|_inf)."""
        norms = a.sum(-2).amax(-1) * a.sum(-1).amax(-1)  # of each sample and head: one bad head must not slow the rest
        z = a.mT / norms.clamp(min=1e-30)[..., None, None]
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        for _ in range(self.STEPS):
            az = a @ z
            z = z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az))) / 4
        return z

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        first, inverse, last = self._factors(q.float() * scale**0.5, k.float() * scale**0.5, key_mask)
        return (first @ (inverse @ (last @ v.float()))).to(v.dtype)

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        first, inverse, last = self._factors(q.double(), k.double(), key_mask)
        return first @ inverse @ last


def _means(x: Tensor, m: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means of m equal stretches of rows (B, H, n, d), (B, H, m, d), and which are padding alone, bool (B, H, m, 1)."""
    n = x.shape[-2]
    stretch = (torch.arange(n, device=x.device) * m // n).expand(*x.shape[:3])
    keep = x.new_ones(x.shape[0], 1, n) if mask is None else mask[:, None].to(x.dtype)
    count = kmeans.counts(stretch, m, keep.float())
    return kmeans.sums(x, stretch, m, keep) / count.clamp(min=1), count == 0


def _softmax(logits: Tensor) -> Tensor:
    """Softmax in which a row without any entry is zero."""
    return logits.softmax(-1).nan_to_num(0.0)
