"""Methods side by side on one model and data set, all under one budget definition (the paper's Tables 1 and 6)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import RenderableType
from torch import Tensor, nn

from .attention.registry import ALIASES, PARTS
from .calibrate import Progress, calibrate, no_progress
from .errors import SbpatchError
from .measure import elapsed_ms
from .patch import patch, unpatch
from .plan import Plan
from .report import simple_table

METHODS = (
    "window", "window2d", "lsh", "favor", "naive:lsh+favor", "lsh+favor", "window+favor", "bigbird", "strided", "nystromformer",
    "mra2", "clusters", "lsh+clusters", "window2d+clusters", "top-clusters+clusters", "coreset", "auto",
)  # fmt: skip


def method_names() -> str:
    """What `--methods` takes, in one line."""
    kinds: dict[str, list[str]] = {}
    for name, part in sorted(PARTS.items()):
        kinds.setdefault(part.kind, []).append(name)
    listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
    return f"auto, {', '.join(ALIASES)}, naive:SPARSE+LOW-RANK, or parts, alone or joined by +: {listed}"


@torch.inference_mode()
def compare(
    model: nn.Module,
    sample: Sequence[Tensor],
    evaluation: Sequence[tuple[Tensor, Tensor]],
    *,
    methods: Sequence[str],
    budgets: Sequence[float],
    seed: int = 0,
    progress: Progress[Any] = no_progress,
) -> list[dict[str, Any]]:
    """One row a method and budget, in the contract's keys, the first row the exact model (`exact`, budget 1).

    A method's parameters come from its budget; of a joined one the split with the lowest output error on the sample is taken.
    `auto` is what `calibrate` would do: it may give sites unequal budgets. Time is the median of a batch, all in one process.

    Raises:
        SbpatchError: an unknown method; one that cannot work in a budget is left out, with the reason as its row's `skipped`.
    """
    device = sample[0].device
    labels = torch.cat([y for _, y in evaluation])

    def run() -> tuple[Tensor, float]:
        found = [elapsed_ms(lambda x=x: model(x), device) for x, _ in evaluation]  # type: ignore[misc]
        return torch.cat([logits.cpu() for logits, _ in found]).argmax(-1), statistics.median(ms for _, ms in found)

    exact, ms = run()
    rows: list[dict[str, Any]] = [_row("exact", 1.0, exact, exact, labels, ms)]
    for method, budget in progress([(m, b) for b in budgets for m in methods], "comparing"):
        try:
            plan = calibrate(model, sample, budget=budget, method=method, seed=seed, uniform=method != "auto")
        except SbpatchError as error:
            if str(error).startswith("unknown attention method"):
                raise
            rows.append({"method": method, "budget": budget, "skipped": str(error)})
            continue
        patch(model, plan)
        try:
            predicted, ms = run()
        finally:
            unpatch(model)
        rows.append(_row(method, plan.budget.used, predicted, exact, labels, ms) | _errors(plan))
    return rows


def _row(method: str, budget: float, predicted: Tensor, exact: Tensor, labels: Tensor, ms: float) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "budget": budget}
    if bool((labels >= 0).all()):
        row["top1"] = 100 * float((predicted == labels).float().mean())
    return row | {"agreement": 100 * float((predicted == exact).float().mean()), "latency_ms": ms}


def _errors(plan: Plan) -> dict[str, Any]:
    sites = [site.model_dump(by_alias=True, exclude_none=True) for site in plan.patched]
    return {
        "matrix_error": statistics.mean(site["matrix_error"] for site in sites),
        "output_error": statistics.mean(site["output_error"] for site in sites),
        "sites": sites,
    }


def table(rows: Sequence[Mapping[str, Any]], title: str) -> RenderableType:
    """Rows by budget, lowest output error first."""
    listed = simple_table(
        title,
        method="left",
        budget="right",
        top1="right",
        agree="right",
        output_error="right",
        matrix_error="right",
        ms="right",
    )
    for row in sorted(
        rows, key=lambda r: (round(r["budget"], 2) if r["budget"] < 1 else 0, r.get("output_error", 0.0))
    ):
        if "skipped" in row:
            listed.add_row(row["method"], f"{row['budget']:.4f}", "skipped", style="dim")
            continue
        figures = [
            ("top1", ".2f"),
            ("agreement", ".2f"),
            ("output_error", ".4f"),
            ("matrix_error", ".3f"),
            ("latency_ms", ".1f"),
        ]
        cells = [format(row[key], form) if key in row else "" for key, form in figures]
        listed.add_row(row["method"], f"{row['budget']:.4f}", *cells)
    return listed


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Output error and agreement against budget, a line a method; a dot where there is one budget."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["method"] for row in rows if "output_error" in row))
    for i, name in enumerate(names):
        mine = sorted((r for r in rows if r["method"] == name and "output_error" in r), key=lambda r: r["budget"])
        x = [100 * r["budget"] for r in mine]
        style = {"marker": "osD^vP*X"[i % 8], "color": f"C{i % 10}", "label": name, "markersize": 6, "linewidth": 1}
        left.plot(x, [r["output_error"] for r in mine], **style)
        right.plot(x, [r["agreement"] for r in mine], **style)
    left.set(
        xlabel="stored, % of the exact entries", ylabel="output error, mean over sites", xscale="log", yscale="log"
    )
    right.set(xlabel="stored, % of the exact entries", ylabel="agreement with the exact model, %", xscale="log")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130, format="png")
