"""What people read in the terminal: the plan, the sites, what eval found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from .plan import Plan, SitePlan

COLUMNS_EXPLAINED = (
    "entropy: mean over query rows of -sum p ln p, as a share of its largest value ln n (1: diffuse, 0: one key) · "
    "exact: keys computed exactly per query · rank: clusters or features beside them · "
    "budget: entries stored / n (causal: / (n + 1) / 2) · "
    "error: ||O' - O|| / ||O|| of the site's output, mean over samples and heads · "
    "speed: time of exact attention over time of this, by the device's cost table"
)

SHAPE_EXPLAINED = "n: 4096/1024 are 4096 queries against 1024 keys"


def simple_table(title: str, **columns: JustifyMethod) -> Table:
    """A table whose first column folds where the terminal is narrow; figures are never cut."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, (name, justify) in enumerate(columns.items()):
        table.add_column(name.strip("_").replace("_", " "), justify=justify, overflow="fold", no_wrap=i > 0)
    return table


def shape(tokens: int, queries: int | None) -> str:
    """A site's tokens, or its queries and keys where these are of different numbers."""
    return f"{queries}/{tokens}" if queries else str(tokens)


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
            label, shape(site.tokens, site.queries), str(site.heads), number(site.entropy_ratio, ".2f"), method,
            number(site.nnz, ".1f"), number(site.rank, "d"), number(site.budget, ".4f"), number(site.output_error, ".4f"),
            number(_speed(site), ".1f"),
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
    other = f" · {SHAPE_EXPLAINED}" if any(site.queries for site in plan.sites) else ""
    return Group(table, *notes, Text(COLUMNS_EXPLAINED + other, style="dim"))


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
        cells = (shape(site.tokens, site.queries), str(site.heads), str(site.head_dim))
        table.add_row(site.name, site.class_name, *cells, "yes" if site.causal else "no", grid, site.decision)
    reasons = dict.fromkeys(f"{s.decision}: {s.reason}" for s in plan.sites if s.decision != "patch")
    notes = [SHAPE_EXPLAINED] if any(site.queries for site in plan.sites) else []
    return Group(table, *(Text(note) for note in [*reasons, *notes]))


# Columns of eval that are there where they apply: key -> (heading, form, what it means).
QUALITY = {
    "top1": ("top1", ".2f", "top1, top5: percent right"),
    "top5": ("top5", ".2f", ""),
    "perplexity": ("perplexity", ".3f", "perplexity: exp of the mean negative log-likelihood of a token"),
    "agreement": ("agree", ".2f", "agree: percent whose top-1 is the exact model's"),
    "cosine": ("cosine", ".5f", "cosine: of the mean features to the exact model's, mean over samples"),
}


PERPLEXITIES = {
    "perplexity_to_1k": "up to the 1,024th token",
    "perplexity_1k_to_4k": "after it, up to the 4,096th",
    "perplexity_from_4k": "after that",
}


def eval_table(result: Mapping[str, Any]) -> RenderableType:
    """Eager, SDPA and patched side by side, time and memory also as ratios to SDPA; quality in the columns that apply."""
    variants = {name: v for name, v in result["variants"].items() if "latency_ms" in v}  # others were decoded alone
    base = variants["sdpa"]
    quality = {key: column for key, column in QUALITY.items() if key in base}
    columns: dict[str, JustifyMethod] = {"variant": "left", **{name: "right" for name, _, _ in quality.values()}}
    columns |= dict.fromkeys(("ms", "speed", "peak", "of_SDPA", "stored"), "right")
    table = simple_table(f"{result['model']} on {result['dataset']}", **columns)
    for variant, v in variants.items():
        table.add_row(
            variant, *(number(v.get(key), form) or "-" for key, (_, form, _) in quality.items()),
            f"{v['latency_ms']:.1f}", f"{base['latency_ms'] / v['latency_ms']:.2f}x",
            readable_bytes(v["peak_memory_bytes"]), f"{v['peak_memory_bytes'] / base['peak_memory_bytes']:.2f}x",
            readable_bytes(v["attention_memory_bytes"]), style="bold" if variant == "patched" else None,
        )  # fmt: skip
    meanings = " · ".join(meaning for _, _, meaning in quality.values() if meaning)
    size = f" of {result['length']} tokens" if "length" in result else ""
    if "calibrated_length" in result:
        size += f" (calibrated at {result['calibrated_length']}, the same share of the keys read)"
    last = " and its last position's logits" if "perplexity" in quality else ""
    if any(key not in v for v in variants.values() for key in quality):
        meanings += " · -: eager runs on the first batches alone, for its time and memory"
    setting = (
        f"{result['samples']} samples{size} in batches of {result['batch_size']}; {result['device']}, {result['dtype']}, "
        f"torch {result['versions']['torch']}. {meanings} · ms: median of a batch · "
        f"speed: against SDPA · peak: PyTorch's allocations for one batch{last}, weights apart · "
        "stored: by the attention of all sites for one sample, by the budget's accounting"
    )
    decoded = [decoded_table(result)] if "decoded" in result else []
    lines = _text_lines(variants)
    return Group(table, *lines, *decoded, Text(setting, style="dim"))


