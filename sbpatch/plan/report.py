"""What people read: tables for the terminal, the model card, the plot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from .plan import Plan, SitePlan

BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#dd7a2b", "#3a8f5c", "#9aa5b1"

COLUMNS_EXPLAINED = (
    "entropy: mean over query rows of -sum p ln p, as a share of its largest value ln n (1: diffuse, 0: one key) · "
    "exact: keys computed exactly per query · rank: clusters or features beside them · "
    "budget: entries stored / n (causal: / (n + 1) / 2) · "
    "error: ||O' - O|| / ||O|| of the site's output, mean over samples and heads · "
    "speed: time of exact attention over time of this, by the device's cost table"
)


def simple_table(title: str, **columns: JustifyMethod) -> Table:
    """A table whose first column folds where the terminal is narrow; figures are never cut."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, (name, justify) in enumerate(columns.items()):
        table.add_column(name.strip("_").replace("_", " "), justify=justify, overflow="fold", no_wrap=i > 0)
    return table


def plan_table(plan: Plan) -> RenderableType:
    """The plan, one row a patched site and one a run of like exact sites; reasons and the columns' meaning below."""
    table = simple_table(
        f"plan for {plan.model or 'the model'}", site="left", n="right", heads="right", entropy="right", method="left",
        exact="right", rank="right", budget="right", error="right", speed="right",
    )  # fmt: skip
    notes = []
    for site, count in _grouped(plan.sites):
        label = site.name + (f" and {count - 1} like it" if count > 1 else "")
        method = site.method if site.decision == "patch" else Text(site.decision, style="dim")
        table.add_row(
            label, str(site.tokens), str(site.heads), _number(site.entropy_ratio, ".2f"), method,
            _number(site.nnz, ".1f"), _number(site.rank, "d"), _number(site.budget, ".4f"), _number(site.output_error, ".4f"),
            _number(_speed(site), ".1f"),
        )  # fmt: skip
        notes.append(Text(f"{label}: {site.reason}"))
    notes.append(
        Text(
            f"stored: {plan.budget.used:.4f} of the patched sites' entries (asked for {plan.budget.requested:g}), "
            f"{plan.budget.model:.4f} of the whole model's"
        )
    )
    if plan.check:
        notes.append(Text(checked(plan)))
    return Group(table, *notes, Text(COLUMNS_EXPLAINED, style="dim"))


def _speed(site: SitePlan) -> float | None:
    return site.exact_ms / site.patched_ms if site.exact_ms and site.patched_ms else None


def checked(plan: Plan) -> str:
    """What the whole model's check found, in one sentence."""
    c = plan.check
    which = "that the choice did not see" if c["unseen"] else "that the choice was made on: add --samples for others"
    parts = {
        "agreement": f"agreement with the exact model {c.get('agreement', 0):.1f} %",
        "cosine": f"cosine to the exact model's features {c.get('cosine', 0):.4f}",
        "perplexity_ratio": f"perplexity {c.get('perplexity_ratio', 0):.4f} times the exact model's",
    }
    return f"on {c['samples']:.0f} samples {which}: " + ", ".join(text for key, text in parts.items() if key in c)


def sites_table(plan: Plan) -> RenderableType:
    """What inspect shows: the sites as they were found."""
    table = simple_table(
        f"attention of {plan.model}", site="left", class_="left", n="right", heads="right", head_dim="right",
        causal="left", grid="left", decision="left",
    )  # fmt: skip
    for site in plan.sites:
        grid = "" if site.grid is None else f"{site.prefix} + {site.grid[0]}x{site.grid[1]}"
        shape = (str(site.tokens), str(site.heads), str(site.head_dim))
        table.add_row(site.name, site.class_name, *shape, "yes" if site.causal else "no", grid, site.decision)
    reasons = dict.fromkeys(f"{s.decision}: {s.reason}" for s in plan.sites if s.decision != "patch")
    return Group(table, *(Text(reason) for reason in reasons))


# Columns of eval that are there where they apply: key -> (heading, form, what it means).
QUALITY = {
    "top1": ("top1", ".2f", "top1, top5: percent right"),
    "top5": ("top5", ".2f", ""),
    "perplexity": ("perplexity", ".3f", "perplexity: exp of the mean negative log-likelihood of a token"),
    "agreement": ("agree", ".2f", "agree: percent whose top-1 is the exact model's"),
    "cosine": ("cosine", ".5f", "cosine: of the mean features to the exact model's, mean over samples"),
}


