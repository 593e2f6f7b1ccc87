"""Reformer's hashing as a support: angular LSH, sorted and cut into chunks (Kitaev et al., arXiv 2001.04451)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import Tiles, query_mask
from .patterns import beside
from .registry import Geometry, Sparse, register


@register("reformer")
class Reformer(Sparse):
    """`rounds` hash rounds; a chunk of `bucket` queries reads the chunk of keys at its place and the one before.

    Tokens are sorted by h(x) = argmax [xR, -xR], two rotations R giving two digits, then by position. Reformer trains with
    keys equal to queries, so that its chunks hold the same tokens on both sides. In a model trained otherwise, as here,
    queries and keys are sorted apart, and its mask to equal hashes is left out, as it would leave many queries nothing.
    On a causal site later keys take part in the sorting, though no query reads one.
    """

    rectangular = True

    rotation: Tensor  # (H, R, 2, d, s)

    def __init__(self, site: Geometry, seed: int, bucket: int, rounds: int = 2) -> None:
        super().__init__()
        if bucket < 1 or rounds < 1:
            raise SbpatchError(f"reformer needs at least one round and chunks of at least one, not {rounds} x {bucket}")
        self.bucket, self.hash_rounds = bucket, rounds
        half = math.ceil(math.sqrt(site.tokens / bucket) / 2)  # of each of two factors: about one hash value a chunk
        generator = torch.Generator().manual_seed(seed)
        rotation = torch.randn(site.heads, rounds, 2, site.head_dim, half, generator=generator)
        self.register_buffer("rotation", rotation, persistent=False)
        self.nnz = float(min(2 * rounds * bucket, site.tokens))

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"bucket": int(stored / 4), "rounds": 2} if stored >= 8 else None

    def _order(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Sorted order of the tokens in each round, (B, H, R, n); padding last."""
        n, x = x.shape[-2], x.detach().float()[:, :, None, None]
        rotated = x @ self.rotation.float()  # (B, H, R, 2, n, s)
        value = torch.cat((rotated, -rotated), dim=-1).argmax(-1)
        size = 2 * rotated.shape[-1]
        value = value[:, :, :, 0] * size + value[:, :, :, 1]  # (B, H, R, n)
        if mask is not None:
            value = value.masked_fill(~mask[:, None, None], size**2)
        return (value * n + torch.arange(n, device=x.device)).argsort(dim=-1)  # no two alike: any sort is stable

    def _chunks(self, order: Tensor, keys: int) -> Tensor:
        """Chunk of each token, (B, H, R, n): its rank in the sorted order, scaled to `keys`, over the size of a chunk."""
        n = order.shape[-1]
        rank = torch.arange(n, device=order.device) * keys // (n * self.bucket)
        return torch.zeros_like(order).scatter(-1, order, rank.expand_as(order))

    def _meets(self, query: Tensor, key: Tensor, count: int) -> Tensor:
        """Whether chunks of queries (..., bq) read chunks of keys (..., bk): their own, and the one before, around the end."""
        behind = (query[..., :, None] - key[..., None, :]) % count
        return behind <= 1

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> list[Tiles]:
        n = k.shape[-2]
        count = math.ceil(n / self.bucket)
        q_order, k_order = self._order(q, query_mask(q, key_mask, k)), self._order(k, key_mask)
        q_chunk, k_chunk = self._chunks(q_order, n), self._chunks(k_order, n)
        row, spot = beside(q.shape[-2], n, self.bucket, q.device)
        position = torch.arange(count * self.bucket, device=q.device).view(count, self.bucket)
        before = torch.cat((position, position.roll(1, 0)), dim=1) if count > 1 else position
        found = []
        for r in range(self.hash_rounds):
            query = q_order[:, :, r][..., row]  # (B, H, G, g)
            key = k_order[:, :, r][..., before.clamp(max=n - 1)]  # (B, H, G, 2 b)
            valid = (before < n)[:, None, :]  # (T, 1, 2 b)
            for earlier in range(r):  # a pair that met before is counted there and only there
                a = q_chunk[:, :, earlier].gather(-1, query.flatten(2)).view_as(query)
                b = k_chunk[:, :, earlier].gather(-1, key.flatten(2)).view_as(key)
                valid = valid & ~self._meets(a, b, count)
            place = spot.expand_as(q_order[:, :, r])
            found.append(Tiles(query, key, valid, torch.zeros_like(place).scatter(-1, q_order[:, :, r], place)))
        return found

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        n = k.shape[-2]
        orders = self._order(q, query_mask(q, key_mask, k)), self._order(k, key_mask)
        q_chunk, k_chunk = (self._chunks(order, n) for order in orders)
        return self._meets(q_chunk, k_chunk, math.ceil(n / self.bucket)).any(dim=2)
