"""Locality-sensitive hashing as a support: SMYRF's asymmetric clustering (Daras et al., arXiv 2010.05315)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import Tiles, query_mask
from .patterns import beside
from .registry import Geometry, Sparse, register

FAR = 1e30  # beyond every value that tokens are sorted by


@register("lsh")
class Lsh(Sparse):
    """`rounds` hash rounds of balanced clusters with `bucket` queries and keys each; their union, each pair once.

    Queries and keys are lifted so that distance orders pairs by q.k,
        F(q) = [q, 0, sqrt(M - |q|^2)],  G(k) = [k, sqrt(M - |k|^2), 0],  M = max|q|^2 + max|k|^2,
    projected on a random line per round, sorted, and cut into equal clusters. On a causal site no query reads a later key,
    but later keys take part in the sorting and so in which earlier keys a query meets.
    """

    rectangular = True

    projection: Tensor  # (H, R, d + 2)

    def __init__(self, site: Geometry, seed: int, bucket: int, rounds: int = 2) -> None:
        super().__init__()
        if bucket < 1 or rounds < 1:
            raise SbpatchError(f"lsh needs at least one round and buckets of at least one key, not {rounds} x {bucket}")
        self.bucket, self.hash_rounds = bucket, rounds
        generator = torch.Generator().manual_seed(seed)
        line = torch.randn(site.heads, rounds, site.head_dim + 2, generator=generator)
        self.register_buffer("projection", line, persistent=False)
        self.nnz = float(min(rounds * bucket, site.tokens))

    @classmethod
    def tried(cls, site: Geometry, entropy_ratio: float) -> str | None:
        return None if site.causal else "lsh+clusters"

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"bucket": int(stored / 2), "rounds": 2} if stored >= 8 else None

    def order(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sorted order of queries and of keys in each round, two of (B, H, R, n); padding last."""
        q, k = q.detach().float(), k.detach().float()
        masks = query_mask(q, key_mask, k), key_mask
        q_norm, k_norm = (
            x.square().sum(-1, keepdim=True) * (1 if mask is None else mask[:, None, :, None])
            for x, mask in zip((q, k), masks, strict=True)
        )
        limit = q_norm.amax(-2, keepdim=True) + k_norm.amax(-2, keepdim=True)
        line = self.projection.float()[None]  # (1, H, R, d + 2)
        lifted_q = q @ line[..., :-2].mT + (limit - q_norm).clamp(min=0).sqrt() * line[..., -1][..., None, :]
        lifted_k = k @ line[..., :-2].mT + (limit - k_norm).clamp(min=0).sqrt() * line[..., -2][..., None, :]
        return _sorted(lifted_q, masks[0]), _sorted(lifted_k, masks[1])

    def buckets(self, order: Tensor, keys: int) -> Tensor:
        """Bucket number of each token, (B, H, R, n): its rank in the sorted order, scaled to `keys`, over the bucket size."""
        n = order.shape[-1]
        rank = torch.arange(n, device=order.device) * keys // (n * self.bucket)
        return torch.zeros_like(order).scatter(-1, order, rank.expand_as(order))

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> list[Tiles]:
        n = k.shape[-2]
        count = math.ceil(n / self.bucket)
        q_order, k_order = self.order(q, k, key_mask)
        q_bucket, k_bucket = self.buckets(q_order, n), self.buckets(k_order, n)
        row, spot = beside(q.shape[-2], n, self.bucket, q.device)
        position = torch.arange(count * self.bucket, device=q.device)
        filled = (position < n).view(count, 1, self.bucket)  # the last cluster may be short of keys
        found = []
        for r in range(self.hash_rounds):
            query = q_order[:, :, r][..., row]  # (B, H, T, g)
            key = k_order[:, :, r][..., position.clamp(max=n - 1)].unflatten(-1, (count, self.bucket))
            valid = filled  # (T, 1, bucket)
            for earlier in range(r):  # a pair that met before is counted there and only there
                a = q_bucket[:, :, earlier].gather(-1, query.flatten(2)).view_as(query)
                b = k_bucket[:, :, earlier].gather(-1, key.flatten(2)).view_as(key)
                valid = valid & (a[..., :, None] != b[..., None, :])
            place = spot.expand_as(q_order[:, :, r])
            found.append(Tiles(query, key, valid, torch.zeros_like(place).scatter(-1, q_order[:, :, r], place)))
        return found

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        q_order, k_order = self.order(q, k, key_mask)
        q_bucket, k_bucket = (self.buckets(order, k.shape[-2]) for order in (q_order, k_order))
        return (q_bucket[..., :, None] == k_bucket[..., None, :]).any(dim=2)


def _sorted(value: Tensor, mask: Tensor | None) -> Tensor:
    """Order of values (B, H, n, R) in each column, (B, H, R, n); padding last, in the order of its places."""
    if mask is not None:
        n = value.shape[-2]
        late = FAR * (1 + torch.arange(n, device=value.device) / n)
        value = torch.where(mask[:, None, :, None], value, late[:, None])
    return value.mT.argsort(dim=-1)