def eval_table(result: Mapping[str, Any]) -> RenderableType:
    """Eager, SDPA and patched side by side, time and memory also as ratios to SDPA; quality in the columns that apply."""
    base = result["variants"]["sdpa"]
    quality = {key: column for key, column in QUALITY.items() if key in base}
    columns: dict[str, JustifyMethod] = {"variant": "left", **{name: "right" for name, _, _ in quality.values()}}
    columns |= dict.fromkeys(("ms", "speed", "peak", "of_SDPA", "stored"), "right")
    table = simple_table(f"{result['model']} on {result['dataset']}", **columns)
    for variant, v in result["variants"].items():
        table.add_row(
            variant, *(_number(v.get(key), form) or "-" for key, (_, form, _) in quality.items()),
            f"{v['latency_ms']:.1f}", f"{base['latency_ms'] / v['latency_ms']:.2f}x",
            readable_bytes(v["peak_memory_bytes"]), f"{v['peak_memory_bytes'] / base['peak_memory_bytes']:.2f}x",
            readable_bytes(v["attention_memory_bytes"]), style="bold" if variant == "patched" else None,
        )  # fmt: skip
    meanings = " · ".join(meaning for _, _, meaning in quality.values() if meaning)
    size = f" of {result['length']} tokens" if "length" in result else ""
    last = " and its last position's logits" if "perplexity" in quality else ""
    if any(key not in v for v in result["variants"].values() for key in quality):
        meanings += " · -: eager runs on the first batches alone, for its time and memory"
    setting = (
        f"{result['samples']} samples{size} in batches of {result['batch_size']}; {result['device']}, {result['dtype']}, "
        f"torch {result['versions']['torch']}. {meanings} · ms: median of a batch · "
        f"speed: against SDPA · peak: PyTorch's allocations for one batch{last}, weights apart · "
        "stored: by the attention of all sites for one sample, by the budget's accounting"
    )
    return Group(table, Text(setting, style="dim"))


def _grouped(sites: list[SitePlan]) -> list[tuple[SitePlan, int]]:
    """Runs of exact sites of one shape and reason as one row; patched sites each on their own."""
    groups: list[tuple[SitePlan, int]] = []
    for site in sites:
        last = groups[-1][0] if groups else None
        alike = last is not None and all(
            getattr(site, key) == getattr(last, key) for key in ("tokens", "heads", "head_dim", "decision", "reason")
        )
        if alike and site.decision != "patch" and last is not None:
            groups[-1] = (last, groups[-1][1] + 1)
        else:
            groups.append((site, 1))
    return groups


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def readable_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


# -- files -----------------------------------------------------------------------------------------------------------


def model_card(plan: Plan) -> str:
    """README.md of a patched directory."""
    rows = "\n".join(
        f"| `{s.name}` | {s.tokens} | {s.heads} | {_number(s.entropy_ratio, '.3f')} | {s.decision} | {s.method or ''} "
        f"| {_number(s.nnz, '.1f')} | {_number(s.rank, 'd')} | {_number(s.budget, '.4f')} "
        f"| {_number(s.matrix_error, '.3f')} | {_number(s.output_error, '.4f')} "
        f"| {_number(s.exact_ms, '.3g')} | {_number(s.patched_ms, '.3g')} | {s.reason} |"
        for s in plan.sites
    )
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    length = f" ({plan.input_size[0]} tokens each)" if plan.input_size and len(plan.input_size) == 1 else ""
    data = f"{plan.data.get('samples')} samples{length} of `{plan.data.get('source')}`"
    agreement = f"Checked {checked(plan)}.\n" if plan.check else ""
    return f"""---
library_name: sbpatch
tags: [sbpatch, sparse-attention, low-rank-attention]
---

# {plan.model}, patched by sbpatch

{_weights(plan)}
`sbpatch.json` says which attention sites compute a calibrated sparse + low-rank approximation instead of the full matrix.

```python
import sbpatch
model = sbpatch.load("path/to/this/directory")
```

Calibrated on {data}, seed {plan.seed}, {versions}. Stored over the patched sites: {plan.budget.used:.4f} of the entries
(asked for {plan.budget.requested:g}); over the whole model, exact sites counted in full: {plan.budget.model:.4f}.
{agreement}How good it is on others, `sbpatch eval DIR --dataset NAME` measures.

![report](report.png)

{
        _table_head(
            "site",
            "tokens",
            "heads",
            "entropy / ln n",
            "decision",
            "method",
            "exact keys",
            "rank",
            "budget",
            "matrix error",
            "output error",
            "exact ms",
            "patched ms",
            "why",
        )
    }
{rows}

{
        COLUMNS_EXPLAINED.replace(" · ", "; ")
    }; matrix error: the same norm of the attention matrix itself, over a few samples;
exact ms, patched ms: of one sample, all heads; where a site stays exact, the latter is of the fastest patch.
"""


