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
from .registry import Geometry, Summary, Tiles, register
from .tiles import columns, take

CHUNK = 1024  # keys handled at once: the (keys, m) scores never exceed this many rows


@register("clusters")
class Clusters(nn.Module):
    """`rank` key clusters a head: strided starting centres, `steps` Lloyd steps, all in key space.

    Causal sites cluster online: at each chunk of `CAUSAL_CHUNK` keys, new centres start there and its keys join the
    nearest cluster; a query reads the clusters of the chunks before its own, and its own chunk through the window.
    """

    kind: ClassVar[Literal["low-rank"]] = "low-rank"
    CAUSAL_CHUNK = 64

    def __init__(self, site: Geometry, seed: int, rank: int, steps: int = 2) -> None:
        super().__init__()
        if rank < 1 or steps < 0:
            raise SbpatchError(f"clusters need a rank of at least 1 and steps of at least 0, not {rank} and {steps}")
        self.rank, self.steps, self.causal = rank, steps, site.causal
        self.stored = rank + 1.0

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"rank": int(stored) - 1} if stored >= 2 else None

    # -- clustering, bidirectional ---------------------------------------------------------------------------------

    @staticmethod
    def _start(k: Tensor, key_mask: Tensor | None, count: int) -> Tensor:
        """`count` starting centres (B, H, count, d): keys at even strides over those that are not padding, else zeros."""
        n, odd = k.shape[-2], 2 * torch.arange(count, device=k.device) + 1
        if key_mask is None:
            return k.index_select(2, odd * n // (2 * count))
        seen = key_mask.cumsum(-1)  # (B, n)
        wanted = odd * seen[:, -1:] // (2 * count) + 1  # the t-th real token
        index = torch.searchsorted(seen, wanted).clamp(max=n - 1)  # (B, count)
        chosen = k.gather(2, index[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[-1]))
        return chosen.masked_fill(~key_mask.any(-1)[:, None, None, None], 0)

    def _members(self, k: Tensor, centre: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """One-hot membership (B, H, n, m) of keys k in their nearest centres, and half the squared distance (B, H, n).

        Padding is a member of nothing, at distance 0.
        """
        score = torch.baddbmm(
            centre.square().sum(-1).flatten(0, 1)[:, None, :], k.flatten(0, 1), centre.flatten(0, 1).mT, beta=-0.5
        ).unflatten(0, k.shape[:2])  # k.c - |c|^2 / 2: the largest is the nearest
        best, nearest = score.max(-1, keepdim=True)
        member = nearest == torch.arange(centre.shape[-2], device=k.device)
        distance = k.square().sum(-1) / 2 - best.squeeze(-1)
        if key_mask is None:
            return member, distance
        return member & key_mask[:, None, :, None], distance * key_mask[:, None, :]

    def _sums(
        self, k: Tensor, centre: Tensor, key_mask: Tensor | None, what: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Per cluster: counts (B, H, m, 1), sums of `what` (B, H, n, e) -> (B, H, m, e); per key: its distance (B, H, n).

        As a product with the one-hot matrix: the same bits on every run, where a scatter would race on a GPU.
        """
        count = torch.zeros_like(centre[..., :1])
        total = centre.new_zeros(*centre.shape[:-1], what.shape[-1])
        distances = []
        masks = [None] * len(k.split(CHUNK, 2)) if key_mask is None else key_mask.split(CHUNK, 1)
        for keys, rows, mask in zip(k.split(CHUNK, 2), what.split(CHUNK, 2), masks, strict=True):
            one_hot, distance = self._members(keys.detach(), centre, mask)
            member = one_hot.to(what.dtype)
            count = count + member.sum(-2)[..., None]
            total = total + member.mT @ rows
            distances.append(distance)
        return count, total, torch.cat(distances, dim=-1)

    def centres(self, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """Centres (B, H, m, d) float32 after the Lloyd steps.

        A cluster that ran empty moves to one of the keys farthest from their centres. In images many keys are alike (a
        plain background), strided starts repeat them, and without this most of the rank would be spent on nothing.
        """
        k = k.detach().float()
        centre = self._start(k, key_mask, self.rank)
        for _ in range(self.steps):
            count, total, distance = self._sums(k, centre, key_mask, k)
            far = distance.topk(min(self.rank, k.shape[-2]), dim=-1).indices  # (B, H, m)
            empty = count == 0
            turn = (empty.cumsum(-2) - 1).clamp(min=0, max=far.shape[-1] - 1).squeeze(-1)  # the t-th empty one takes
            key = far.gather(-1, turn)[..., None].expand(-1, -1, -1, k.shape[-1])  # the t-th farthest key
            centre = torch.where(empty, k.gather(2, key), total / count.clamp(min=1))
        return centre

    def _clusters(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Final centres (for membership), then counts (B, H, m, 1), mean keys and mean values (B, H, m, d)."""
        centre = self.centres(k, key_mask)
        count, total, _ = self._sums(k.float(), centre, key_mask, torch.cat((k, v), dim=-1).float())
        mean = total / count.clamp(min=1)
        return centre, count, mean[..., : k.shape[-1]], mean[..., k.shape[-1] :]

    # -- attention -------------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Without a sparse part this is plain attention over the clusters, log-counts as the bias: one fused call."""
        _, count, mean_k, mean_v = self._clusters(k, v, key_mask)
        bias = count.log().mT.to(q.dtype).expand(-1, -1, q.shape[-2], -1)  # empty: -inf
        return F.scaled_dot_product_attention(q, mean_k.to(q.dtype), mean_v.to(q.dtype), attn_mask=bias, scale=1.0)

    def summarise(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Summary:
        q, k, v = q.float(), k.float(), v.float()
        if self.causal:
            return self._summarise_causal(q, k, v, key_mask)
        centre, count, mean_k, mean_v = self._clusters(k, v, key_mask)
        logits = (q @ mean_k.mT).masked_fill(count.mT == 0, -torch.inf)
        shift = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        weight = (logits - shift).exp()  # (B, H, n, m)
        own = torch.cat([self._members(x, centre, None)[0].int().argmax(-1) for x in k.detach().split(CHUNK, 2)], dim=2)

        def entries(tiles: Tiles) -> Tensor:
            return columns(take(weight, tiles.query), take(own[..., None], tiles.key).squeeze(-1))

        return Summary(shift, weight @ (count * mean_v), weight @ count, entries)

    def _summarise_causal(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Summary:
        size, (batch, heads, n, width) = self.CAUSAL_CHUNK, k.shape
        chunks = -(-n // size)
        fresh = -(-self.rank // chunks)  # new clusters a chunk
        mask = torch.ones(batch, n, dtype=torch.bool, device=k.device) if key_mask is None else key_mask
        start = k.new_zeros(batch, heads, 0, width)  # where each cluster began: its place while it is empty
        count, sums = k.new_zeros(batch, heads, 0, 1), k.new_zeros(batch, heads, 0, width + v.shape[-1])
        kv = torch.cat((k, v), dim=-1)
        own, weights, shifts, numerators, denominators = [], [], [], [], []
        for queries, keys, rows, keep in zip(
            q.split(size, 2), k.split(size, 2), kv.split(size, 2), mask.split(size, 1), strict=True
        ):
            mean = sums / count.clamp(min=1)
            logits = (queries @ mean[..., :width].mT).masked_fill(count.mT == 0, -torch.inf)
            logits = F.pad(logits, (0, fresh * chunks - logits.shape[-1]), value=-torch.inf)
            shift = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
            weight = (logits - shift).exp()
            used = weight[..., : count.shape[-2]]
            numerators.append(used @ (count * mean[..., width:]))
            denominators.append(used @ count)
            weights.append(weight)
            shifts.append(shift)
            # the chunk is complete now: found its clusters, then let every key join the nearest
            start = torch.cat((start, self._start(keys.detach(), keep, fresh)), dim=2)
            count, sums = F.pad(count, (0, 0, 0, fresh)), F.pad(sums, (0, 0, 0, fresh))
            centre = torch.where(count > 0, (sums / count.clamp(min=1))[..., :width].detach(), start)
            member, _ = self._members(keys.detach(), centre, None)
            own.append(member.int().argmax(-1))
            member = (member & keep[:, None, :, None]).to(k.dtype)
            count, sums = count + member.sum(-2)[..., None], sums + member.mT @ rows
        weight, cluster = torch.cat(weights, 2), torch.cat(own, 2)

        def entries(tiles: Tiles) -> Tensor:
            value = columns(take(weight, tiles.query), take(cluster[..., None], tiles.key).squeeze(-1))
            past = (tiles.key // size)[..., None, :] < (tiles.query // size)[..., :, None]
            return value.masked_fill(~past, 0.0)

        return Summary(torch.cat(shifts, 2), torch.cat(numerators, 2), torch.cat(denominators, 2), entries)

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        if self.causal:
            return self._dense_causal(q.double(), k.double(), key_mask)
        member = self._members(k.float(), self.centres(k, key_mask), key_mask)[0].double()  # (B, H, n, m)
        mean = member.mT @ k.double() / member.sum(-2).clamp(min=1)[..., None]
        return (q.double() @ (member @ mean).mT).exp()

    def _dense_causal(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """One key after the other, as the definition reads; slow on purpose."""
        size, n = self.CAUSAL_CHUNK, k.shape[-2]
        chunks = -(-n // size)
        fresh = -(-self.rank // chunks)
        out = torch.zeros(*k.shape[:2], n, n, dtype=torch.float64)
        for b in range(k.shape[0]):
            for h in range(k.shape[1]):
                starts: list[Tensor] = []
                members: list[list[int]] = []
                for first in range(0, n, size):
                    chunk = range(first, min(first + size, n))
                    for cluster in members:
                        if cluster:
                            logits = q[b, h, list(chunk)] @ k[b, h, cluster].mean(0)
                            out[b, h, chunk.start : chunk.stop, cluster] = logits.exp()[:, None]
                    real = [j for j in chunk if key_mask is None or key_mask[b, j]]
                    for t in range(fresh):
                        place = real[(2 * t + 1) * len(real) // (2 * fresh)] if real else None
                        starts.append(torch.zeros_like(k[b, h, 0]) if place is None else k[b, h, place])
                        members.append([])
                    centre = [k[b, h, m].mean(0) if m else s for m, s in zip(members, starts, strict=True)]
                    for j in real:
                        distance = torch.stack([(k[b, h, j] - c).norm() for c in centre])
                        members[int(distance.argmin())].append(j)
        return out
