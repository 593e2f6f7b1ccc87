"""What people see of retrieval tasks: a table by depth and length, a heat map, and where exact attention only guesses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Group, JustifyMethod, RenderableType
from rich.text import Text

from ..plan.report import simple_table

Found = Mapping[int, Mapping[str, Mapping[str, Any]]]  # length -> variant -> figures of `retrieval`
MARGIN = 10.0  # points of percent over chance that say nothing, however many tasks there are


class Chance(NamedTuple):
    """What guessing finds, in percent, and of how many tasks a length."""

    percent: float
    tasks: int

    @property
    def most(self) -> float:
        """The largest accuracy that is not told from chance: two standard deviations of guessing over it, or `MARGIN`."""
        share = self.percent / 100
        return self.percent + max(200 * (share * (1 - share) / self.tasks) ** 0.5, MARGIN)

    def lengths(self, found: Found) -> list[int]:
        """Those at which the exact model does not find more than that."""
        return [tokens for tokens, variants in found.items() if variants["sdpa"]["accuracy"] <= self.most]


def by_variant(found: Found) -> dict[str, dict[str, Any]]:
    """Of one length each variant's figures; of several its mean accuracy (all have as many tasks), and figures by length."""
    if len(found) == 1:
        return {name: dict(figures) for name, figures in next(iter(found.values())).items()}
    return {
        name: {
            "accuracy": fmean(variants[name]["accuracy"] for variants in found.values()),
            "by_length": {str(tokens): dict(variants[name]) for tokens, variants in found.items()},
        }
        for name in next(iter(found.values()))
    }


def table(found: Found, title: str, chance: Chance) -> RenderableType:
    """Percent found by depth, a row a length and variant; below, at which lengths exact attention says nothing."""
    depths = _depths(found)
    columns: dict[str, JustifyMethod] = dict.fromkeys(("tokens", *depths, "all", "cache_read", "tokens/s"), "right")
    shown = simple_table(f"{title}: percent found, by depth", variant="left", **columns)
    for tokens, variants in found.items():
        for name, figures in variants.items():
            percent = [f"{figures['by_depth'][depth]:.0f}" for depth in depths]
            read = f"{figures['cache_read']:.1%}" if "cache_read" in figures else "100.0%" if name == "sdpa" else "-"
            shown.add_row(
                name, f"{tokens:,}", *percent, f"{figures['accuracy']:.1f}", read, f"{figures['tokens_per_second']:.1f}"
            )
    notes = [
        Text(
            f"{tokens:,} tokens: exact attention finds {found[tokens]['sdpa']['accuracy']:.0f} % of {chance.tasks} tasks, "
            f"guessing {chance.percent:.0f} %: too near to chance to say anything of the patch"
        )
        for tokens in chance.lengths(found)
    ]
    return Group(shown, *notes)


def plot(found: Found, path: Path, title: str, model: str) -> None:
    """Percent found at depth x length, a panel a variant."""
    import matplotlib  # slow to import, and only plots need it
    from matplotlib.figure import Figure

    matplotlib.use("Agg", force=False)
    names, depths = list(next(iter(found.values()))), _depths(found)
    figure = Figure(figsize=(len(names) * (2.2 + 0.8 * len(found)), 4.4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for panel, name in zip(panels, names, strict=True):
        percent = [[variants[name]["by_depth"][depth] for variants in found.values()] for depth in depths]
        image = panel.imshow(percent, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for y, row in enumerate(percent):
            for x, value in enumerate(row):
                panel.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")
        panel.set_xticks(range(len(found)), [f"{tokens:,}" for tokens in found], fontsize=8)
        panel.set_yticks(range(len(depths)), [f"{float(depth):.0%}" for depth in depths])
        panel.set(xlabel="tokens", title=name)
    panels[0].set_ylabel("depth in the context")
    figure.colorbar(image, ax=panels, label="percent found")
    figure.suptitle(f"{title}\n{model if len(model) <= 60 else '...' + model[-57:]}", fontsize=10)
    figure.savefig(path, dpi=130, format="png")


def _depths(found: Found) -> list[str]:
    return list(next(iter(next(iter(found.values())).values()))["by_depth"])
