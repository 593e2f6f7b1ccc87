"""What `bench` shows: a table, and a figure of time against length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text as Label
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from rich.console import Group, RenderableType
from rich.text import Text

from ..plan.card import BLUE, GREY
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
    """Output error against speed, a name at each point; of several lengths a line a method, beside time against tokens.

    All axes are logarithmic; skipped rows are left out.
    """
    measured = sorted((row for row in rows if "ms" in row), key=lambda row: row["tokens"])
    lengths = sorted({row["tokens"] for row in measured})
    figure = Figure(figsize=(12, 5.5) if len(lengths) > 1 else (9, 6.5), layout="constrained")
    if len(lengths) > 1:
        left, right = figure.subplots(1, 2)
        _lines(left, right, measured)
        together = ", all sites of that length" if any("sites" in row for row in measured) else ""
        left.set(xlabel="tokens", ylabel=f"milliseconds{together}", xscale="log", yscale="log")
        left.set_xticks(lengths, [str(n) for n in lengths], minor=False)
        left.set_xticks([], minor=True)
        left.legend(fontsize=8)
        panels = [left, right]
    else:
        right = figure.subplots()
        panels = [right]
        right.margins(x=0.15)
    right.set(xlabel="times faster than SDPA", ylabel="output error", xscale="log", yscale="log")
    right.axvline(1, color="black", linewidth=0.8, linestyle="--")
    if len(lengths) == 1:
        points = [row for row in measured if row["method"] not in EXACT and row["output_error"] > 0]
        _scatter(right, points)
    for axis in (panels[0].yaxis, right.xaxis, right.yaxis):
        low, high = axis.get_view_interval()
        if high > 10 * low:
            axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set(major_formatter="{x:g}", minor_formatter="{x:g}" if high < 1000 * low else NullFormatter())
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(linewidth=0.3)
    figure.suptitle(title, fontsize=11)
    if len(lengths) == 1:
        _name(figure, right, points)
    figure.savefig(path, dpi=130, format="png")


def _lines(left: Axes, right: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for i, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = [row for row in rows if row["method"] == name]
        marks = {"marker": "osD^vP*X"[i % 8], "color": EXACT.get(name, f"C{i % 10}"), "label": name, "linewidth": 1}
        left.plot([row["tokens"] for row in mine], [row["ms"] for row in mine], **marks)
        off = [row for row in mine if name not in EXACT and row["output_error"] > 0]
        right.plot([row["speedup_vs_sdpa"] for row in off], [row["output_error"] for row in off], **marks)


def _scatter(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """A point a row; those that no other beats in both are blue."""
    for row in rows:
        colour = GREY if any(_beats(other, row) for other in rows) else BLUE
        panel.plot(row["speedup_vs_sdpa"], row["output_error"], "o", color=colour, markersize=5)


def _name(figure: Figure, panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Each row's method beside its point, at the nearest of some places where it covers no point and no other name."""
    figure.draw_without_rendering()  # which lays out the axes
    pixels = figure.dpi / 72  # a point
    places = [panel.transData.transform((row["speedup_vs_sdpa"], row["output_error"])) for row in rows]
    taken = [Bbox.from_bounds(x - 3 * pixels, y - 3 * pixels, 6 * pixels, 6 * pixels) for x, y in places]
    shifts = [(x, y) for x in (7, -7, 25, -25, 45, -45) for y in range(-60, 61, 5)]
    shifts.sort(key=lambda shift: math.hypot(shift[0], 1.5 * shift[1]))
    for row, (px, py) in zip(rows, places, strict=True):
        label = panel.annotate(
            row["method"], (row["speedup_vs_sdpa"], row["output_error"]), (0, 0), textcoords="offset points", fontsize=8,
            va="center", arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        label.set_in_layout(False)
        own = Label.get_window_extent(label)

        def box(shift: tuple[int, int], x: float = px, y: float = py, own: Bbox = own) -> Bbox:
            left = x + pixels * shift[0] - (own.width if shift[0] < 0 else 0)
            return Bbox.from_bounds(left, y + pixels * shift[1] - own.height / 2, own.width, own.height)

        free = (shift for shift in shifts if not any(box(shift).overlaps(other) for other in taken))
        chosen = next(free, shifts[0])
        label.set_position(chosen)
        label.set_horizontalalignment("right" if chosen[0] < 0 else "left")
        taken.append(box(chosen))


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one row is both faster and closer than another."""
    return bool(one["speedup_vs_sdpa"] > other["speedup_vs_sdpa"] and one["output_error"] < other["output_error"])
