"""FAVOR+: positive orthogonal random features of the softmax kernel (Choromanski et al., arXiv 2009.14794)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import SbpatchError
from .registry import Geometry, Summary, Tiles, register
from .tiles import take

CHUNK = 64  # keys a step of the causal prefix sums


def orthogonal_rows(count: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, width) Gaussian directions, orthogonal within blocks of `width` rows, with the norms of independent rows."""
    blocks = []
    for _ in range(math.ceil(count / width)):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        blocks.append(q * r.diagonal().sign())  # sign fix: uniform over the orthogonal group
    norms = torch.randn(count, width, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:count] * norms).float()


@register("favor")
class Favor(nn.Module):
    """phi(x)_r = exp(w_r.x - |x|^2 / 2) / sqrt(m), so that E[phi(q).phi(k)] = exp(q.k), with `rank` features.

    Stabilised in logarithms: each feature by its largest key, then each query by its largest feature. Both cancel in the
    quotient, and no real key underflows because of another one. The sums are taken in float64, because the covered pairs
    are subtracted from them: what is left may be 1e-7 of the total, which is nothing in float32.
    """

    kind: ClassVar[Literal["low-rank"]] = "low-rank"
    projection: Tensor  # (H, m, d)

    def __init__(self, site: Geometry, seed: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise SbpatchError(f"rank is {rank}; it must be at least 1 (leave the low-rank part out for none)")
        generator = torch.Generator().manual_seed(seed)
        rows = torch.stack([orthogonal_rows(rank, site.head_dim, generator) for _ in range(site.heads)])
        self.register_buffer("projection", rows, persistent=False)
        self.rank, self.stored, self.causal = rank, 2.0 * rank, site.causal

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"rank": int(stored / 2)} if stored >= 2 else None

    def log_features(self, x: Tensor) -> Tensor:
        """(B, H, n, d) -> (B, H, n, m), float32."""
        x = x.float()
        return x @ self.projection.float().mT - x.square().sum(-1, keepdim=True) / 2 - math.log(self.rank) / 2

    def summarise(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Summary:
        log_q, log_k = self.log_features(q), self.log_features(k)
        if key_mask is not None:
            log_k = log_k.masked_fill(~key_mask[:, None, :, None], -torch.inf)
        top_k = log_k.amax(-2, keepdim=True).clamp(min=torch.finfo(torch.float32).min)  # (B, H, 1, m)
        shift = (log_q + top_k).amax(-1, keepdim=True)  # (B, H, n, 1)
        phi_q = (log_q + top_k - shift).double().exp()  # (B, H, n, m)
        phi_k = (log_k - top_k).double().exp()
        ones = torch.ones_like(v[..., :1])
        values = torch.cat((v, ones), dim=-1).double()  # the last column sums to the denominator
        sums = self._causal(phi_q, phi_k, values) if self.causal else phi_q @ (phi_k.mT @ values)

        def entries(tiles: Tiles) -> Tensor:
            return take(phi_q, tiles.query) @ take(phi_k, tiles.key).mT

        return Summary(shift, sums[..., :-1], sums[..., -1:], entries)

    def _causal(self, phi_q: Tensor, phi_k: Tensor, values: Tensor) -> Tensor:
        """sum_{j <= i} (phi_q_i . phi_k_j) values_j by chunks: a running (m, d) state, and a triangle within the chunk."""
        state = torch.zeros(*phi_k.shape[:2], self.rank, values.shape[-1], dtype=values.dtype, device=values.device)
        out = []
        for a, b, c in zip(phi_q.split(CHUNK, 2), phi_k.split(CHUNK, 2), values.split(CHUNK, 2), strict=True):
            out.append(a @ state + (a @ b.mT).tril() @ c)
            state = state + b.mT @ c
        return torch.cat(out, dim=2)

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        return self.log_features(q).double().exp() @ self.log_features(k).double().exp().mT
