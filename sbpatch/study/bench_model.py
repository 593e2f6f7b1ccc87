"""The attention calls of a model, measured one after the other while the model runs, and their figures put together."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from ..data.batch import Inputs
from ..data.preprocessing import TextPreprocessing
from ..errors import SbpatchError
from ..models.checkpoint import Checkpoint
from ..plan.recipe import check_patterns
from ..progress import Progress, no_progress
from ..sites.calls import Call
from ..sites.fidelity import second_moments
from ..sites.find import Site, find_sites
from ..sites.observe import Watcher, observed
from .bench import SHAPE, Moments, Row, call_rows, check_settings, with_speedups


def at_length(loaded: Checkpoint, tokens: int) -> Checkpoint:
    """A model of text, with samples of another length.

    Raises:
        SbpatchError: the model takes no text, or has no positions for so many tokens.
    """
    if not isinstance(loaded.preprocessing, TextPreprocessing):
        raise SbpatchError(
            f"{loaded.name} takes no text, and its tokens follow from the image: give --input-size, not --lengths"
        )
    from ..models.transformers_inputs import check_length  # slow to import; what takes text has it imported already

    check_length(loaded.model, tokens)
    return replace(loaded, preprocessing=loaded.preprocessing.resized(tokens))


@torch.inference_mode()
def bench_model(
    model: nn.Module,
    samples: Sequence[tuple[Inputs, Inputs]],
    methods: Sequence[str] = (),
    *,
    budget: float = 0.03,
    pattern: str = "*",
    seed: int = 0,
    progress: Progress[Any] = no_progress,
) -> list[Row]:
    """One row a shape of attention and method, over all sites of that shape (see `joined`).

    A call is measured when the exact model makes it, so that no more than one site's queries, keys and values are held.

    Args:
        samples: one pair a length, on the model's device: what is measured on, and another sample to fit the parts to that
            are fitted to data, as calibration does.
        methods: see `bench.call_rows`.
        pattern: a shell pattern over site names.

    Raises:
        SbpatchError: an unknown method, a budget that is no share, or no site that matches and can be patched.
    """
    check_settings(methods, budget)
    rows = []
    for one, other in samples:
        sites = _matching(find_sites(model, one), pattern)
        moments: dict[str, Moments] = {}
        _run(model, [s for s in sites if not s.geometry.causal], other, _keeper(moments))
        found: list[list[Row]] = []
        bar = iter(progress(range(len(sites)), f"{sites[0].geometry.tokens} tokens"))
        _run(model, sites, one, _measurer(found, methods, budget, seed, moments, bar))
        next(bar, None)  # which ends it
        rows += joined(found)
    return rows


def _keeper(moments: dict[str, Moments]) -> Callable[[Site, Call], None]:
    def keep(site: Site, call: Call) -> None:
        query, key = second_moments(call)
        moments[site.name] = query.mean(0).cpu(), key.mean(0).cpu()

    return keep


def _measurer(
    found: list[list[Row]],
    methods: Sequence[str],
    budget: float,
    seed: int,
    moments: dict[str, Moments],
    bar: Iterator[int],
) -> Callable[[Site, Call], None]:
    def measure(site: Site, call: Call) -> None:
        next(bar)
        found.append(call_rows(call, site, methods, budget, seed, moments.get(site.name)))

    return measure


def _matching(sites: Sequence[Site], pattern: str) -> list[Site]:
    check_patterns([site.name for site in sites], {"--site": [pattern]})
    chosen = [site for site in sites if fnmatch(site.name, pattern)]
    supported = [site for site in chosen if not site.unsupported]
    if not supported:
        raise SbpatchError(f"no site that --site '{pattern}' matches can be patched ({chosen[0].unsupported})")
    return supported


def _run(model: nn.Module, sites: Sequence[Site], inputs: Inputs, take: Callable[[Site, Call], None]) -> None:
    """Run the exact model; `take` gets the call of each site, in plain form."""

    def watcher(site: Site) -> Watcher:
        return lambda call, output: take(site, call)

    if sites:
        causal = {site.name: site.geometry.causal for site in sites}
        observed(model, inputs, {site.name: watcher(site) for site in sites}, causal)


def joined(by_site: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of several sites -> one row a shape and method, `sites` of them together.

    Milliseconds are added up, budgets and errors averaged (sites of one shape have the same number of entries), of the
    peaks of memory the largest is taken. What a method cannot do at one of them it cannot do.
    """
    shapes: dict[tuple[Any, ...], list[Sequence[Row]]] = {}
    for rows in by_site:
        shapes.setdefault(tuple(rows[0].get(key) for key in (*SHAPE, "queries")), []).append(rows)
    found: list[Row] = []
    for sites in shapes.values():
        found += with_speedups([_joined(same) for same in zip(*sites, strict=True)])
    return found


def _joined(rows: Sequence[Row]) -> Row:
    """The rows of one method at sites of one shape -> one."""
    first = {key: rows[0][key] for key in (*SHAPE, "queries", "method") if key in rows[0]} | {"sites": len(rows)}
    if skipped := next((row for row in rows if "skipped" in row), None):
        return first | {"budget": skipped["budget"], "skipped": skipped["skipped"]}
    if "chosen" in rows[0]:
        counts = Counter(row["chosen"] for row in rows)
        first["chosen"] = ", ".join(name if len(counts) == 1 else f"{n} {name}" for name, n in counts.most_common())
    return (
        first
        | {
            "budget": statistics.mean(row["budget"] for row in rows),
            "ms": sum(row["ms"] for row in rows),
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
            "output_error": statistics.mean(row["output_error"] for row in rows),
        }
        | ({"launched_ms": sum(row["launched_ms"] for row in rows)} if "launched_ms" in rows[0] else {})
    )
