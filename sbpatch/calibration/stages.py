"""Measure every attention site on a sample batch and decide what each of its heads becomes: batches -> plan.

1. Per head: entropy and what else the exact attention is like. The paper's rule (arXiv 2110.15343, section 4): high entropy
   wants more low-rank, low entropy more sparse; here it orders the splits that are tried, and the measurement decides.
2. Per head, over a grid of methods, splits and budgets: the output error, and the damage that error does to the model's
   answer (see sensitivity), on the inputs that the exact model gives the site. Where heads are few, a second look between
   the points of that grid, around those that the budget would buy.
3. One budget for all heads of all sites: a choice on each head's curve of damage against cost (see allocate).
4. The few numbers of the chosen layers that are learned (see refine).
5. The whole model with that choice: on samples that no choice has seen, where there are any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import check_parameters, parse_method
from ..data import batch
from ..data.batch import Inputs
from ..errors import SbpatchError
from ..models.checkpoint import Answer
from ..plan.plan import Budget, Plan, SitePlan
from ..plan.recipe import Allocation, Objective, SiteSetting, check_patterns
from ..progress import Progress, no_progress
from ..sites.find import find_sites
from .candidates import FEW_HEADS, Candidate, built, candidates_for, site_seed
from .check import Check, checked, pick, smallest_that_keeps
from .choose import Choice
from .costs import CostTable, default_path
from .decide import MIN_TOKENS, first_decision, set_aside
from .journal import Journal
from .refine import LEARNED, REFINED, learn
from .sensitivity import DIRECTIONS
from .trial import Trial
from .weigh import coherence, promising


class Screen(NamedTuple):
    """Samples to choose on: all candidates are measured on the first few, the promising ones on a part of what there is."""

    first: int
    least: int
    most: int
    one_in: int

    def of(self, samples: int) -> int:
        return min(max(samples // self.one_in, self.least), self.most)


class Search(NamedTuple):
    """What the candidates of all sites depend on; `moments` are those of a site's queries and keys (see Trial.profile)."""

    answer: Answer
    budget: float
    method: str
    allocation: Allocation
    fixed: Mapping[str, SiteSetting]
    costs: CostTable | None
    moments: Mapping[str, tuple[Tensor, Tensor]]
    device: torch.device


# Each position of a text's logits is an answer of its own, so fewer texts say as much.
SCREENED: Mapping[Answer, Screen] = {
    "classes": Screen(2, 8, 32, 4),
    "features": Screen(2, 8, 32, 4),
    "next-token": Screen(1, 3, 8, 16),
    "tokens": Screen(1, 4, 8, 16),
}
CHECKED: Mapping[Answer, int] = {"classes": 1024, "features": 256, "next-token": 8, "tokens": 32}
WIDE = 0.06  # share of the entries around which candidates are tried where the budget is none of entries


