"""Clustered keys as the low-rank part: exp(q.c[a(j)]) in place of exp(q.k_j), with c the mean of the cluster of key j.

Piecewise constant in the key, so the sum over keys needs only each cluster's count and value sum; a key that the sparse
part covers leaves both. By Jensen's inequality a cluster never weighs more than its keys do, so that step is safe.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SbpatchError
from . import kmeans
from .registry import Geometry, Summary, Tiles, register
from .tiles import columns, take


@register("clusters")
class Clusters(nn.Module):
    """`rank` key clusters a head: strided starting centres, `steps` Lloyd steps, all in key space.

    Causal sites cluster online: at each chunk of `CAUSAL_CHUNK` keys, new centres start there and its keys join the
    nearest cluster; a query reads the clusters of the chunks before its own, and its own chunk through the window. Where
    k and v have fewer heads than q (grouped queries), each is clustered once and read by all queries of its group.
    """

    kind: ClassVar[Literal["low-rank"]] = "low-rank"
    CAUSAL_CHUNK = 64

    sharpness: Tensor  # (H,) factor of q.c, learned at calibration: means lie nearer to the origin than their keys

    def __init__(self, site: Geometry, seed: int, rank: int, steps: int = 2) -> None:
        super().__init__()
        if rank < 1 or steps < 0:
            raise SbpatchError(f"clusters need a rank of at least 1 and steps of at least 0, not {rank} and {steps}")
        self.rank, self.steps, self.causal = rank, steps, site.causal
        self.register_buffer("sharpness", torch.ones(site.heads), persistent=False)
        chunks = -(-site.tokens // self.CAUSAL_CHUNK)
        begun = [self._begun(row // self.CAUSAL_CHUNK, chunks) for row in range(site.tokens)]
        self.stored = 1.0 + (sum(begun) / site.tokens if site.causal else rank)

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        each = 2 if site.causal else 1  # clusters begin as the sequence goes on: a row reads half of them, on average
        return {"rank": each * (int(stored) - 1)} if stored >= 2 else None

    def _clusters(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cluster of each key (B, H, n), then counts (B, H, m, 1), mean keys and mean values (B, H, m, d), float32."""
        k = k.float()
        index = kmeans.nearest(k.detach(), kmeans.lloyd(k.detach(), key_mask, self.rank, self.steps))[0]
        keep = k.new_ones(k.shape[0], 1, k.shape[2]) if key_mask is None else key_mask[:, None, :].to(k.dtype)
        count = kmeans.counts(index, self.rank, keep)
        mean_k, mean_v = (
            kmeans.sums(x, index, self.rank, None if key_mask is None else keep) / count.clamp(min=1)
            for x in (k, v.float())
        )
        return index, count, mean_k, mean_v

    # -- attention -------------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float = 1.0) -> Tensor:
        """Without a sparse part this is plain attention over the clusters, log-counts as the bias: one fused call.

        q, k, v are read where they lie: no scaled copies, so that the peak stays below that of exact fused attention.
        """
        _, count, mean_k, mean_v = self._clusters(k, v, key_mask)
        if q.shape[1] > k.shape[1]:
            rows = (q * self._sharp(q)).unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, H_k, group * n, d)
        else:
            rows, mean_k = q, mean_k * self._sharp(mean_k)
        bias = count.log().mT.to(q.dtype).expand(-1, -1, rows.shape[-2], -1)  # empty: -inf
        out = F.scaled_dot_product_attention(rows, mean_k.to(q.dtype), mean_v.to(q.dtype), attn_mask=bias, scale=scale)
        return out.reshape(*q.shape[:-1], v.shape[-1])

    def _sharp(self, x: Tensor) -> Tensor:
        """The factors, (H, 1, 1) in x's dtype."""
        return self.sharpness[:, None, None].to(x.dtype)

    def summarise(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Summary:
        q, k, v = q.float() * self._sharp(q.float()), k.float(), v.float()
        if self.causal:
            return self._summarise_causal(q, k, v, key_mask)
        own, count, mean_k, mean_v = self._clusters(k, v, key_mask)
        summed = torch.cat((count * mean_v, count), dim=-1)  # the last column sums to the denominator
        shifts, sums = [], []
        for rows in q.split(kmeans.CHUNK, 2):
            logits = (rows @ mean_k.mT).masked_fill(count.mT == 0, -torch.inf)  # (B, H, rows, m)
            shifts.append(logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min))
            sums.append((logits - shifts[-1]).exp() @ summed)
        shift, total = torch.cat(shifts, 2), torch.cat(sums, 2)

        def entries(tiles: Tiles) -> Tensor:
            logits = take(q, tiles.query) @ mean_k[:, :, None].mT  # (B, H, G, bq, m), cheaper again than kept
            # at most 0 where it counts; above it are clusters of padding alone, which would be inf here and NaN in gradients
            weight = (logits - take(shift, tiles.query)).clamp(max=0).exp()
            return columns(weight, take(own[..., None], tiles.key).squeeze(-1))

        return Summary(shift, total[..., :-1], total[..., -1:], entries)

    def _begun(self, chunk: int, chunks: int) -> int:
        """Clusters that begin before this chunk: `rank` in all, evenly spread, the first one in the first chunk."""
        return -(-self.rank * chunk // chunks)

    def _fresh(self, chunk: int, chunks: int) -> int:
        """Clusters that begin in this chunk."""
        return self._begun(chunk + 1, chunks) - self._begun(chunk, chunks)

    def _summarise_causal(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Summary:
        size, (batch, heads, n, width) = self.CAUSAL_CHUNK, k.shape
        chunks = -(-n // size)
        mask = torch.ones(batch, n, dtype=torch.bool, device=k.device) if key_mask is None else key_mask
        start = k.new_zeros(batch, heads, 0, width)  # where each cluster began: its place while it is empty
        count, sums = k.new_zeros(batch, heads, 0, 1), k.new_zeros(batch, heads, 0, width + v.shape[-1])
        kv = torch.cat((k, v), dim=-1)
        own, weights, shifts, numerators, denominators = [], [], [], [], []
        parts = zip(q.split(size, 2), k.split(size, 2), kv.split(size, 2), mask.split(size, 1), strict=True)
        for number, (queries, keys, rows, keep) in enumerate(parts):
            mean = sums / count.clamp(min=1)
            logits = (queries @ mean[..., :width].mT).masked_fill(count.mT == 0, -torch.inf)
            logits = F.pad(logits, (0, self.rank - logits.shape[-1]), value=-torch.inf)
            shift = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
            weight = (logits - shift).exp()
            used = weight[..., : count.shape[-2]]
            numerators.append(used @ (count * mean[..., width:]))
            denominators.append(used @ count)
            weights.append(weight)
            shifts.append(shift)
            # the chunk is complete now: found its clusters, then let every key join the nearest
            fresh = self._fresh(number, chunks)
            start = torch.cat((start, kmeans.strided(keys.detach(), keep, fresh)), dim=2)
            count, sums = F.pad(count, (0, 0, 0, fresh)), F.pad(sums, (0, 0, 0, fresh))
            centre = torch.where(count > 0, (sums / count.clamp(min=1))[..., :width].detach(), start)
            index, _ = kmeans.nearest(keys.detach(), centre)
            own.append(index)
            real = keep[:, None, :].to(k.dtype)
            count = count + kmeans.counts(index, count.shape[-2], real)
            sums = sums + kmeans.sums(rows, index, sums.shape[-2], real)
        weight, cluster = torch.cat(weights, 2), torch.cat(own, 2)

        def entries(tiles: Tiles) -> Tensor:
            value = columns(take(weight, tiles.query), take(cluster[..., None], tiles.key).squeeze(-1))
            past = (tiles.key // size)[..., None, :] < (tiles.query // size)[..., :, None]
            return value.masked_fill(~past, 0.0)

        return Summary(torch.cat(shifts, 2), torch.cat(numerators, 2), torch.cat(denominators, 2), entries)

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        q = q.double() * self._sharp(q.double())
        if self.causal:
            return self._dense_causal(q, k.double(), key_mask)
        member = F.one_hot(self._clusters(k, k, key_mask)[0], self.rank).double()  # (B, H, n, m)
        real = member if key_mask is None else member * key_mask[:, None, :, None]
        mean = real.mT @ k.double() / real.sum(-2).clamp(min=1)[..., None]
        return (q @ (member @ mean).mT).exp()

    def _dense_causal(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """One key after the other, as the definition reads; slow on purpose."""
        size, n = self.CAUSAL_CHUNK, k.shape[-2]
        chunks = -(-n // size)
        out = torch.zeros(*k.shape[:2], n, n, dtype=torch.float64)
        for b in range(k.shape[0]):
            for h in range(k.shape[1]):
                starts: list[Tensor] = []
                members: list[list[int]] = []
                for number, first in enumerate(range(0, n, size)):
                    chunk = range(first, min(first + size, n))
                    for cluster in members:
                        if cluster:
                            logits = q[b, h, list(chunk)] @ k[b, h, cluster].mean(0)
                            out[b, h, chunk.start : chunk.stop, cluster] = logits.exp()[:, None]
                    real = [j for j in chunk if key_mask is None or key_mask[b, j]]
                    fresh = self._fresh(number, chunks)
                    for t in range(fresh):
                        place = real[(2 * t + 1) * len(real) // (2 * fresh)] if real else None
                        starts.append(torch.zeros_like(k[b, h, 0]) if place is None else k[b, h, place])
                        members.append([])
                    centre = [k[b, h, m].mean(0) if m else s for m, s in zip(members, starts, strict=True)]
                    for j in real:
                        distance = torch.stack([(k[b, h, j] - c).norm() for c in centre])
                        members[int(distance.argmin())].append(j)
        return out
