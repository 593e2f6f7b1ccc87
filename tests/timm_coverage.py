"""What happens to the attention of every timm family: one small model of each is built, probed and patched.

`python tests/timm_coverage.py` prints the table of docs/supported-models.md; tests/test_timm_coverage.py compares the two.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections import Counter
from dataclasses import dataclass

import timm
import torch
from timm.models import list_modules
from torch import Tensor, nn

from sbpatch.errors import SbpatchError
from sbpatch.plan.report import shape
from sbpatch.sites.calls import Call
from sbpatch.sites.find import Site, find_sites
from sbpatch.sites.swap import swapped

SIZES = [
    "atto", "femto", "pico", "nano", "zepto", "t0", "xxtiny", "xxs", "xx_small", "micro", "mini", "tiny", "extra_small",
    "xs", "b0", "s0", "_t", "small", "lite", "_s", "_050", "18", "14", "26", "medium", "base",
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    family: str
    model: str
    site: str  # class
    sites: int
    tokens: str  # least to most; queries/keys where these are of different numbers
    outcome: str

    def __str__(self) -> str:
        return f"| {self.family} | `{self.model}` | `{self.site}` | {self.sites} | {self.tokens} | {self.outcome} |"


# The smallest of these families are still large and tall: two blocks of them at 224 px.
CUT = {family: {"depth": 2, "img_size": 224} for family in ("deepseek_vit", "gemma4_vit", "qwen3_vit")}
# Families that speak of attention in other files, and a member of each that has some.
MEMBERS = {"byobnet": "resnet50_clip", "mobilenetv3": "mobilenetv4_hybrid_medium"}
WITHOUT = "The model tried has no softmax of QK in: "
TRIED = 6  # models of a family that speaks of attention, until one has some


def examples(family: str) -> list[str]:
    """Small models of a family, the smallest first: by the words for size in their names, then by input, then by name."""
    if family in MEMBERS:
        return [MEMBERS[family]]

    def size(name: str) -> tuple[int, int, int, str]:
        rank = next((i for i, word in enumerate(SIZES) if word in name), len(SIZES))
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        pixels = config.input_size[-1] if config else 224
        return rank, pixels, len(name), name

    names = timm.list_models(module=family)
    speaks = re.search(
        r"softmax\(|scaled_dot_product|[Aa]ttention\w*\(",
        inspect.getsource(importlib.import_module(f"timm.models.{family}")),
    )
    return sorted([n for n in names if not n.startswith("test_")] or names, key=size)[: TRIED if speaks else 1]


def build(family: str, name: str) -> tuple[nn.Module, Tensor]:
    """The model with random weights, none of them zero as biases of attention often begin, and an image of its size."""
    torch.manual_seed(0)
    model = timm.create_model(name, **CUT.get(family, {})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    pixels = CUT.get(family, {}).get("img_size", model.pretrained_cfg["input_size"][-1])
    return model, torch.randn(1, 3, pixels, pixels)


def check(model: nn.Module, image: Tensor, sites: list[Site]) -> None:
    """Every site that can be patched is: its call arrives, is plain attention, and leaves no trace once restored."""
    arrived: Counter[str] = Counter()

    def through(site: Site) -> object:
        def replacement(call: Call) -> Tensor:
            arrived[site.name] += 1
            return call.plain(site.geometry.causal).exact()

        return replacement

    with torch.inference_mode():
        before = model(image)
        with swapped(model, {site.name: through(site) for site in sites}):
            patched = model(image)
        after = model(image)
    assert arrived == {site.name: 1 for site in sites}
    assert torch.equal(before, after)
    assert torch.linalg.vector_norm(patched - before) <= 1e-3 * torch.linalg.vector_norm(before)


def rows(family: str) -> list[Row]:
    """What the first of a family's examples with attention shows, one row a class of site and outcome; none where none has."""
    for name in examples(family):
        model, image = build(family, name)
        try:
            sites = find_sites(model, image)
        except SbpatchError:
            continue
        check(model, image, [site for site in sites if not site.unsupported])
        return _rows(family, name, sites)
    return []


def _rows(family: str, name: str, sites: list[Site]) -> list[Row]:
    groups: dict[tuple[str, str, bool], list[Site]] = {}
    for site in sites:
        kind = re.sub(r"\d+", "#", site.unsupported or "")
        groups.setdefault((site.class_name, kind, site.geometry.queries > 0), []).append(site)
    found = []
    for (cls, *_), group in groups.items():
        tokens = sorted({(site.geometry.tokens, site.geometry.queries) for site in group})
        span = " to ".join(dict.fromkeys(shape(*tokens[i]) for i in (0, -1)))
        reason = group[0].unsupported
        found.append(Row(family, name, cls, len(group), span, f"exact: {reason}" if reason else "patchable"))
    return found


def table(families: list[str] | None = None) -> str:
    """The table in Markdown, and the families without attention."""
    lines = ["| family | model tried | class of site | sites | tokens | |", "|---|---|---|---|---|---|"]
    without = []
    for family in families or list_modules():
        found = rows(family)
        lines += [str(row) for row in found]
        if not found:
            without.append(family)
        print(family, len(found), file=sys.stderr)
    return "\n".join([*lines, "", f"{WITHOUT}{', '.join(without)}."])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(sys.argv[1:]))
