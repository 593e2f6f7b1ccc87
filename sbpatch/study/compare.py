"""Methods side by side on one model and data set, all under one budget definition (the paper's Tables 1 and 6)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from rich.console import JustifyMethod, RenderableType
from torch import Tensor, nn

from .. import processes
from ..attention.registry import ALIASES, PARTS
from ..calibration.stages import calibrate
from ..data.batch import Inputs, device, run
from ..errors import SbpatchError
from ..measure import elapsed_ms
from ..models.answers import Kept, Scores, kept
from ..models.checkpoint import Answer
from ..plan.card import BLUE
from ..plan.patch import patch, unpatch
from ..plan.plan import Plan
from ..plan.recipe import Allocation
from ..plan.report import QUALITY, simple_table
from ..progress import Progress, no_progress

METHODS = (
    "window", "window2d", "lsh", "favor", "naive:lsh+favor", "lsh+favor", "window+favor", "bigbird", "strided", "nystromformer",
    "mra2", "clusters", "lsh+clusters", "window2d+clusters", "top-clusters+clusters", "coreset", "auto",
)  # fmt: skip
REFINED = "+refine"  # after the name of an allocation: what calibrate --refine makes of it


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
    sample: Sequence[Inputs],
    evaluation: Iterable[tuple[Inputs, Tensor]],
    *,
    methods: Sequence[str],
    budgets: Sequence[float],
    answer: Answer = "classes",
    allocations: Sequence[str] = (),
    seed: int = 0,
    progress: Progress[Any] = no_progress,
) -> list[dict[str, Any]]:
    """One row a method and budget, in the contract's keys, the first row the exact model (`exact`, budget 1).

    A method's parameters come from its budget; of a joined one the split that changes the model's answer least is taken.
    `auto` is what `calibrate` would do: it may give sites unequal budgets. With `allocations` there is a row for each of
    them, the budget shared out by that rule of `calibrate`, refined where `+refine` follows its name, and it is the row's
    `allocation`. Errors are means over the sites that calibration decided on; one that it left exact has none. Time is the
    median of a batch, all in one process; several processes share the exact model's batches, then the rows, and all return all
    rows.

    Args:
        evaluation: inputs and labels, gone through once a row, so that a set may be read anew each time (see `loading.Again`).

    Raises:
        SbpatchError: an unknown method; one that cannot work in a budget is left out, with the reason as its row's `skipped`.
    """
    place = device(sample[0])

    def answers(of: slice = slice(None)) -> tuple[list[Kept], list[float]]:
        found, times = [], []
        for x, y in islice(evaluation, of.start, of.stop, of.step):
            output, ms = elapsed_ms(partial(run, model, x), place)
            found.append(kept(answer, output, x, y))
            times.append(ms)
        return found, times

    exact, times = _of_all(*answers(processes.own()))
    if not exact:
        raise SbpatchError("no samples to compare on")
    rules: Sequence[str | None] = allocations or [None]
    wanted = [(method, budget, rule) for budget in budgets for method in methods for rule in rules]

    def row(method: str, budget: float, asked: str | None) -> dict[str, Any]:
        named = {"method": method} | ({"allocation": asked} if asked else {})
        try:
            rule = asked or ("joint" if method == "auto" else "measured")
            allocation, refine = cast(Allocation, rule.removesuffix(REFINED)), rule.endswith(REFINED)
            plan = calibrate(
                model,
                sample,
                budget=budget,
                method=method,
                seed=seed,
                allocation=allocation,
                answer=answer,
                refine=refine,
                keep_slow=True,
            )
        except SbpatchError as error:
            if str(error).startswith("unknown attention method"):
                raise
            return named | {"budget": budget, "skipped": str(error)}
        patch(model, plan)
        try:
            found, ms = answers()
        finally:
            unpatch(model)
        return named | {"budget": plan.budget.used} | _figures(found, exact, ms) | _errors(plan)

    mine = processes.share(wanted)
    with processes.alone():
        rows = [row(*each) for each in progress(mine, "comparing")]
    first = {"method": "exact", "budget": 1.0} | _figures(exact, exact, times)
    return [first, *processes.in_order(processes.gathered(rows))]


def _of_all(answers: Sequence[Kept], times: Sequence[float]) -> tuple[list[Kept], list[float]]:
    """Answers and times of the batches that each process ran, as those of all in their order."""
    tensors = {f"{i} {name}": torch.from_numpy(x) for i, one in enumerate(answers) for name, x in one.items()}
    shares: list[list[Kept]] = []
    for found, its in zip(processes.gathered_tensors(tensors), every := processes.gathered(list(times)), strict=True):
        share: list[dict[str, Any]] = [{} for _ in its]
        for key, tensor in found.items():
            i, _, name = key.partition(" ")
            share[int(i)][name] = tensor.numpy()
        shares.append(list(share))
    return processes.in_order(shares), processes.in_order(every)


def _figures(found: Sequence[Kept], exact: Sequence[Kept], times: Sequence[float]) -> dict[str, Any]:
    scores = Scores()
    for one, true in zip(found, exact, strict=True):
        scores.add(one, true)
    quality = {name: value for name, value in scores.figures().items() if name != "top5"}
    return quality | {"latency_ms": statistics.median(times)}


def _errors(plan: Plan) -> dict[str, Any]:
    decided = [site for site in plan.sites if site.method is not None]

    def mean(key: str) -> float:
        return statistics.mean(getattr(site, key) if site.decision == "patch" else 0.0 for site in decided)

    return {
        "matrix_error": mean("matrix_error"),
        "output_error": mean("output_error"),
        "sites": [site.model_dump(by_alias=True, exclude_none=True) for site in decided],
    }


def label(row: Mapping[str, Any]) -> str:
    """A row's method, and in brackets how its budget was shared out, where that was asked for."""
    return f"{row['method']} ({row['allocation']})" if "allocation" in row else str(row["method"])


