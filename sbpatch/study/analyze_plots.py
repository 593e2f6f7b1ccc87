"""What people see of an analysis: four plots and the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.text import Text

from ..plan.card import BLUE, GREEN, GREY, ORANGE
from ..plan.report import simple_table

KINDS = {"sparse_error": ("sparse", ORANGE), "low_rank_error": ("low-rank", BLUE)}
BOTH = ("sparse + low-rank", GREEN)
FLOOR = 1e-4  # least error of robust PCA on the plot: what is less is drawn there
PANELS = 4  # of the plot of single entries: Process 1 and sites, evenly chosen; the JSON holds all
Result = Mapping[str, Any]


def _figure(title: str, panels: int, width: float = 5.0, height: float = 4.4) -> tuple[Figure, list[Axes]]:
    matplotlib.use("Agg", force=False)
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, format="png")


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows]


def plot_entropy(result: Result, path: Path) -> None:
    """Figure 1, left, and Table 3: error against entropy, and the two errors against each other."""
    points = result["points"]
    share = f"{result['settings']['share']:.3g} of the entries"
    figure, (left, right) = _figure(f"{result['model']}: best approximations of each attention matrix, {share}", 2, 5.6)
    for key, (label, colour) in (*KINDS.items(), ("robust_pca_error", ("robust PCA: sparse + low-rank", GREEN))):
        entropy = _column(points, "entropy_ratio")
        left.plot(entropy, _column(points, key), "o", color=colour, alpha=0.6, markersize=5, label=label)
    left.set(xlabel="entropy / ln n", ylabel="relative Frobenius error", xlim=(0, 1.02), ylim=(0, None))
    left.set_title("error against entropy, a dot a matrix", fontsize=10)
    left.legend(fontsize=8)
    sites: list[str] = list(dict.fromkeys(p["site"] for p in points))
    colours = matplotlib.colormaps["viridis"]
    for i, site in enumerate(sites):
        own = [p for p in points if p["site"] == site]
        x, y = _column(own, "sparse_error"), _column(own, "low_rank_error")
        right.plot(x, y, "o", color=colours(i / max(len(sites) - 1, 1)), alpha=0.8, markersize=5, label=_tail(site))
    right.set(xlabel="error of the best sparse", ylabel="error of the best low-rank", xlim=(0, None), ylim=(0, None))
    found = result["correlations"]["matrices"][0]
    right.set_title(f"Spearman {_coefficient(found, 'spearman')} over {found['count']} matrices", fontsize=10)
    if len(sites) <= 12:
        right.legend(fontsize=7)
    _save(figure, path)


def plot_robust_pca(result: Result, path: Path) -> None:
    """Figure 5, left: error and time of Scatterbrain layers against robust PCA, a dot a matrix."""
    points, summary = result["points"], result["scatterbrain"]
    figure, axes = _figure(
        f"{result['model']}: Scatterbrain layers against robust PCA at equal parameters", max(len(summary), 1), 4.4
    )
    values = [p["robust_pca_error"] for p in points]
    values += [s["error"] for p in points for s in p["scatterbrain"].values()]
    limits = (max(min(values), FLOOR) / 1.3, max(values) * 1.3)
    for panel, (method, s) in zip(axes, summary.items(), strict=False):
        rows = [p for p in points if method in p["scatterbrain"]]
        y = [p["scatterbrain"][method]["error"] for p in rows]
        x = [max(error, FLOOR) for error in _column(rows, "robust_pca_error")]
        panel.loglog(x, y, "o", color=GREEN, alpha=0.6, markersize=5)
        panel.loglog(limits, limits, color="black", linewidth=1, label="equal")
        panel.loglog(limits, [1.2 * x for x in limits], color=GREY, linewidth=1, linestyle="--", label="20 % more")
        panel.set(xlim=limits, ylim=limits, xlabel="error of robust PCA", ylabel=f"error of {method}")
        panel.set_title(
            f"{method}: {s['median_error_ratio']:.3g} x its error,\n{_times(s['median_time_ratio'])} faster (medians)",
            fontsize=10,
        )
        panel.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def plot_entries(result: Result, path: Path) -> None:
    """Figure 4: mean squared error of single entries against q.k."""
    found = result["entries"]
    sites, count = found[1:], min(len(found) - 1, PANELS - 1)
    shown = found[:1] + [sites[i * len(sites) // count] for i in range(count)]
    title = f"{result['model']}: squared error of exp(q.k) / Z by q.k, equal parameters, mean over random draws"
    figure, axes = _figure(title, len(shown), 4.2)
    styles = {
        "favor": (BLUE, "-"), "lsh": (ORANGE, "-"), "window": (GREY, "--"), "lsh+favor": (GREEN, "-"),
        "window+favor": (GREEN, ":"),
    }  # fmt: skip
    for panel, site in zip(axes, shown, strict=True):
        for method, (colour, line) in styles.items():
            mse = [m or float("nan") for m in site["mse"][method]]  # zero has no place on a logarithmic axis
            panel.semilogy(site["qk"], mse, line, marker=".", color=colour, label=method)
        panel.set_title(f"{_tail(site['site'])}, {site['tokens']} tokens", fontsize=9)
        panel.set_xlabel("q.k")
    axes[0].set_ylabel("mean squared error")
    axes[0].legend(fontsize=8)
    _save(figure, path)


def plot_process(result: Result, path: Path) -> None:
    """Theorem 1: the three approximations of Process 1 over beta, the regimes shaded."""
    process = result["process"]
    rows = process["rows"]
    x = _column(rows, "ratio")
    title = (
        f"Process 1, n = {process['n']}, d = {process['width']}, clusters of {process['cluster']}: exp(beta Q Q^T) by "
        f"{process['kept_per_row']} parameters a row"
    )
    figure, (panel,) = _figure(title, 1, 7.5)
    for key, (label, colour) in (*KINDS.items(), ("both_error", BOTH)):
        panel.semilogx(x, _column(rows, key), "o-", color=colour, markersize=4, label=label)
    panel.axhline(process["epsilon"], color="black", linewidth=1, linestyle="--")
    panel.text(x[0], process["epsilon"] + 0.015, f"suffices: {process['epsilon']:g}", fontsize=8)
    shades = {"low-rank": BLUE, "sparse + low-rank": GREEN, "sparse": ORANGE, "none": GREY}
    step = (x[-1] / x[0]) ** (0.5 / max(len(x) - 1, 1))
    for row in rows:
        middle = row["ratio"]
        panel.axvspan(middle / step, middle * step, color=shades[row["regime"]], alpha=0.13, linewidth=0)
    for name in dict.fromkeys(_column(rows, "regime")):
        own = [row["ratio"] for row in rows if row["regime"] == name]
        panel.text((own[0] * own[-1]) ** 0.5, 1.06, f"{name}\nsuffices", ha="center", va="center", fontsize=9)
    panel.set(
        xlabel="beta sqrt(d) / ln n (high temperature left, low right)",
        ylabel="relative Frobenius error",
        ylim=(0, 1.14),
    )
    panel.legend(fontsize=8, loc="center left")
    _save(figure, path)


PLOTS: dict[str, Callable[[Result, Path], None]] = {
    "entropy.png": plot_entropy,
    "robust-pca.png": plot_robust_pca,
    "entries.png": plot_entries,
    "process.png": plot_process,
}


def table(result: dict[str, Any]) -> RenderableType:
    """The figures for the terminal: errors a site, correlations, robust PCA, regimes."""
    points, settings, process = result["points"], result["settings"], result["process"]
    errors = simple_table(
        f"attention of {result['model']}, best approximations with {settings['share']:g} of the parameters",
        site="left", n="right", entropy="right", sparse="right", low_rank="right", robust_PCA="right",
    )  # fmt: skip
    for site in dict.fromkeys(p["site"] for p in points):
        own = [p for p in points if p["site"] == site]
        keys = ("entropy_ratio", "sparse_error", "low_rank_error", "robust_pca_error")
        errors.add_row(site, str(own[0]["tokens"]), *(f"{fmean(p[key] for p in own):.3f}" for key in keys))
    found = simple_table(
        "correlations (p)", of="left", over="right", Spearman="right", Pearson="right", Kendall="right"
    )
    for over, rows in result["correlations"].items():
        for row in rows:
            name = f"{_words(row['of'])}, {_words(row['and'])}"
            figures = (_coefficient(row, key) for key in ("spearman", "pearson", "kendall"))
            found.add_row(name, f"{row['count']} {over}", *figures)
    layers = simple_table(
        "Scatterbrain against robust PCA: means, and medians of the ratios",
        method="left", error="right", of_its="right", within_20_pct="right", ms="right", its_ms="right", faster="right",
    )  # fmt: skip
    for method, s in result["scatterbrain"].items():
        layers.add_row(
            method, f"{s['error']:.3f}", f"{s['median_error_ratio']:.3g}x", f"{s['within_20_percent']:.0%}",
            f"{s['ms']:.2f}", f"{s['robust_pca_ms']:.0f}", _times(s["median_time_ratio"]),
        )  # fmt: skip
    features = simple_table(
        "FAVOR+ on single entries, weighted by attention", site="left", m="right", ln_m="right", q_norm2="right",
        k_norm2="right", sum_norm2="right", ln_ratio="right", spread="right",
    )  # fmt: skip
    for row in result["features"]:
        shown = ("query_norm2", "key_norm2", "sum_norm2", "log_ratio", "log_spread")
        rank = (str(row["rank"]), f"{math.log(row['rank']):.2f}")
        features.add_row(row["site"], *rank, *(f"{row[key]:.2f}" for key in shown))
    regimes = simple_table(
        f"Process 1: what suffices for an error of {process['epsilon']:g}", beta="right", ratio="right",
        sparse="right", low_rank="right", both="right", regime="left",
    )  # fmt: skip
    for row in process["rows"]:
        keys = ("ratio", "sparse_error", "low_rank_error", "both_error")
        regimes.add_row(f"{row['beta']:.2f}", *(f"{row[key]:.3f}" for key in keys), row["regime"])
    note = (
        f"{settings['matrices']} matrices: {settings['heads']} heads, {settings['samples']} samples. Entropy: over ln n · "
        "errors: relative Frobenius norm of the matrix · its: robust PCA's · samples of one head are alike, so p over heads "
        "is the honest one · norm2: |q|^2, |k|^2, |q + k|^2 · ln ratio: ln(estimate / exp(q.k)), which needs |q + k|^2 "
        "of about ln m or less to be near 0 · spread: of ln ratio over draws"
    )
    if settings["subsampled"]:
        note += f" · {', '.join(f'{k}: {a} tokens read at {b}' for k, (a, b) in settings['subsampled'].items())}"
    return Group(errors, found, layers, features, regimes, Text(note, style="dim"))


def _coefficient(row: Mapping[str, Any], name: str) -> str:
    return "none" if row[name] is None else f"{row[name]:+.2f} ({row[f'{name}_p']:.1g})"


def _words(key: str) -> str:
    return "entropy" if key == "entropy_ratio" else key.removesuffix("_error").replace("_", "-")


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def _tail(site: str) -> str:
    return site if len(site) <= 34 else "..." + site[-31:]
