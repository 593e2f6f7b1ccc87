"""What a patched directory shows its reader: the model card and the plot."""

from __future__ import annotations

import math
from pathlib import Path

from .plan import Plan
from .report import COLUMNS_EXPLAINED, checked, number, shape

BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#dd7a2b", "#3a8f5c", "#9aa5b1"


def model_card(plan: Plan, head: str = "") -> str:
    """README.md of a patched directory, under the YAML that the hub reads, see `hub.front_matter`."""
    rows = "\n".join(
        f"| `{s.name}` | {shape(s.tokens, s.queries)} | {s.heads} | {number(s.entropy_ratio, '.3f')} | {s.decision} "
        f"| {s.method or ''} | {number(s.nnz, '.1f')} | {number(s.rank, 'd')} | {number(s.budget, '.4f')} "
        f"| {number(s.matrix_error, '.3f')} | {number(s.output_error, '.4f')} "
        f"| {number(s.exact_ms, '.3g')} | {number(s.patched_ms, '.3g')} | {s.reason} |"
        for s in plan.sites
    )
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    length = f" ({plan.input_size[0]} tokens each)" if plan.input_size and len(plan.input_size) == 1 else ""
    data = f"{plan.data.get('samples')} samples{length} of `{plan.data.get('source')}`"
    agreement = f"Checked {checked(plan)}.\n" if plan.check else ""
    return f"""{head}
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
    import matplotlib  # slow to import, and only plots need it
    from matplotlib.figure import Figure

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
    names = [f"{_short(s.name)}\n{shape(s.tokens, s.queries)} tokens\n{s.method}" for s in patched]
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