@torch.inference_mode()
def calibrate(
    model: nn.Module,
    batches: Sequence[Inputs],
    *,
    budget: float = 0.03,
    max_drop: float | None = None,
    method: str = "auto",
    objective: Objective = "memory",
    allocation: Allocation = "joint",
    answer: Answer | None = None,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_tokens: int = MIN_TOKENS,
    fixed: Mapping[str, SiteSetting] = MappingProxyType({}),
    keep_slow: bool = False,
    costs: CostTable | None = None,
    refine: bool = False,
    name: str = "",
    journal: Journal | None = None,
    progress: Progress[Any] = no_progress,
) -> Plan:
    """Decide for every attention site of `model`, and every head of it, whether and how to patch it.

    Args:
        model: any module whose attention `find_sites` finds; it is left as it was.
        batches: sample inputs on the model's device, images (B, 3, H, W) or named tensors; run one batch at a time.
        budget: entries stored over entries of exact attention, on average over the sites, weighted by their entries; with
            `objective="time"` the share of the exact attention's time instead.
        max_drop: in place of a budget, the smallest one that costs the whole model at most this much: points of top-1 or
            of cosine x 100, percent of perplexity.
        method: `auto`, or a name that `attention.parse_method` takes; of a joined one the parts alone are tried too.
        objective: what `budget` is a share of.
        allocation: `joint`, or for comparison the budget at every site: `measured` takes the split with the lowest error,
            `entropy` the paper's rule, `uniform` half and half.
        answer: what `inputs.run(model, batch)` gives; by default told from its shape.
        seed: of everything random; the same seed and the same cost table give the same plan and the same tensors.
        include, exclude: shell patterns over site names; a site must match one of `include`, where given.
        min_tokens: with `keep_slow`, sites with fewer tokens stay exact.
        fixed: settings by shell pattern over site names, taken as they are instead of a search, slow or not.
        keep_slow: also take patches that are slower than exact attention on this device. By default a site or head where no
            patch is faster stays exact, and a site without any is set aside before the budget is shared out. No difference
            with `objective="time"`, which such patches cannot serve.
        costs: the times that decide this; by default those of this machine, measured where they are not known yet.
        refine: take more time to learn what is learned of the chosen layers (see refine).
        journal: keeps what was measured, so that a calibration that was cut off goes on where it was.

    Raises:
        SbpatchError: no attention found, nothing left to patch, or a budget that cannot be met.
    """
    _refuse_wrong(batches, budget, max_drop, method, allocation)
    sites = find_sites(model, batch.samples(batches[0], 0, 1))
    check_patterns([s.name for s in sites], {"--include": include, "--exclude": exclude, "the recipe's sites": fixed})
    device = batch.device(batches[0])
    if keep_slow and objective == "memory":
        costs = None
    else:
        first = next(model.parameters(), None)
        costs = costs or CostTable(default_path(), device, torch.float32 if first is None else first.dtype)
    plan = Plan(
        model=name, seed=seed, budget=Budget(requested=budget), objective=objective, allocation=allocation, max_drop=max_drop,
        sites=[first_decision(site, include, exclude, costs or min_tokens, fixed) for site in sites],
    )  # fmt: skip
    _refuse_empty(plan)
    answer = answer or _answer(model, batches[0], plan)
    screening = SCREENED[answer]
    screened = screening.of(sum(map(batch.count, batches)))
    screen = batch.first_samples(batches, screened)
    unseen = batch.first_samples(batch.after_samples(batches, screened), CHECKED[answer])

    trial = Trial(model, plan, answer, journal or Journal(None, ""), progress)
    plan, moments = trial.profile(screen)
    search = Search(answer, budget, method, allocation, fixed, costs, moments, device)
    plan, candidates = _candidates(plan, search)
    _refuse_empty(plan)
    choice = _measured(trial, plan, candidates, search, screen)
    check = Check(model, answer, screen, unseen, progress)
    if max_drop is None:
        plan = pick(choice.plans(budget), check)
    else:
        plan = smallest_that_keeps(choice.plans, choice.fits, max_drop, check)
    if not plan.patched:
        raise SbpatchError(
            f"nothing to patch: with {plan.budget.requested:g} of the entries every one of {len(plan.sites)} sites is best "
            "left exact; lower --budget, or allow a larger --max-drop"
        )
    few = batch.first_samples(screen, screening.least)
    plan = learn(model, plan, few, answer, REFINED if refine else LEARNED, progress)
    return checked(plan, check)


def _refuse_wrong(
    batches: Sequence[Inputs], budget: float, max_drop: float | None, method: str, allocation: Allocation
) -> None:
    """Refuse what no model can be calibrated with."""
    if not 0 < budget < 1:
        raise SbpatchError(f"budget {budget:g} is not a share between 0 and 1 (0.03 stores 3 % of the entries)")
    if max_drop is not None and not max_drop >= 0:
        raise SbpatchError(f"a drop of at most {max_drop:g} cannot be kept: it must be 0 or more")
    if max_drop is not None and allocation != "joint":
        raise SbpatchError(f"a drop is kept by the joint allocation alone, not by '{allocation}'")
    if method != "auto":
        parse_method(method)
    if not batches or not batch.count(batches[0]):
        raise SbpatchError("no samples to calibrate on")


