"""MonarchAttention: the softmax's own variational problem over Monarch matrices (Yaras et al., arXiv 2505.18698)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SbpatchError
from .registry import Geometry, Whole, register


@register("monarch")
class Monarch(Whole):
    """Row i of softmax attention is the distribution a over keys for which sum_j a_j q_i.k_j + H(a) is largest. Here

        A[(l, j), (c, i)] = L[j, l, c] R[j, c, i],   token (l, j) the j-th of the l-th stretch of b = `rank` tokens,

    each row of L a distribution over stretches, each of R one over a stretch's keys: for queries of equal place j and keys of
    one stretch c, a block of rank one. The sum of that over all rows is maximised in R and in L in turn, `steps` times, from L
    the identity; each has a closed form. It stores a row of L and one of R for each query, n / b + b entries.
    """

    def __init__(self, site: Geometry, seed: int, rank: int, steps: int = 2) -> None:
        super().__init__()
        if rank < 1 or steps < 1:
            raise SbpatchError(f"monarch needs stretches of at least one token and one step, not {rank} and {steps}")
        if site.causal:
            raise SbpatchError("monarch averages over queries of all stretches, and cannot be causal")
        self.rank, self.steps = rank, steps
        self.stored = float(math.ceil(site.tokens / rank) + rank)

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        fitting = [b for b in range(1, site.tokens + 1) if math.ceil(site.tokens / b) + b <= stored]
        return {"rank": fitting[-1]} if fitting else None

    def _stretches(self, x: Tensor) -> Tensor:
        """(B, H, n, d) -> (B, H, n / b, b, d), zeros at the end where n is no multiple of b."""
        return F.pad(x, (0, 0, 0, -x.shape[-2] % self.rank)).unflatten(-2, (-1, self.rank))

    def factors(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        """L (B, H, b, n / b, n / b), indexed by place, stretch of the query, stretch of keys; R (B, H, b, n / b, b)."""
        n = k.shape[-2]
        real = q.new_ones(q.shape[0], n) if key_mask is None else key_mask.to(q.dtype)
        real = self._stretches(real[:, None, :, None])[..., 0]  # (B, 1, c, b)
        query = scale * self._stretches(q).transpose(-3, -2)  # (B, H, b, l, d), by place
        key = self._stretches(k)  # (B, H, c, b, d)
        counted = real.mT[..., None]  # (B, 1, b, l, 1): queries that are tokens
        none = real[:, :, None] == 0  # (B, 1, 1, c, b)
        empty = none.all(-1)[..., None, :]  # (B, 1, 1, 1, c): stretches of padding
        # Finite: where a stretch, or all, is padding, no gradient may be undefined.
        lowest = torch.finfo(q.dtype).min / 4
        left = torch.eye(key.shape[2], dtype=q.dtype, device=q.device).expand(*query.shape[:3], -1, -1)
        for _ in range(self.steps):
            share = left * counted
            mean = (
                share.mT @ query / share.sum(-2)[..., None].clamp(min=1e-9)
            )  # (B, H, b, c, d), seen from each stretch
            logits = torch.einsum("zhjcd,zhcid->zhjci", mean, key).masked_fill(none, lowest)
            right = logits.softmax(-1).masked_fill(none, 0)
            entropy = logits.logsumexp(-1) - (right * logits).sum(-1)  # (B, H, b, c); has a gradient where a share is 0
            point = torch.einsum("zhjci,zhcid->zhjcd", right, key)
            logits = (query @ point.mT + entropy[..., None, :]).masked_fill(empty, lowest)
            left = logits.softmax(-1)
        return left, right

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        left, right = self.factors(q.float(), k.float(), key_mask, scale)
        value = torch.einsum("zhjci,zhcie->zhjce", right, self._stretches(v.float()))
        output = (left @ value).transpose(-3, -2).flatten(-3, -2)  # (B, H, l b, e)
        return output[..., : v.shape[-2], :].to(v.dtype)

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        n = k.shape[-2]
        left, right = self.factors(q.double(), k.double(), key_mask, 1.0)
        matrix = torch.einsum("zhjlc,zhjci->zhljci", left, right)
        return matrix.flatten(-2).flatten(-3, -2)[..., :n, :n]
