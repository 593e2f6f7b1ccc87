"""FAVOR+: positive orthogonal random features of the softmax kernel (Choromanski et al., arXiv 2009.14794)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import Features
from .registry import Geometry, LowRank, register


def orthogonal_rows(count: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, width) Gaussian directions, orthogonal within blocks of `width` rows, with the norms of independent rows."""
    blocks = []
    for _ in range(math.ceil(count / width)):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        blocks.append(q * r.diagonal().sign())  # sign fix: uniform over the orthogonal group
    norms = torch.randn(count, width, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:count] * norms).float()


@register("favor")
class Favor(LowRank):
    """phi(x)_r = exp(w_r.x - |x|^2 / 2) / sqrt(m), so that E[phi(q).phi(k)] = exp(q.k), with `rank` features.

    Kept as logarithms; how they are stabilised and summed is in pairwise.py.
    """

    rectangular = True

    projection: Tensor  # (H, m, d)

    def __init__(self, site: Geometry, seed: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise SbpatchError(f"rank is {rank}; it must be at least 1 (leave the low-rank part out for none)")
        generator = torch.Generator().manual_seed(seed)
        rows = torch.stack([orthogonal_rows(rank, site.head_dim, generator) for _ in range(site.heads)])
        self.register_buffer("projection", rows, persistent=False)
        self.rank, self.stored = rank, 2.0 * rank

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"rank": int(stored / 2)} if stored >= 2 else None

    def log_features(self, x: Tensor) -> Tensor:
        """(B, H, n, d) -> (B, H, n, m), float32."""
        x = x.float()
        return x @ self.projection.float().mT - x.square().sum(-1, keepdim=True) / 2 - math.log(self.rank) / 2

    def select(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, joined: bool) -> Features:
        log_query, log_key = self.log_features(q * scale**0.5), self.log_features(k * scale**0.5)
        if key_mask is not None:
            log_key = log_key.masked_fill(~key_mask[:, None, :, None], -torch.inf)
        return Features(log_query, log_key)

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        return self.log_features(q).double().exp() @ self.log_features(k).double().exp().mT