def decoded_table(result: Mapping[str, Any]) -> RenderableType:
    """Of eval with --generate: text decoded token by token, exact and with a compressed cache side by side."""
    setting = result["decoded"]
    rows = {name: v for name, v in result["variants"].items() if "decoded_perplexity" in v}
    exact = rows["sdpa"]
    columns: dict[str, JustifyMethod] = dict.fromkeys(
        ("perplexity", "ratio", "next", "continued", "tokens/s", "speed", "read"), "right"
    )
    table = simple_table(
        f"decoding {setting['tokens']} tokens after a prompt of {setting['prompt']:,}, {setting['windows']} windows",
        variant="left", **columns,
    )  # fmt: skip
    for name, v in rows.items():
        read = v.get("cache_read", 1.0 if name == "sdpa" else None)
        table.add_row(
            name, f"{v['decoded_perplexity']:.3f}", f"{v['decoded_perplexity'] / exact['decoded_perplexity']:.4f}x",
            f"{v['decoded_agreement']:.1f}", f"{v['continuation_agreement']:.1f}", f"{v['tokens_per_second']:.1f}",
            f"{v['tokens_per_second'] / exact['tokens_per_second']:.2f}x", "-" if read is None else f"{read:.1%}",
        )  # fmt: skip
    meaning = (
        "perplexity: of the text, token by token on the cache, and its ratio to exact's · next: percent of those steps whose "
        "likeliest next token is exact's · continued: percent of the same tokens at the same place, both going on greedily · "
        "read: of the cache, a step, on average"
    )
    return Group(table, Text(meaning, style="dim"))


def _text_lines(variants: Mapping[str, Mapping[str, float]]) -> list[Text]:
    """What eval has of a causal model besides the columns: time to the first token, and perplexity by position."""
    sdpa, lines = variants["sdpa"], []
    if "time_to_first_token_ms" in sdpa:
        times = (
            f"{name} {v['time_to_first_token_ms']:.1f} ms "
            f"({sdpa['time_to_first_token_ms'] / v['time_to_first_token_ms']:.2f}x)"
            for name, v in variants.items()
        )
        lines.append(Text("first token: " + ", ".join(times)))
    for name, meaning in PERPLEXITIES.items():
        if name in sdpa:
            found = ", ".join(f"{variant} {v[name]:.3f}" for variant, v in variants.items() if name in v)
            lines.append(Text(f"perplexity {meaning}: {found}"))
    if "eager" not in variants:
        lines.append(Text("eager is left out: a site's attention matrix would take too much memory"))
    return lines


def _grouped(sites: list[SitePlan]) -> list[tuple[SitePlan, int]]:
    """Runs of exact sites of one shape and reason as one row; patched sites each on their own."""
    groups: list[tuple[SitePlan, int]] = []
    for site in sites:
        last = groups[-1][0] if groups else None
        alike = last is not None and all(
            getattr(site, key) == getattr(last, key)
            for key in ("tokens", "queries", "heads", "head_dim", "decision", "reason")
        )
        if alike and site.decision != "patch" and last is not None:
            groups[-1] = (last, groups[-1][1] + 1)
        else:
            groups.append((site, 1))
    return groups


def number(value: float | None, form: str) -> str:
    """A figure in a form of `format`; nothing where there is none."""
    return "" if value is None else format(value, form)


def readable_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