def _refuse_empty(plan: Plan) -> None:
    if not plan.patched:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in plan.sites[:3])
        slow = plan.objective == "memory" and any(site.patched_ms is not None for site in plan.sites)
        advice = "; --keep-slow patches all the same, for the memory of eager attention" if slow else ""
        raise SbpatchError(f"nothing to patch among {len(plan.sites)} attention sites ({reasons}){advice}")


def _answer(model: nn.Module, inputs: Inputs, plan: Plan) -> Answer:
    """Class logits have two dimensions; of three, causal attention over token ids gives the next token's."""
    output = batch.run(model, batch.samples(inputs, 0, 1))
    if output.ndim == 2:
        return "classes"
    tokens = not isinstance(inputs, Tensor) and "input_ids" in inputs
    return "next-token" if tokens and any(site.causal for site in plan.sites) else "features"


def _candidates(plan: Plan, search: Search) -> tuple[Plan, dict[str, list[Candidate]]]:
    """Layers to try by site; in the plan, a site where none is faster than exact attention stays exact."""
    sites: list[SitePlan] = []
    found: dict[str, list[Candidate]] = {}
    heads = sum(site.heads for site in plan.patched)
    shared = plan.max_drop is None and plan.objective == "memory"
    for i, site in enumerate(plan.sites):
        sites.append(site)
        if site.decision != "patch":
            continue
        seed, moments = site_seed(plan.seed, i), search.moments.get(site.name)
        setting = next((s for pattern, s in search.fixed.items() if fnmatch(site.name, pattern)), None)
        if setting is not None:
            check_parameters(setting.method, setting.parameters, site.geometry)
            layer = built(setting.method, site, seed, moments, **setting.parameters).to(search.device)
            found[site.name] = [Candidate(layer, None if search.costs is None else search.costs.ms(layer))]
            continue
        layers, fastest = candidates_for(
            site, seed, search.budget if shared else WIDE, moments=moments, method=search.method,
            allocation=search.allocation, heads=heads, device=search.device, costs=search.costs,
        )  # fmt: skip
        if layers:
            found[site.name] = layers
        elif search.costs is not None:
            sites[-1] = set_aside(site, search.costs, fastest)
    return plan.model_copy(update={"sites": sites}), found


def _measured(
    trial: Trial, plan: Plan, candidates: dict[str, list[Candidate]], search: Search, screen: Sequence[Inputs]
) -> Choice:
    """The choice among the candidates, measured: all on the first samples, the best of them on the others."""

    def choice(candidates: dict[str, list[Candidate]], tried: Mapping[str, int]) -> Choice:
        simple = search.method == "auto" and plan.objective == "memory"
        return Choice(plan, candidates, tried, plan.objective, simple, search.costs)

    tried = _counts(candidates)
    if all(count == 1 for count in tried.values()):
        return choice(candidates, tried)
    first = SCREENED[search.answer].first
    look = batch.first_samples(screen, first)
    trial.measure(candidates, look, "trying splits")
    _weigh(candidates, search.answer)
    if search.allocation == "joint" and plan.max_drop is None and sum(site.heads for site in plan.patched) <= FEW_HEADS:
        found = choice(candidates, tried).closer(search.budget, search.moments, search.device)
        trial.measure(found, look, "looking closer")
        candidates = {site: layers + found[site] for site, layers in candidates.items()}
        _weigh(candidates, search.answer)
        tried = _counts(candidates)
    candidates = {site: promising(layers, plan.objective) for site, layers in candidates.items()}
    trial.measure(candidates, batch.after_samples(screen, first), "comparing the best")
    _weigh(candidates, search.answer)
    return choice(candidates, tried)


def _counts(candidates: Mapping[str, list[Candidate]]) -> dict[str, int]:
    return {site: len(layers) for site, layers in candidates.items()}


def _weigh(candidates: Mapping[str, list[Candidate]], answer: Answer) -> None:
    """Damage with the correlation of token errors, where all tokens reach one answer; a text's positions have their own."""
    if DIRECTIONS[answer] > 1:
        for layers in candidates.values():
            coherence(layers)