def table(rows: Sequence[Mapping[str, Any]], title: str) -> RenderableType:
    """Rows by budget, lowest output error first."""
    figures = {
        **{key: (name, form) for key, (name, form, _) in QUALITY.items() if key in rows[0]},
        **{
            "output_error": ("output_error", ".4f"),
            "matrix_error": ("matrix_error", ".3f"),
            "latency_ms": ("ms", ".1f"),
        },
    }
    columns: dict[str, JustifyMethod] = {"method": "left", "budget": "right"}
    columns |= {name: "right" for name, _ in figures.values()}
    listed = simple_table(title, **columns)
    for row in sorted(
        rows, key=lambda r: (round(r["budget"], 2) if r["budget"] < 1 else 0, r.get("output_error", 0.0))
    ):
        if "skipped" in row:
            listed.add_row(label(row), f"{row['budget']:.4f}", "skipped", style="dim")
            continue
        cells = [format(row[key], form) if key in row else "" for key, (_, form) in figures.items()]
        listed.add_row(label(row), f"{row['budget']:.4f}", *cells)
    return listed


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Output error and agreement (or cosine): against budget, a line a method; of one budget, a row a method, best first."""
    quality = "agreement" if "agreement" in rows[0] else "cosine"
    measured = sorted((row for row in rows if "output_error" in row), key=lambda row: row["output_error"])
    names = list(dict.fromkeys(label(row) for row in measured))
    one_budget = len(names) == len(measured)
    figure = Figure(figsize=(12, max(4.0, 1 + 0.27 * len(names)) if one_budget else 5.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=one_budget)
    headings = (("output_error", "output error, mean over sites"), (quality, f"{quality} with the exact model"))
    for panel, (key, heading) in zip(axes, headings, strict=True):
        panel.spines[["top", "right"]].set_visible(False)
        if one_budget:
            panel.plot([row[key] for row in measured], names, "o", color=BLUE)
            panel.set_xlabel(heading)
            panel.grid(axis="y", linewidth=0.4)
            continue
        for i, name in enumerate(names):
            mine = sorted((row for row in measured if label(row) == name), key=lambda row: row["budget"])
            marks = {"marker": "osD^vP*X"[i % 8], "color": f"C{i % 10}", "label": name, "linewidth": 1}
            panel.plot([100 * row["budget"] for row in mine], [row[key] for row in mine], **marks)
        panel.set(xlabel="stored, % of the exact entries", ylabel=heading, xscale="log")
        panel.xaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    if one_budget:
        axes[0].set_xscale("log")
        axes[0].invert_yaxis()
    else:
        axes[0].set_yscale("log")
        axes[0].yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130, format="png")