def _weights(plan: Plan) -> str:
    if plan.finetuned is None:
        return (
            "The weights are those of the base model, unchanged (`model.safetensors`, "
            f"SHA-256 of the base file `{plan.base_sha256}`)."
        )
    how = ", ".join(f"{name} {value}" for name, value in plan.finetuned.items())
    return (
        f"The weights (`model.safetensors`) were fine-tuned with the patch in place: {how}. The base model, unchanged, is in "
        f"`base` (SHA-256 of its file when it was calibrated `{plan.base_sha256}`). What calibration measured is of before."
    )


def _table_head(*names: str) -> str:
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def plot_plan(plan: Plan, path: Path) -> None:
    """report.png: how diffuse each site is, where its budget goes, and what error that leaves."""
    matplotlib.use("Agg", force=False)
    patched = plan.patched
    measured = [s for s in plan.sites if s.entropy is not None]
    figure = Figure(figsize=(12, 1.8 + 0.3 * max(len(measured), 2 * len(patched), 6)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1.1, 0.8))
    for y, site in enumerate(measured):
        colour = BLUE if site.decision == "patch" else GREY
        assert site.entropy is not None
        largest = math.log(site.tokens)
        left.plot([h / largest for h in site.entropy], [y] * site.heads, "o", color=colour, alpha=0.7, markersize=6)
    left.set_yticks(range(len(measured)), [_short(s.name) for s in measured], fontsize=8)
    left.set(xlim=(0, 1.02), title="entropy / ln n, a dot a head", xlabel="0: one key · 1: all keys alike")
    left.plot([], [], "o", color=BLUE, label="patched")
    left.plot([], [], "o", color=GREY, label="exact")
    left.legend(loc="lower left", fontsize=8)
    names = [f"{_short(s.name)}\n{s.tokens} tokens\n{s.method}" for s in patched]
    sparse = [100 * (s.nnz or 0) / s.geometry.row_keys for s in patched]
    low_rank = [100 * (s.budget or 0) - x for s, x in zip(patched, sparse, strict=True)]
    middle.barh(range(len(patched)), sparse, height=0.5, color=ORANGE, label="exact keys (sparse)")
    middle.barh(range(len(patched)), low_rank, height=0.5, left=sparse, color=BLUE, label="low-rank")
    middle.axvline(100 * plan.budget.used, color="black", linewidth=1, linestyle="--", label="average")
    middle.set_yticks(range(len(patched)), names, fontsize=8)
    middle.set(title="stored, % of the exact entries")
    middle.legend(fontsize=8, loc="best")
    bars = right.barh(range(len(patched)), [s.output_error or 0 for s in patched], height=0.5, color=GREEN)
    right.bar_label(bars, fmt="%.3f", fontsize=8, padding=3)
    right.set_yticks(range(len(patched)), [""] * len(patched))  # the names stand beside the middle
    right.set(title="output error")
    right.margins(x=0.2)
    for axes, rows in ((left, len(measured)), (middle, len(patched)), (right, len(patched))):
        axes.set_ylim(rows - 0.4, -0.6)  # first site on top
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{plan.model}: {plan.budget.used:.1%} of the entries of its patched sites\n{checked(plan) if plan.check else ''}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def _short(name: str) -> str:
    return name if len(name) <= 34 else "..." + name[-31:]
