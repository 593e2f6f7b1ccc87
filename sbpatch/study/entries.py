"""Single attention entries: their squared error against q.k by method (arXiv 2110.15343, Figure 4), and why FAVOR+ errs.

One random feature estimates exp(q.k) with the variance exp(2 q.k) (exp(|q + k|^2) - 1), the mean of m with an m-th of it
(arXiv 2009.14794, Lemma 2): where |q + k|^2 is far above ln m, nearly every draw falls short and a rare one is huge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention import Geometry, Scatterbrain, sized_layer
from ..attention.favor import Favor
from ..errors import SbpatchError
from .oracles import PROCESS, SHARE, process_queries, rank_for

ENTRY_METHODS = ("favor", "lsh", "window", "lsh+favor", "window+favor")
ENTRY_SEEDS, ENTRY_SAMPLES, ENTRY_BINS = 4, 2, 16
ENTRY_BETA = PROCESS["width"] ** -0.5  # of Process 1 there: squared norms of sqrt(beta) Q are about 1
FEATURE_DRAWS = 8
Case = tuple[Tensor, Tensor, Geometry]  # q, k (1, 1, n, d) with logits q.k


def layer_if_any(method: str, site: Geometry, stored: float, split: float, seed: int) -> Scatterbrain | None:
    """`method` at that many stored entries a row, `split` of them low-rank; None where it cannot be had at this site."""
    try:
        return sized_layer(method, site, stored, low_rank=split, seed=seed)
    except SbpatchError:  # such as clusters on a causal site that has no wide window
        return None


def row_parameters(rank: int, site: Geometry) -> float:
    """What a matrix of that rank has for one of its rows: rank (rows + columns) / rows, so 2 rank where it is square."""
    return rank * (site.rows + site.tokens) / site.rows


def process_case(seed: int) -> Case:
    """Queries of Process 1, which are its keys too."""
    q = process_queries(**PROCESS, seed=seed)[None, None].float() * math.sqrt(ENTRY_BETA)
    return q, q, Geometry(q.shape[-2], 1, q.shape[-1])


def single_entries(name: str, cases: Sequence[Case], seed: int) -> dict[str, Any]:
    """Mean squared error of exp(q.k) / Z by bins of q.k, Z the exact row sum; over heads, samples and seeds."""
    exact, found = [], dict.fromkeys(ENTRY_METHODS, torch.zeros(0, dtype=torch.float64))
    for q, k, geometry in cases:
        logits = (q.double() @ k.double().mT)[0, 0]
        allowed = torch.ones_like(logits, dtype=torch.bool)
        allowed = allowed.tril() if geometry.causal else allowed
        log_sum = logits.masked_fill(~allowed, -torch.inf).logsumexp(-1, keepdim=True)
        exact.append(logits[allowed].cpu())
        for method in ENTRY_METHODS:
            wrong, stored = (
                torch.zeros_like(logits),
                row_parameters(rank_for(geometry.rows, geometry.tokens, SHARE), geometry),
            )
            for draw in range(ENTRY_SEEDS):
                layer = layer_if_any(method, geometry, stored, 0.5, seed + 101 * draw)
                if layer is None:  # too few tokens for the method
                    wrong += torch.nan
                    continue
                layer = layer.to(q.device)
                gap = -(logits - log_sum).exp()
                if layer.low_rank is not None:
                    gap += layer.low_rank.dense(q, k, None)[0, 0] * (-log_sum).exp()
                if layer.support is not None:
                    gap = gap.masked_fill(layer.support.dense(q, k, None).expand(1, 1, *logits.shape)[0, 0], 0)
                wrong += gap.square() / ENTRY_SEEDS
            found[method] = torch.cat((found[method], wrong[allowed].cpu()))
    return {"site": name, "tokens": cases[0][2].tokens, **binned(torch.cat(exact), found)}


def feature_estimates(name: str, cases: Sequence[Case], seed: int) -> dict[str, Any]:
    """How long q and k are, and how FAVOR+ estimates exp(q.k) over draws: means over heads, samples and queries.

    `sum_norm2` is |q + k|^2, `log_ratio` ln(estimate / exp(q.k)) of one draw, `log_spread` its standard deviation over
    draws, all three weighted by the exact attention, that is where the entries that matter are; `sum_norm2_median` is of
    all pairs alike.
    """
    sums: dict[str, float] = {}
    rank = rank_for(cases[0][2].rows, cases[0][2].tokens, SHARE)
    for q, k, geometry in cases:
        logits = (q.double() @ k.double().mT)[0, 0]
        hidden = (
            torch.ones_like(logits, dtype=torch.bool).triu(1) if geometry.causal else torch.zeros_like(logits).bool()
        )
        p = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        q2, k2 = (x.double().square().sum(-1)[0, 0] for x in (q, k))
        length = q2[:, None] + k2 + 2 * logits
        estimates = []
        for draw in range(FEATURE_DRAWS):
            features = Favor(geometry, seed + 101 * draw, rank).to(q.device)
            estimates.append(features.dense(q, k, None)[0, 0].clamp(min=1e-300).log())
        log_ratio = torch.stack(estimates) - logits  # (draws, n, n)
        found = {
            "query_norm2": q2.mean(),
            "key_norm2": k2.mean(),
            "sum_norm2": (p * length).sum(-1).mean(),
            "sum_norm2_median": length[~hidden].median(),
            "log_ratio": (p * log_ratio.mean(0)).sum(-1).mean(),
            "log_spread": (p * log_ratio.std(0)).sum(-1).mean(),
        }
        sums = {key: sums.get(key, 0.0) + float(value) for key, value in found.items()}
    return {"site": name, "rank": rank, **{key: total / len(cases) for key, total in sums.items()}}


def binned(x: Tensor, columns: Mapping[str, Tensor], bins: int = ENTRY_BINS) -> dict[str, Any]:
    """Means of the columns over equal steps of x between its 0.1 and 99.9 percentiles; None for an empty step."""
    x_sorted = x.sort().values
    low, high = (float(x_sorted[round(p * (len(x) - 1))]) for p in (0.001, 0.999))
    width = (high - low) / bins or 1.0
    place = ((x - low) / width).long().clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins)
    mse = {}
    for name, y in columns.items():
        total = torch.bincount(place, y, minlength=bins)
        mse[name] = [float(s / c) if c and s.isfinite() else None for s, c in zip(total, count, strict=True)]
    return {"qk": [low + (i + 0.5) * width for i in range(bins)], "count": count.tolist(), "mse": mse}
