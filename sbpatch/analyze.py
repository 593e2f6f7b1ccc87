"""What the paper says of attention matrices, measured on a model's own: model, sample -> figures, plots, analysis.json.

1. Errors of the best sparse, best low-rank and robust-PCA approximations of every head at equal parameters, against the
   head's entropy, with correlations (arXiv 2110.15343, Figure 1 and Table 3).
2. Error and time of Scatterbrain layers against robust PCA (Figure 5, left).
3. Squared error of single entries against q.k: low-rank alone, sparse alone, both (Figure 4).
4. Process 1, the paper's generative model of attention, swept over its inverse temperature (Theorem 1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from . import analyze_plots, artifact
from .analyze_plots import table as table  # the figures for the terminal
from .attention import PARTS, Geometry, Scatterbrain, parse_method
from .attention.reference import exact_matrix
from .attention.robust_pca import robust_pca
from .calibrate import Progress, no_progress
from .errors import SbpatchError
from .measure import elapsed_ms
from .models import Checkpoint
from .oracles import PROCESS, SPLITS, both_parts, process_queries, process_sweep, pure_errors, rank_for, relative
from .plan import versions
from .sites import Call, Site, find_sites, swapped

JSON_FILE = "analysis.json"
TOKENS = 256  # a longer site is read at that many evenly spaced tokens, as queries and as keys
SAMPLES, MATRICES = 8, 96  # a head, and in all: a model with many heads is read on fewer samples, then at fewer heads
SHARE = 1 / 8  # parameters of every approximation over the entries of the matrix
METHODS = ("lsh+favor", "window+favor", "lsh+clusters")
ENTRY_METHODS = ("favor", "lsh", "window", "lsh+favor", "window+favor")
ENTRY_SEEDS, ENTRY_SAMPLES, ENTRY_BINS = 4, 2, 16
ENTRY_BETA = 1.0  # of Process 1 there
Case = tuple[Tensor, Tensor, Geometry]
PAIRS = (
    ("sparse_error", "low_rank_error"),
    ("entropy_ratio", "sparse_error"),
    ("entropy_ratio", "low_rank_error"),
    ("entropy_ratio", "robust_pca_error"),
)
COEFFICIENTS: dict[str, Any] = {"spearman": stats.spearmanr, "pearson": stats.pearsonr, "kendall": stats.kendalltau}


@torch.inference_mode()
def analyze(
    loaded: Checkpoint, batches: Sequence[Tensor], *, seed: int = 0, progress: Progress[Any] = no_progress
) -> dict[str, Any]:
    """All four studies of `batches`, inputs (B, 3, H, W) on the model's device. Same seed, same result, times apart.

    Raises:
        SbpatchError: no inputs, or no attention site that can be read.
    """
    if not batches or not len(batches[0]):
        raise SbpatchError("no samples to analyze")
    sites = [s for s in find_sites(loaded.model, batches[0][:1]) if s.unsupported is None]
    if not sites:
        raise SbpatchError(f"no attention of {loaded.name} is plain self-attention, so there is nothing to analyze")
    heads = [(site, head) for site in sites for head in range(site.geometry.heads)]
    heads = [heads[i * len(heads) // min(len(heads), MATRICES)] for i in range(min(len(heads), MATRICES))]
    samples = min(sum(map(len, batches)), max(1, min(SAMPLES, MATRICES // len(heads))))
    calls = _collect(loaded, sites, batches, samples, progress)
    read = [(s, h, b) for s, h in heads for b in range(samples)]
    points = [
        _point(site, head, sample, calls[site.name], seed + i)
        for i, (site, head, sample) in enumerate(progress(read, "approximating"))
    ]
    settings = {
        "samples": samples, "heads": len(heads), "matrices": len(points), "share": SHARE, "splits": list(SPLITS),
        "subsampled": {s.name: [s.geometry.tokens, TOKENS] for s in sites if s.geometry.tokens > TOKENS},
    }  # fmt: skip
    return {
        "model": loaded.name,
        "seed": seed,
        "versions": versions(),
        "device": str(batches[0].device),
        "settings": settings,
        "points": points,
        "correlations": {"matrices": correlations(points), "heads": correlations(_head_means(points))},
        "scatterbrain": against_robust_pca(points),
        "entries": [
            _entries(name, cases, seed)
            for name, cases in progress(list(_cases(heads, calls, seed).items()), "single entries")
        ],
        "process": process_sweep(seed, progress=progress),
    }


def _collect(
    loaded: Checkpoint, sites: list[Site], batches: Sequence[Tensor], samples: int, progress: Progress[Any]
) -> dict[str, list[Call]]:
    """q, k, v of every site at its evenly spaced tokens, one call a sample, in float32."""
    calls: dict[str, list[Call]] = {site.name: [] for site in sites}

    def observer(name: str) -> Callable[[Call], Tensor]:
        def observe(call: Call) -> Tensor:
            n = call.key.shape[-2]
            index = torch.arange(min(n, TOKENS), device=call.key.device) * n // min(n, TOKENS)
            q, k, v = (x.index_select(2, index).float() for x in (call.query, call.key, call.value))
            for b in range(len(q)):
                one = slice(b, b + 1)
                calls[name].append(Call(q[one], k[one], v[one], is_causal=call.is_causal, scale=call.softmax_scale))
            return call.exact()

        return observe

    flat = torch.cat(list(batches))[:samples]
    with swapped(loaded.model, {name: observer(name) for name in calls}):
        for image in progress(flat.split(1), "attention"):
            loaded.model(image)
    return calls


# -- one matrix ------------------------------------------------------------------------------------------------------


def sized_layer(method: str, site: Geometry, stored: float, split: float, seed: int) -> Scatterbrain | None:
    """`method` at that many stored entries a row, `split` of them low-rank; None where it cannot be had at this site."""
    sparse, low_rank = parse_method(method)
    shares = {sparse: stored, low_rank: stored}
    if sparse and low_rank:
        shares = {sparse: stored * (1 - split), low_rank: stored * split}
    parameters: dict[str, int] = {}
    for name, part in shares.items():
        sized = PARTS[name].sized(part, site) if name else {}
        if sized is None:
            return None
        parameters |= sized
    try:
        return Scatterbrain(method, site, seed, **parameters)
    except SbpatchError:  # clusters on a causal site that has no wide window
        return None


def _head(site: Site, head: int, call: Call) -> tuple[Tensor, Tensor, Tensor, Geometry]:
    q, k, v = (x[:, head : head + 1] for x in (call.query, call.key, call.value))
    return q, k, v, Geometry(q.shape[-2], 1, site.geometry.head_dim, site.geometry.causal)


def _point(site: Site, head: int, sample: int, calls: list[Call], seed: int) -> dict[str, Any]:
    """One attention matrix: its entropy and every approximation's error."""
    q, k, v, geometry = _head(site, head, calls[sample])
    scale, n = calls[sample].softmax_scale, geometry.tokens
    matrix = exact_matrix(q, k, scale, geometry.causal)[0, 0]
    rank = rank_for(n, n, SHARE)
    entropy = float(-torch.xlogy(matrix, matrix).sum(-1).mean())

    def oracle() -> tuple[float, float]:
        return both_parts(matrix, rank, [robust_pca(matrix, tolerance=1e-4).low_rank])

    (error, split), ms = elapsed_ms(oracle, q.device)
    layers: dict[str, Any] = {}
    unit = torch.eye(n, device=q.device)[None, None]  # a layer's output for these values is its matrix
    for method in METHODS:
        tried = []
        for share in SPLITS:
            layer = sized_layer(method, geometry, 2 * rank, share, seed)
            if layer is not None:
                layer = layer.to(q.device)
                tried.append((relative(layer(q, k, unit, scale=scale)[0, 0].double() - matrix, matrix), share, layer))
        if tried:
            best = min(tried, key=lambda t: t[0])
            times = [elapsed_ms(partial(best[2], q, k, v, scale=scale), q.device)[1] for _ in range(3)]
            layers[method] = {"error": best[0], "split": best[1], "stored": best[2].stored, "ms": min(times)}
    return {
        "site": site.name, "head": head, "sample": sample, "tokens": n, "rank": rank, "entropy": entropy,
        "entropy_ratio": entropy / math.log(n), **pure_errors(matrix, rank), "robust_pca_error": error,
        "robust_pca_split": split, "robust_pca_ms": ms, "scatterbrain": layers,
    }  # fmt: skip


