"""Top clusters: each query reads exactly the keys of its best key clusters, an inverted file as in nearest-neighbour search.

Where attention is peaked, its error is a retrieval problem: the largest keys of a row carry the row, and position does not
find them. Small clusters do, because a query can rank them by their mean (Sivic and Zisserman, 2003; for attention:
Routing Transformer, arXiv 2003.05997; Quest, arXiv 2406.10774).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import Tiles, query_mask, take
from .registry import Geometry, Sparse, register
from .tree import balanced_tree

PEAKED = 0.8  # entropy / ln n below which a query's largest keys are looked for by content, not only by place
GROUP = 8  # similar queries that read the same clusters
LONG, LONG_GROUP = 4096, 128  # from so many tokens on, groups of so many: a fraction of the time
CHUNK = 256  # query groups ranked at once: the (groups, clusters) scores never exceed this many rows


@register("top-clusters")
class TopClusters(Sparse):
    """The `probes` best clusters of `CLUSTER` keys for each group of `group` similar queries.

    Keys and queries are grouped by balanced trees over their principal axes, so all shapes depend on n alone. A group
    ranks the clusters by its mean query, q.c + ln(count). The ranking computes n / (CLUSTER * group) scores a row, which
    are not attention entries and are dropped at once. Not causal: the trees are built over all tokens.
    """

    by_content = True
    rectangular = True
    CLUSTER = 4

    def __init__(self, site: Geometry, seed: int, probes: int, group: int = GROUP) -> None:
        super().__init__()
        if probes < 1:
            raise SbpatchError(f"top-clusters needs at least one cluster a query, not {probes}")
        if site.causal:
            raise SbpatchError("top-clusters groups all tokens, the future included, and cannot be causal; use window")
        if group < 1:
            raise SbpatchError(f"top-clusters ranks for groups of at least one query, not {group}")
        self.probes, self.group = probes, group
        self.nnz = float(min(probes * self.CLUSTER, site.tokens))

    @classmethod
    def tried(cls, site: Geometry, entropy_ratio: float) -> str | None:
        return "top-clusters+clusters" if entropy_ratio < PEAKED and not site.causal else None

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        if stored < cls.CLUSTER:
            return None
        group = {} if site.tokens < LONG else {"group": LONG_GROUP}
        return {"probes": int(stored / cls.CLUSTER)} | group

    def _groups(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query groups (B, H, G, GROUP), key clusters (B, H, C, CLUSTER), and each group's best clusters (B, H, G, p)."""
        real = query_mask(q, key_mask, k)
        query, cluster = balanced_tree(q, self.group, real), balanced_tree(k, self.CLUSTER, key_mask)
        mean_q, _ = _means(q, query, real)
        mean_k, count = _means(k, cluster, key_mask)
        best = []
        for rows in mean_q.split(CHUNK, 2):
            score = rows @ mean_k.mT + count.log().mT  # (B, H, CHUNK, C); an empty cluster: -inf
            best.append(score.topk(min(self.probes, score.shape[-1]), dim=-1, sorted=False).indices)
        return query, cluster, torch.cat(best, dim=2)

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> list[Tiles]:
        q = q * scale  # counts weigh beside the logits
        n, keys = q.shape[-2], k.shape[-2]
        query, cluster, best = self._groups(q, k, key_mask)
        key = take(cluster, best).flatten(-2)  # (B, H, G, p * CLUSTER)
        valid = (key < keys)[..., None, :]
        position = torch.arange(query[0, 0].numel(), device=q.device).expand_as(query.flatten(2))
        slot = torch.zeros_like(position).scatter(-1, query.flatten(2), position)[..., :n]
        return [Tiles(query.clamp(max=n - 1), key.clamp(max=keys - 1), valid, slot)]

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """Row by row: the group of each query, and the clusters that this group took."""
        query, cluster, best = self._groups(q, k, key_mask)
        n, count = q.shape[-2], k.shape[-2]
        out = torch.zeros(*q.shape[:2], n, count, dtype=torch.bool, device=q.device)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                for group, taken in zip(query[b, h], best[b, h], strict=True):
                    keys = cluster[b, h, taken].flatten()
                    out[b, h, group[group < n][:, None], keys[keys < count]] = True
        return out


def _means(x: Tensor, index: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means (B, H, G, d) of groups of rows, and how many real tokens each has, (B, H, G, 1)."""
    n = x.shape[-2]
    real, index = index < n, index.clamp(max=n - 1)
    if mask is not None:
        real = real & mask[:, None].expand(-1, index.shape[1], -1).gather(-1, index.flatten(2)).view_as(index)
    count = real.sum(-1, keepdim=True).float()
    total = (take(x.detach().float(), index) * real[..., None]).sum(-2)
    return total / count.clamp(min=1), count
