"""What `bench` shows: a table, and a figure of time against length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Group, RenderableType
from rich.text import Text

from ..plan.card import GREY
from ..plan.report import SHAPE_EXPLAINED, readable_bytes, shape, simple_table

EXACT = {"sdpa": "black", "eager": GREY}


def table(rows: Sequence[Mapping[str, Any]], title: str) -> RenderableType:
    """One row a length (of a model: a shape of attention) and method; why a method was skipped, below."""
    listed = simple_table(
        title, method="left", tokens="right", budget="right", ms="right", SDPA="right", eager="right", peak="right",
        error="right",
    )  # fmt: skip
    for row in rows:
        tokens = shape(row["tokens"], row.get("queries"))
        tokens = f"{row['sites']} x {tokens}" if "sites" in row else tokens
        if "skipped" in row:
            listed.add_row(row["method"], tokens, f"{row['budget']:.4f}", "skipped", style="dim")
            continue
        method = f"{row['method']} ({row['chosen']})" if "chosen" in row else row["method"]
        ratios = [f"{row[key]:.2f}x" if key in row else "" for key in ("speedup_vs_sdpa", "speedup_vs_eager")]
        listed.add_row(
            method, tokens, f"{row['budget']:.4f}", f"{row['ms']:.2f}", *ratios,
            readable_bytes(row["peak_memory_bytes"]), f"{row['output_error']:.4f}",
        )  # fmt: skip
    reasons = dict.fromkeys(f"{row['method']}: {row['skipped']}" for row in rows if "skipped" in row)
    meaning = "budget: entries stored / n (causal: / (n + 1) / 2) · SDPA, eager: times faster than these"
    if any("queries" in row for row in rows):
        meaning += f" · {SHAPE_EXPLAINED}"
    if any("sites" in row for row in rows):
        meaning += " · 4 x 197: four sites of 197 tokens; ms: their sum, peak: the largest"
    return Group(listed, *(Text(reason, style="dim") for reason in reasons), Text(meaning, style="dim"))


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Time against tokens and output error against speed, all axes logarithmic, a line a method; skipped rows are left out."""
    measured = sorted((row for row in rows if "ms" in row), key=lambda row: row["tokens"])
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(dict.fromkeys(row["method"] for row in measured)):
        mine = [row for row in measured if row["method"] == name]
        marks = {"marker": "osD^vP*X"[i % 8], "color": EXACT.get(name, f"C{i % 10}"), "label": name, "linewidth": 1}
        left.plot([row["tokens"] for row in mine], [row["ms"] for row in mine], **marks)
        off = [row for row in mine if name not in EXACT and row["output_error"] > 0]
        right.plot([row["speedup_vs_sdpa"] for row in off], [row["output_error"] for row in off], **marks)
    together = ", all sites of that length" if any("sites" in row for row in measured) else ""
    lengths = sorted({row["tokens"] for row in measured})
    left.set(xlabel="tokens", ylabel=f"milliseconds{together}", xscale="log", yscale="log")
    left.set_xticks(lengths, [str(n) for n in lengths], minor=False)
    left.set_xticks([], minor=True)
    right.set(xlabel="times faster than SDPA", ylabel="output error", xscale="log", yscale="log")
    right.axvline(1, color="black", linewidth=0.8, linestyle="--")
    for axis in (left.yaxis, right.xaxis, right.yaxis):
        low, high = axis.get_view_interval()
        if high > 10 * low:
            axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set(major_formatter="{x:g}", minor_formatter="{x:g}" if high < 1000 * low else NullFormatter())
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(linewidth=0.3)
    left.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130, format="png")