def _head_means(points: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """One point a head: samples of one head are alike, so that p-values over all matrices are too small."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault((point["site"], point["head"]), []).append(point)
    return [{key: fmean(p[key] for p in g) for key in {x for pair in PAIRS for x in pair}} for g in groups.values()]


def correlations(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each of COEFFICIENTS with its two-sided p-value for each of PAIRS; None where a column is constant or under 3 long."""
    rows = []
    for a, b in PAIRS:
        x, y = [float(p[a]) for p in points], [float(p[b]) for p in points]
        row: dict[str, Any] = {"of": a, "and": b, "count": len(points)}
        defined = len(x) > 2 and min(x) < max(x) and min(y) < max(y)
        for name, function in COEFFICIENTS.items():
            found = function(x, y) if defined else None
            row[name], row[f"{name}_p"] = (float(found[0]), float(found[1])) if found is not None else (None, None)
        rows.append(row)
    return rows


def against_robust_pca(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Per method, over the matrices it can be used on: its error and time beside those of robust PCA."""
    summary = {}
    for method in METHODS:
        rows = [(p["scatterbrain"][method], p) for p in points if method in p["scatterbrain"]]
        if rows:
            summary[method] = {
                "matrices": len(rows),
                "error": fmean(s["error"] for s, _ in rows),
                "robust_pca_error": fmean(p["robust_pca_error"] for _, p in rows),
                "median_error_ratio": median(s["error"] / p["robust_pca_error"] for s, p in rows),
                "within_20_percent": fmean(s["error"] <= 1.2 * p["robust_pca_error"] for s, p in rows),
                "ms": fmean(s["ms"] for s, _ in rows),
                "robust_pca_ms": fmean(p["robust_pca_ms"] for _, p in rows),
                "median_time_ratio": median(p["robust_pca_ms"] / s["ms"] for s, p in rows),
            }
    return summary


def _cases(sites: Sequence[tuple[Site, int]], calls: Mapping[str, list[Call]], seed: int) -> dict[str, list[Case]]:
    """(q, k, geometry) with logits q.k to measure, by site; first those of Process 1, no model's."""
    q = process_queries(**PROCESS, seed=seed)[None, None].float() * math.sqrt(ENTRY_BETA)  # type: ignore[arg-type]
    cases: dict[str, list[Case]] = {"Process 1": [(q, q, Geometry(q.shape[-2], 1, q.shape[-1]))]}
    for site, head in sites:
        for call in calls[site.name][:ENTRY_SAMPLES]:
            q, k, _, geometry = _head(site, head, call)
            root = call.softmax_scale**0.5
            cases.setdefault(site.name, []).append((q * root, k * root, geometry))
    return cases


def _entries(name: str, cases: Sequence[Case], seed: int) -> dict[str, Any]:
    """Mean squared error of exp(q.k) / Z by bins of q.k, Z the exact row sum; over heads, samples and seeds."""
    exact, found = [], dict.fromkeys(ENTRY_METHODS, torch.zeros(0, dtype=torch.float64))
    for q, k, geometry in cases:
        logits = (q.double() @ k.double().mT)[0, 0]
        allowed = torch.ones_like(logits, dtype=torch.bool)
        allowed = allowed.tril() if geometry.causal else allowed
        log_sum = logits.masked_fill(~allowed, -torch.inf).logsumexp(-1, keepdim=True)
        exact.append(logits[allowed].cpu())
        for method in ENTRY_METHODS:
            wrong, stored = torch.zeros_like(logits), 2 * rank_for(geometry.tokens, geometry.tokens, SHARE)
            for draw in range(ENTRY_SEEDS):
                layer = sized_layer(method, geometry, stored, 0.5, seed + 101 * draw)
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


# -- output ----------------------------------------------------------------------------------------------------------


def check_output(directory: Path) -> None:
    """Refuse a directory that holds anything but an earlier analysis, before any work is done.

    Raises:
        SbpatchError: it holds something else, is a file or the current directory, or has no parent.
    """
    held = {p.name for p in directory.iterdir()} if directory.is_dir() else set()
    others = sorted(held - {JSON_FILE, *analyze_plots.PLOTS})
    if others:
        raise SbpatchError(f"output directory {directory} holds something else ({others[0]}): give another -o")
    if not held or directory.resolve() == Path.cwd():
        artifact.check_output(directory)


def write(result: dict[str, Any], directory: Path) -> None:
    """analysis.json and the plots, all of them or what was there before. Refuses what `check_output` does."""
    check_output(directory)
    with artifact.written_whole(directory) as fresh:
        fresh.mkdir()
        (fresh / JSON_FILE).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        for name, plot in analyze_plots.PLOTS.items():
            plot(result, fresh / name)
