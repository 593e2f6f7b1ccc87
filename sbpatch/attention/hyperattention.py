"""HyperAttention: sorted hash blocks exactly, the rest by a uniform sample of keys (Han et al., arXiv 2310.05869)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import query_mask
from .patterns import beside
from .registry import Geometry, Whole, register

PLANES = 7  # of the hash, as in the paper's code: 128 values


@register("hyperattention")
class HyperAttention(Whole):
    """Queries and keys are sorted by an angular hash whose neighbouring values differ in one plane, and cut into blocks of
    `bucket`; a query reads the block of keys at its place exactly. Of the other keys it reads those of a sample of `rank`,
    drawn with replacement, each n / `rank` times: sums over them are unbiased.
    """

    called: ClassVar[str] = "hyperattention"
    rectangular = True

    planes: Tensor  # (H, d, PLANES)
    draws: Tensor  # (H, rank) uniform

    def __init__(self, site: Geometry, seed: int, bucket: int, rank: int) -> None:
        super().__init__()
        if bucket < 1 or rank < 1:
            raise SbpatchError(f"{self.called} needs blocks and a sample of at least one key, not {bucket} and {rank}")
        if site.causal:
            raise SbpatchError(
                f"{self.called} sorts all tokens, the future included; its causal form is not implemented"
            )
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer(
            "planes", torch.randn(site.heads, site.head_dim, PLANES, generator=generator), persistent=False
        )
        self.register_buffer("draws", torch.rand(site.heads, rank, generator=generator), persistent=False)
        self.bucket, self.rank = bucket, rank
        self.nnz, self.stored = float(min(bucket, site.tokens)), float(rank)

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        half = int(stored / 2)
        return {"bucket": half, "rank": half} if half else None

    def _order(self, x: Tensor, last: Tensor | None) -> Tensor:
        """Tokens sorted by their hash, (B, H, n); those in `last` (B, n) behind the others."""
        bits = (
            x.detach() @ self.planes.to(x) > 0
        ).long()  # (B, H, n, PLANES), a Gray code: its rank is the running parity
        rank = (bits.cumsum(-1) % 2 * 2 ** torch.arange(PLANES - 1, -1, -1, device=x.device)).sum(-1)
        if last is not None:
            rank = rank.masked_fill(last[:, None], 2**PLANES)
        n = x.shape[-2]
        return (rank * n + torch.arange(n, device=x.device)).argsort(-1)  # no two alike: any sort is stable

    def sample(self, real: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
        """Places among the sorted keys, real ones first, (B, H, m) int64; how many keys each stands for, (B, H, m).

        Args:
            real: (B, 1, 1) number of keys that are no padding.
            value: (B, H, n, e) of the sorted keys, zero at padding.
        """
        drawn = (self.draws.to(real.device).double()[None] * real).long()
        return drawn, (real / self.rank).expand(*drawn.shape)

    def logits(
        self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, v: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What each query reads, its queries in blocks. Where `v` (B, H, n, e) is given, the sample may depend on it.

        Returns:
            The query of each row (B, H, T, g); the keys it may read (B, H, T, b + m), of its block and of the sample;
            logarithms of the entries (B, H, T, g, b + m), -inf where a key is not read; the row of each query (B, H, n).
        """
        n, size = k.shape[-2], self.bucket
        blocks = math.ceil(n / size)
        padding = None if key_mask is None else ~key_mask
        hidden = None if query_mask(q, key_mask, k) is None else padding
        of_query, of_key = self._order(q, hidden), self._order(k, padding)
        row, spot = beside(q.shape[-2], n, size, q.device)
        place = torch.arange(blocks * size, device=q.device)
        query, key = of_query[..., row], of_key[..., place.clamp(max=n - 1)].unflatten(-1, (blocks, size))
        past = (place >= n).view(blocks, size)
        real = (
            torch.full((q.shape[0], 1, 1), n, device=q.device) if key_mask is None else key_mask.sum(-1)[:, None, None]
        )
        if v is not None:
            v = (v if key_mask is None else v * key_mask[:, None, :, None]).detach()
            v = v.gather(2, of_key[..., None].expand(*of_key.shape, v.shape[-1]))
        drawn, times = self.sample(real, v)
        sample = of_key.gather(-1, drawn[:, :, : self.rank])  # (B, H, m)
        sample = sample[:, :, None].expand(*key.shape[:3], -1)
        own = (drawn // size)[:, :, None] == torch.arange(blocks, device=q.device)[:, None]  # in the query's own block
        keys = torch.cat((key, sample), dim=-1)
        entries = scale * _rows(q, query) @ _rows(k, keys).mT
        weight = torch.cat((entries.new_zeros(*times.shape[:2], size), times.log().to(entries)), -1)
        unread = torch.cat((past.expand(*own.shape[:2], -1, -1), own), dim=-1)
        if padding is not None:
            unread = unread | padding[:, None].expand(*of_key.shape).gather(-1, keys.flatten(-2)).view_as(keys)
        entries = (entries + weight[:, :, None, None].to(entries)).masked_fill(unread[..., None, :], -torch.inf)
        places = torch.zeros_like(of_query).scatter(-1, of_query, spot.expand_as(of_query))
        return query, keys, entries, places

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        _, keys, entries, places = self.logits(q.float(), k.float(), key_mask, scale, v.float())
        output = entries.softmax(-1).nan_to_num(0.0) @ _rows(v.float(), keys)
        output = output.flatten(2, 3)
        return output.gather(2, places[..., None].expand(*places.shape, v.shape[-1])).to(v.dtype)

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        n = k.shape[-2]
        _, keys, entries, places = self.logits(q.double(), k.double(), key_mask, 1.0)
        rows = entries.softmax(-1).nan_to_num(0.0)
        matrix = rows.new_zeros(*rows.shape[:-1], n).scatter_add(-1, keys[..., None, :].expand_as(rows), rows)
        return matrix.flatten(2, 3).gather(2, places[..., None].expand(*places.shape, n))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, H, n, d) at index (B, H, T, s): (B, H, T, s, d)."""
    flat = index.flatten(2)
    return x.gather(2, flat[..., None].expand(*flat.shape, x.shape[-1])).unflatten(2, index.shape[2:])
