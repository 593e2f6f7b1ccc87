"""What the paper says of attention matrices, measured on a model's own: model, sample -> figures, plots, analysis.json.

1. Errors of the best sparse, best low-rank and robust-PCA approximations of every head at equal parameters, against the
   head's entropy, with correlations (arXiv 2110.15343, Figure 1 and Table 3).
2. Error and time of Scatterbrain layers against robust PCA (Figure 5, left).
3. Squared error of single entries against q.k: low-rank alone, sparse alone, both (Figure 4); how far random features are
   off, and the lengths of q and k that make them so.
4. Process 1, the paper's generative model of attention, swept over its inverse temperature (Theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

import torch
from scipy import stats
from torch import Tensor

from .. import processes
from ..attention import Geometry
from ..attention.core import repeated
from ..attention.reference import exact_matrix
from ..attention.robust_pca import robust_pca
from ..data import batch
from ..errors import SbpatchError
from ..measure import elapsed_ms
from ..models.checkpoint import Checkpoint
from ..plan import artifact
from ..plan.plan import versions
from ..progress import Progress, no_progress
from ..sites.calls import Call
from ..sites.find import Site, find_sites
from ..sites.observe import Watcher, check_finite, observed
from ..writing import json_text, written_whole
from . import analyze_plots
from .analyze_plots import table as table  # the figures for the terminal
from .entries import (
    ENTRY_SAMPLES,
    Case,
    feature_estimates,
    layer_if_any,
    process_case,
    row_parameters,
    single_entries,
)
from .oracles import SHARE, SPLITS, both_parts, process_sweep, pure_errors, rank_for, relative

T = TypeVar("T")
JSON_FILE = "analysis.json"
TOKENS = 512  # a longer site is read at that many evenly spaced tokens, as queries and as keys
SAMPLES, MATRICES = 8, 144  # a head, and in all: a model with many heads is read on fewer samples, then at fewer heads
LEAST = 1e-12  # an error that counts as none in a ratio
METHODS = ("lsh+favor", "window+favor", "lsh+clusters")
PAIRS = (
    ("sparse_error", "low_rank_error"),
    ("entropy_ratio", "sparse_error"),
    ("entropy_ratio", "low_rank_error"),
    ("entropy_ratio", "robust_pca_error"),
)
COEFFICIENTS: dict[str, Any] = {"spearman": stats.spearmanr, "pearson": stats.pearsonr, "kendall": stats.kendalltau}


@torch.inference_mode()
def analyze(
    loaded: Checkpoint, batches: Sequence[batch.Inputs], *, seed: int = 0, progress: Progress[Any] = no_progress
) -> dict[str, Any]:
    """All four studies of `batches`, inputs on the model's device. Same seed, same result, times apart.

    Several processes share the samples that the model runs on, then the matrices and all else, and all return the same.

    Raises:
        SbpatchError: no inputs, or no attention site that can be read.
    """
    if not batches or not batch.count(batches[0]):
        raise SbpatchError("no samples to analyze")
    sites = [s for s in find_sites(loaded.model, batch.samples(batches[0], 0, 1)) if s.unsupported is None]
    if not sites:
        raise SbpatchError(f"no attention of {loaded.name} is plain attention, so there is nothing to analyze")
    heads = [(site, head) for site in sites for head in range(site.geometry.heads)]
    heads = [heads[i * len(heads) // min(len(heads), MATRICES)] for i in range(min(len(heads), MATRICES))]
    samples = min(sum(map(batch.count, batches)), max(1, min(SAMPLES, MATRICES // len(heads))))
    calls = _collect(loaded, sites, batches, samples, progress)
    read = [(s, h, b) for s, h in heads for b in range(samples)]
    points = _shared(
        lambda i, one: _point(one[0], one[1], one[2], calls[one[0].name], seed + i), read, progress, "approximating"
    )
    settings = {
        "samples": samples, "heads": len(heads), "matrices": len(points), "share": SHARE, "splits": list(SPLITS),
        "subsampled": {s.name: [longest, TOKENS] for s in sites if (longest := _longest(s)) > TOKENS},
    }  # fmt: skip
    cases = list(_cases(heads, calls, seed).items())
    return {
        "model": loaded.name,
        "seed": seed,
        "versions": versions(),
        "device": str(batch.device(batches[0])),
        "settings": settings,
        "points": points,
        "correlations": {"matrices": correlations(points), "heads": correlations(_head_means(points))},
        "scatterbrain": against_robust_pca(points),
        "entries": _shared(lambda i, case: single_entries(*case, seed), cases, progress, "single entries"),
        "features": _shared(lambda i, case: feature_estimates(*case, seed), cases, progress, "random features"),
        "process": processes.from_first(lambda: process_sweep(seed, progress=progress)),
    }


def _shared(
    work: Callable[[int, T], dict[str, Any]], items: Sequence[T], progress: Progress[Any], description: str
) -> list[dict[str, Any]]:
    """`work(i, item)` of each item; of several processes each does a share."""
    mine = processes.share(list(enumerate(items)))
    return processes.in_order(processes.gathered([work(i, item) for i, item in progress(mine, description)]))


def _collect(
    loaded: Checkpoint, sites: list[Site], batches: Sequence[batch.Inputs], samples: int, progress: Progress[Any]
) -> dict[str, list[Call]]:
    """q, k, v of every site at evenly spaced real tokens of theirs, one call a sample, in float32, all with as many heads."""
    calls: dict[str, list[Call]] = {site.name: [] for site in sites}
    own: dict[str, Tensor] = {}  # of one sample

    def watcher(name: str) -> Watcher:
        def watch(call: Call, output: Tensor) -> None:
            keys, queries = _evenly(call.key, call.key_mask), _evenly(call.query, call.query_mask)
            for part, x, index in (("q", call.query, queries), ("k", call.key, keys), ("v", call.value, keys)):
                own[f"{part} {name}"] = repeated(x.index_select(2, index).float(), call.query.shape[1])
            own[f"scale {name}"] = torch.tensor(call.softmax_scale, dtype=torch.float64)

        return watch

    watchers, causal = {name: watcher(name) for name in calls}, {site.name: site.geometry.causal for site in sites}
    device = batch.device(batches[0])
    for some in progress(processes.rounds(batch.singles(batches)[:samples]), "attention"):
        own.clear()
        for inputs in processes.share(some):  # one, or none at the end
            observed(loaded.model, inputs, watchers, causal)
        for found in processes.gathered_tensors(own)[: len(some)]:
            for name, is_causal in causal.items():
                q, k, v = (found[f"{part} {name}"].to(device) for part in "qkv")
                calls[name].append(Call(q, k, v, is_causal=is_causal, scale=float(found[f"scale {name}"])))
    return calls


def _longest(site: Site) -> int:
    return max(site.geometry.rows, site.geometry.tokens)


def _evenly(x: Tensor, mask: Tensor | None) -> Tensor:
    """At most `TOKENS` evenly spaced real rows of x (1, H, n, d), mask (1, n): their indices."""
    real = torch.arange(x.shape[-2], device=x.device) if mask is None else mask[0].nonzero()[:, 0]
    count = min(len(real), TOKENS)
    return real[torch.arange(count, device=real.device) * len(real) // count]


# -- one matrix ------------------------------------------------------------------------------------------------------


def _head(site: Site, head: int, call: Call) -> tuple[Tensor, Tensor, Tensor, Geometry]:
    q, k, v = (x[:, head : head + 1] for x in (call.query, call.key, call.value))
    rows, keys = q.shape[-2], k.shape[-2]
    return q, k, v, Geometry(keys, 1, q.shape[-1], site.geometry.causal, queries=0 if rows == keys else rows)


def _point(site: Site, head: int, sample: int, calls: list[Call], seed: int) -> dict[str, Any]:
    """One attention matrix: its entropy and every approximation's error."""
    q, k, v, geometry = _head(site, head, calls[sample])
    scale, n = calls[sample].softmax_scale, geometry.tokens
    matrix = exact_matrix(q, k, scale, geometry.causal)[0, 0]
    check_finite(matrix, f"site '{site.name}'", "its attention matrix")
    rank = rank_for(geometry.rows, n, SHARE)
    entropy = float(-torch.xlogy(matrix, matrix).sum(-1).mean())

    def oracle() -> tuple[float, float]:
        return both_parts(matrix, rank, [robust_pca(matrix, tolerance=1e-4).low_rank])

    (error, split), ms = elapsed_ms(oracle, q.device)
    layers: dict[str, Any] = {}
    unit = torch.eye(n, device=q.device)[None, None]  # a layer's output for these values is its matrix
    for method in METHODS:
        tried = []
        for share in SPLITS:
            layer = layer_if_any(method, geometry, row_parameters(rank, geometry), share, seed)
            if layer is not None:
                layer = layer.to(q.device)
                tried.append((relative(layer(q, k, unit, scale=scale)[0, 0].double() - matrix, matrix), share, layer))
        if tried:
            best = min(tried, key=lambda t: t[0])
            times = [elapsed_ms(partial(best[2], q, k, v, scale=scale), q.device)[1] for _ in range(3)]
            layers[method] = {"error": best[0], "split": best[1], "stored": best[2].stored, "ms": min(times)}
    return {
        "site": site.name, "head": head, "sample": sample, "tokens": n, "rank": rank, "entropy": entropy,
        "entropy_ratio": entropy / math.log(max(n, 2)), **pure_errors(matrix, rank), "robust_pca_error": error,
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
                "median_error_ratio": median(s["error"] / max(p["robust_pca_error"], LEAST) for s, p in rows),
                "within_20_percent": fmean(s["error"] <= 1.2 * p["robust_pca_error"] for s, p in rows),
                "ms": fmean(s["ms"] for s, _ in rows),
                "robust_pca_ms": fmean(p["robust_pca_ms"] for _, p in rows),
                "median_time_ratio": median(p["robust_pca_ms"] / s["ms"] for s, p in rows),
            }
    return summary


def _cases(heads: Sequence[tuple[Site, int]], calls: Mapping[str, list[Call]], seed: int) -> dict[str, list[Case]]:
    """What single entries are measured of, by site; first Process 1, no model's."""
    cases = {"Process 1": [process_case(seed)]}
    for site, head in heads:
        for call in calls[site.name][:ENTRY_SAMPLES]:
            q, k, _, geometry = _head(site, head, call)
            root = call.softmax_scale**0.5
            cases.setdefault(site.name, []).append((q * root, k * root, geometry))
    return cases


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
    with written_whole(directory) as fresh:
        fresh.mkdir()
        (fresh / JSON_FILE).write_text(json_text(result), encoding="utf-8")
        for name, plot in analyze_plots.PLOTS.items():
            plot(result, fresh / name)
