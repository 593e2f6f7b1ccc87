"""Measure every attention site on a sample batch and decide what it becomes: batches -> plan.

1. Entropy per site and head. The paper's rule (arXiv 2110.15343, section 4): high entropy wants more low-rank, low entropy
   more sparse; here the low-rank part's share of a site's budget starts at entropy / ln n.
2. Around that split a small grid of others, rank 0 and window 0 included, and of budgets. Each is run on the sample and
   its output error measured: entropy orders, the error decides.
3. One budget for all sites: greedily, the step that lowers the summed squared error most per stored entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .attention import Scatterbrain, parse_method
from .candidates import Candidate, allocate, candidates_for, promising, site_seed, worth_their_time
from .errors import SbpatchError
from .fidelity import matrix_error, row_entropy
from .plan import Budget, Decision, Plan, SitePlan, drawn_tensors
from .recipe import SiteSetting
from .sites import Call, Site, find_sites, swapped

MIN_TOKENS = 256  # below this, exact attention is one small fused call that no patch beats
SCREENED = 8  # samples that candidates are measured on, the first 2 for all of them; the chosen ones see every sample
FIRST_LOOK = 2
MATRIX_SAMPLES = 4  # samples for the matrix error, which costs as much as exact attention in eager mode

T = TypeVar("T")
Progress = Callable[[Sequence[T], str], Iterable[T]]


def no_progress(items: Sequence[T], description: str) -> Iterable[T]:
    return items


@torch.inference_mode()
def calibrate(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    budget: float = 0.03,
    method: str = "auto",
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_tokens: int = MIN_TOKENS,
    fixed: Mapping[str, SiteSetting] = MappingProxyType({}),
    uniform: bool = False,
    name: str = "",
    progress: Progress[Any] = no_progress,
) -> Plan:
    """Decide for every attention site of `model` whether and how to patch it.

    Args:
        model: any module whose attention runs through `scaled_dot_product_attention`; it is left as it was.
        batches: sample inputs, images (B, 3, H, W) on the model's device; they are run one batch at a time.
        budget: entries stored over entries of exact attention, averaged over the patched sites.
        method: `auto`, or a name that `attention.parse_method` takes; of a joined one the parts alone are tried too.
        seed: of everything random; the same seed gives the same plan and the same tensors.
        include, exclude: shell patterns over site names; a site must match one of `include`, where given.
        min_tokens: sites with fewer tokens stay exact.
        uniform: the budget at each site instead of on their average, and a joined method always joined.
        fixed: settings by shell pattern over site names, taken as they are instead of a search.

    Raises:
        SbpatchError: no attention found, nothing left to patch, or a budget that cannot be met.
    """
    if not 0 < budget < 1:
        raise SbpatchError(f"budget {budget:g} is not a share between 0 and 1 (0.03 stores 3 % of the entries)")
    if method != "auto":
        parse_method(method)
    if not batches or not len(batches[0]):
        raise SbpatchError("no samples to calibrate on")
    sites = find_sites(model, batches[0][:1])
    plan = Plan(model=name, seed=seed, budget=Budget(requested=budget), sites=[])
    plan.sites = [SitePlan.of(site, *first_decision(site, include, exclude, min_tokens)) for site in sites]
    if not plan.patched:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in plan.sites[:3])
        raise SbpatchError(f"nothing to patch among {len(plan.sites)} attention sites ({reasons})")

    screen = _first_samples(batches, SCREENED)
    look, rest = _first_samples(batches, FIRST_LOOK), _after(screen, FIRST_LOOK)
    _measure_entropy(model, plan, screen, progress)
    device = batches[0].device
    candidates: dict[str, list[Candidate]] = {}
    for i, site in enumerate(plan.sites):
        if site.decision == "patch":
            setting = next((s for pattern, s in fixed.items() if fnmatch(site.name, pattern)), None)
            if setting is None:
                candidates[site.name] = candidates_for(site, plan, i, method, device, uniform)
            else:
                layer = Scatterbrain(setting.method, site.geometry, site_seed(seed, i), **setting.parameters)
                candidates[site.name] = [Candidate(layer.to(device))]
    _measure_errors(model, candidates, look, progress, "trying splits")
    entries = {site.name: site for site in plan.patched}
    tried = {name: len(layers) for name, layers in candidates.items()}
    candidates = {name: promising(layers, entries[name]) for name, layers in candidates.items()}
    _measure_errors(model, candidates, rest, progress, "comparing the best")
    if method == "auto":
        candidates = {name: worth_their_time(layers, entries[name]) for name, layers in candidates.items()}
    chosen = allocate(plan, candidates)
    for i, site in enumerate(plan.sites):
        if site.name in chosen:
            site.use(chosen[site.name].layer, site_seed(seed, i))
            site.reason = _why(site, chosen[site.name].layer, tried[site.name])
    plan.settle_budget()
    _measure_plan(model, plan, batches, progress)
    return plan


def first_decision(
    site: Site, include: Sequence[str] = (), exclude: Sequence[str] = (), min_tokens: int = MIN_TOKENS
) -> tuple[Decision, str]:
    """What can be said of a site before anything is measured, and why."""
    if site.unsupported:
        return "unsupported", site.unsupported
    if include and not any(fnmatch(site.name, pattern) for pattern in include):
        return "exact", "not among --include"
    if any(fnmatch(site.name, pattern) for pattern in exclude):
        return "exact", "excluded"
    if site.geometry.tokens < min_tokens:
        return (
            "exact",
            f"{site.geometry.tokens} tokens: under {min_tokens}, exact attention costs too little to gain on",
        )
    return "patch", f"{site.geometry.tokens} tokens"


def _first_samples(batches: Sequence[Tensor], count: int) -> list[Tensor]:
    """The first `count` samples, in batches as they came."""
    taken, out = 0, []
    for batch in batches:
        if taken >= count:
            break
        out.append(batch[: count - taken])
        taken += len(out[-1])
    return out


def _after(batches: Sequence[Tensor], count: int) -> list[Tensor]:
    """What `_first_samples` of `count` leaves over."""
    out = []
    for batch in batches:
        if len(batch) > count:
            out.append(batch[count:])
        count = max(count - len(batch), 0)
    return out


# -- measuring -------------------------------------------------------------------------------------------------------


def _measure_entropy(model: nn.Module, plan: Plan, batches: Sequence[Tensor], progress: Progress[Tensor]) -> None:
    totals = {site.name: torch.zeros(site.heads, dtype=torch.float64) for site in plan.sites}

    def observer(name: str) -> Callable[[Call], Tensor]:
        def observe(call: Call) -> Tensor:
            totals[name] += row_entropy(call).double().sum(0).cpu()
            return call.exact()

        return observe

    supported = [site for site in plan.sites if site.decision != "unsupported"]
    with swapped(model, {site.name: observer(site.name) for site in supported}):
        for batch in progress(batches, "entropy"):
            model(batch)
    count = sum(len(batch) for batch in batches)
    for site in supported:
        site.entropy = (totals[site.name] / count).tolist()
        site.entropy_ratio = float(totals[site.name].mean()) / count / math.log(site.tokens)


def _measure_errors(
    model: nn.Module,
    candidates: dict[str, list[Candidate]],
    batches: Sequence[Tensor],
    progress: Progress[Tensor],
    description: str,
) -> None:
    """Run every candidate of every site on the inputs that the exact model gives that site."""

    def observer(tried: list[Candidate]) -> Callable[[Call], Tensor]:
        def observe(call: Call) -> Tensor:
            exact = call.exact()
            for candidate in tried:
                candidate.observe(call, exact)
            return exact

        return observe

    with swapped(model, {name: observer(tried) for name, tried in candidates.items()}):
        for batch in progress(batches, description):
            model(batch)


def _measure_plan(model: nn.Module, plan: Plan, batches: Sequence[Tensor], progress: Progress[Tensor]) -> None:
    """Errors of the chosen layers on all samples, the matrix error on a few, and the whole model's agreement."""
    from .patch import patch, unpatch

    layers = {name: layer.to(batches[0].device) for name, layer in plan.layers().items()}
    plan.tensors = {
        f"{n}.{key}": t.cpu().clone() for n, layer in layers.items() for key, t in drawn_tensors(layer).items()
    }
    final = {name: Candidate(layer) for name, layer in layers.items()}
    matrix: dict[str, list[Tensor]] = {name: [] for name in layers}

    def observer(name: str) -> Callable[[Call], Tensor]:
        def observe(call: Call) -> Tensor:
            exact = call.exact()
            final[name].observe(call, exact)
            for b in range(min(len(exact), MATRIX_SAMPLES - len(matrix[name]))):
                q, k, v = (x[b : b + 1] for x in (call.query, call.key, call.value))
                one = Call(q, k, v, is_causal=call.is_causal, scale=call.scale)
                matrix[name].append(matrix_error(layers[name], one))
            return exact

        return observe

    with swapped(model, {name: observer(name) for name in layers}):
        exact_outputs = [model(batch) for batch in progress(batches, "checking the plan")]
    for site in plan.patched:
        site.output_error = final[site.name].error
        site.matrix_error = float(torch.stack(matrix[site.name]).mean())
    patch(model, plan)
    try:
        pairs = [(model(b), e) for b, e in zip(progress(batches, "whole model"), exact_outputs, strict=True)]
    finally:
        unpatch(model)
    same = sum(int((found.argmax(-1) == exact.argmax(-1)).sum()) for found, exact in pairs)
    plan.agreement = 100.0 * same / sum(len(exact) for exact in exact_outputs)


def _why(site: SitePlan, layer: Scatterbrain, tried: int) -> str:
    """One line for the report: what the entropy rule would have taken, and what the measurement took."""
    assert site.entropy_ratio is not None
    if tried == 1:
        return "set by the recipe"
    share = (layer.low_rank.stored if layer.low_rank is not None else 0.0) / layer.stored
    return (
        f"entropy {site.entropy_ratio:.2f} of ln n suggests {site.entropy_ratio:.0%} low-rank; of {tried} layers tried, "
        f"{layer.method} with {share:.0%} low-rank had the error that paid best"
    )
