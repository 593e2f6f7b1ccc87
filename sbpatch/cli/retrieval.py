"""`sbpatch eval --dataset passkey|needle`: what the model finds again in its context, exact and patched side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import JustifyMethod
from rich.table import Table

from ..data import retrieval as data
from ..data.preprocessing import TextPreprocessing
from ..data.texts import open_text
from ..errors import SbpatchError
from ..measure import device_name
from ..models.checkpoint import Checkpoint
from ..plan.patch import patch
from ..plan.plan import Plan, versions
from ..plan.report import simple_table
from .flags import out, progress_bars

EACH = 4  # tasks a depth


def retrieval_figures(
    loaded: Checkpoint,
    plan: Plan | None,
    name: str,
    dataset: str,
    data_dir: Path | None,
    limit: int | None,
    seed: int,
    device: str,
    dtype: str,
    quiet: bool,
) -> dict[str, Any]:
    """The figures of `evaluation.retrieval` for the exact model, and for the patched one with its compressed cache.

    A model without a plan keeps its exact prompt, and the second variant, "compressed", is that with the cache compressed.

    Raises:
        SbpatchError: the model is no causal language model, or the text too short for its length.
    """
    if loaded.answer != "next-token" or loaded.family != "transformers":
        raise SbpatchError(f"{dataset} is for causal language models of transformers, and {loaded.name} is none")
    from transformers import DynamicCache  # slow to import, and only this needs it

    from ..evaluation.retrieval import retrieval
    from ..generation.cache import CompressedCache
    from ..generation.generate import patched_layers

    assert isinstance(loaded.preprocessing, TextPreprocessing)
    text = open_text("wikitext-2" if data_dir else "python-docs", data_dir=data_dir)
    each = EACH if limit is None else max(1, limit // len(data.DEPTHS))
    tasks = data.tasks(dataset, text, loaded.preprocessing, each=each, seed=seed)
    model: Any = loaded.model.to(device, getattr(torch, dtype))
    bars = progress_bars(quiet)
    variants = {"sdpa": retrieval(model, tasks, make_cache=lambda: DynamicCache(config=model.config), progress=bars)}
    if plan is not None:
        patch(model, plan)
    layers = patched_layers(model) if plan else None
    variants["patched" if plan else "compressed"] = retrieval(
        model, tasks, make_cache=lambda: CompressedCache(model.config, chosen=layers), progress=bars
    )
    if not quiet:
        out.print(_table(dataset, loaded.preprocessing.tokens, variants))
    return {
        "model": plan.model if plan else loaded.name,
        "dataset": f"{dataset} in {text.name}",
        "samples": len(tasks),
        "length": loaded.preprocessing.tokens,
        "seed": seed,
        "device": device_name(device),
        "dtype": dtype,
        "versions": versions(),
        "variants": variants,
    }


def _table(dataset: str, tokens: int, variants: dict[str, dict[str, Any]]) -> Table:
    depths = list(next(iter(variants.values()))["by_depth"])
    columns: dict[str, JustifyMethod] = dict.fromkeys((*depths, "all", "cache_read", "tokens/s"), "right")
    table = simple_table(f"{dataset}, {tokens:,} tokens: percent found, by depth", variant="left", **columns)
    for name, figures in variants.items():
        found = [f"{figures['by_depth'][depth]:.0f}" for depth in depths]
        read = f"{figures['cache_read']:.1%}" if "cache_read" in figures else "100.0%" if name == "sdpa" else "-"
        table.add_row(name, *found, f"{figures['accuracy']:.1f}", read, f"{figures['tokens_per_second']:.1f}")
    return table
