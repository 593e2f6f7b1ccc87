"""Measure every attention site on a sample batch and decide what each of its heads becomes: batches -> plan.

1. Per head: entropy and what else the exact attention is like. The paper's rule (arXiv 2110.15343, section 4): high entropy
   wants more low-rank, low entropy more sparse; here it orders the splits that are tried, and the measurement decides.
2. Per head, over a grid of methods, splits and budgets: the output error, and the damage that error does to the model's
   answer (see sensitivity), on the inputs that the exact model gives the site.
3. One budget for all heads of all sites: a choice on each head's curve of damage against cost (see allocate).
4. The few numbers of the chosen layers that are learned (see refine).
5. The whole model with that choice: on samples that no choice has seen, where there are any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from . import inputs as batch
from .allocate import allocate
from .attention import Scatterbrain, parse_method
from .attention.per_head import Exact, Layer, PerHead
from .calls import Call
from .candidates import Allocation, Candidate, Objective, candidates_for, promising, site_seed, worth_their_time
from .check import Check, check_plan, pick, smallest_that_keeps
from .errors import SbpatchError
from .fidelity import head_profile
from .inputs import Inputs
from .journal import Journal
from .models import Answer
from .plan import Budget, Decision, Plan, SitePlan, drawn_tensors
from .progress import Progress, no_progress
from .recipe import SiteSetting, check_patterns
from .refine import LEARNED, REFINED, learn
from .sensitivity import answer_gradients
from .sites import Site, find_sites, swapped

MIN_TOKENS = 256  # below this, exact attention is one small fused call that no patch beats
# Samples that candidates are measured on: all of them on the first few, the promising ones on the rest. Each position of a
# text's logits is an answer of its own, so fewer texts say as much.
SCREENED: Mapping[Answer, tuple[int, int]] = {
    "classes": (2, 8),
    "features": (2, 8),
    "next-token": (1, 3),
    "tokens": (1, 4),
}
CHECKED: Mapping[Answer, int] = {"classes": 1024, "features": 256, "next-token": 8, "tokens": 32}
WIDE = 0.06  # budget around which candidates are tried where none is given


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
        seed: of everything random; the same seed gives the same plan and the same tensors (not where time is measured).
        include, exclude: shell patterns over site names; a site must match one of `include`, where given.
        min_tokens: sites with fewer tokens stay exact.
        fixed: settings by shell pattern over site names, taken as they are instead of a search.
        refine: take more time to learn what is learned of the chosen layers (see refine).
        journal: keeps what was measured, so that a calibration that was cut off goes on where it was.

    Raises:
        SbpatchError: no attention found, nothing left to patch, or a budget that cannot be met.
    """
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
    sites = find_sites(model, batch.samples(batches[0], 0, 1))
    check_patterns([s.name for s in sites], {"--include": include, "--exclude": exclude, "the recipe's sites": fixed})
    plan = Plan(
        model=name, seed=seed, budget=Budget(requested=budget), sites=[], objective=objective, allocation=allocation,
        max_drop=max_drop,
    )  # fmt: skip
    plan.sites = [SitePlan.of(site, *first_decision(site, include, exclude, min_tokens)) for site in sites]
    if not plan.patched:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in plan.sites[:3])
        raise SbpatchError(f"nothing to patch among {len(plan.sites)} attention sites ({reasons})")
    answer = answer or _answer(model, batches[0], plan)

    first, screened = SCREENED[answer]
    screen = _first_samples(batches, screened)
    unseen = _first_samples(_after(batches, screened), CHECKED[answer])
    trial = Trial(model, plan, answer, journal or Journal(None, ""), progress)
    trial.profile(screen)
    around = WIDE if max_drop is not None else budget
    candidates = _candidates(plan, around, method, allocation, fixed, batch.device(batches[0]))
    tried = {site: len(layers) for site, layers in candidates.items()}
    if any(count > 1 for count in tried.values()):
        trial.measure(candidates, _first_samples(screen, first), "trying splits", timed=objective == "time")
        candidates = {site: promising(layers, objective) for site, layers in candidates.items()}
        trial.measure(candidates, _after(screen, first), "comparing the best", timed=objective == "time")
    choice = Choice(plan, candidates, tried, objective, simple=method == "auto" and objective == "memory")
    check = Check(model, answer, screen, unseen, progress)
    plans = choice.plans
    plan = pick(plans(budget), check) if max_drop is None else smallest_that_keeps(plans, max_drop, check)
    if not plan.patched:
        raise SbpatchError(
            f"nothing to patch: with {plan.budget.requested:g} of the entries every one of {len(plan.sites)} sites is best "
            "left exact; lower --budget, or allow a larger --max-drop"
        )
    plan = learn(model, plan, screen, answer, REFINED if refine else LEARNED, progress)
    check_plan(plan, check)
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


def _answer(model: nn.Module, inputs: Inputs, plan: Plan) -> Answer:
    """Class logits have two dimensions; of three, causal attention over token ids gives the next token's."""
    output = batch.run(model, batch.samples(inputs, 0, 1))
    if output.ndim == 2:
        return "classes"
    tokens = not isinstance(inputs, Tensor) and "input_ids" in inputs
    return "next-token" if tokens and any(site.causal for site in plan.sites) else "features"


def _first_samples(batches: Sequence[Inputs], count: int) -> list[Inputs]:
    """The first `count` samples, in batches as they came."""
    taken, out = 0, []
    for one in batches:
        if taken >= count:
            break
        out.append(batch.samples(one, 0, count - taken))
        taken += batch.count(out[-1])
    return out


def _after(batches: Sequence[Inputs], count: int) -> list[Inputs]:
    """What `_first_samples` of `count` leaves over."""
    out = []
    for one in batches:
        size = batch.count(one)
        if size > count:
            out.append(batch.samples(one, count, size))
        count = max(count - size, 0)
    return out


def _candidates(
    plan: Plan,
    budget: float,
    method: str,
    allocation: Allocation,
    fixed: Mapping[str, SiteSetting],
    device: torch.device,
) -> dict[str, list[Candidate]]:
    found: dict[str, list[Candidate]] = {}
    heads = sum(site.heads for site in plan.patched)
    for i, site in enumerate(plan.sites):
        if site.decision != "patch":
            continue
        seed = site_seed(plan.seed, i)
        setting = next((s for pattern, s in fixed.items() if fnmatch(site.name, pattern)), None)
        if setting is not None:
            found[site.name] = [
                Candidate(Scatterbrain(setting.method, site.geometry, seed, **setting.parameters).to(device))
            ]
        else:
            found[site.name] = candidates_for(
                site, seed, budget, method=method, allocation=allocation, heads=heads, device=device
            )
    return found


# -- measuring -------------------------------------------------------------------------------------------------------


class Trial:
    """Runs of the exact model in which something is measured at its sites; each batch's figures go to the journal."""

    def __init__(self, model: nn.Module, plan: Plan, answer: Answer, journal: Journal, progress: Progress[Any]) -> None:
        self.model, self.plan, self.answer, self.journal, self.progress = model, plan, answer, journal, progress

    def profile(self, batches: Sequence[Inputs]) -> None:
        """Fill in each supported site's entropy and the other figures of its heads."""
        supported = [site for site in self.plan.sites if site.decision != "unsupported"]
        totals: dict[str, dict[str, Tensor]] = {site.name: {} for site in supported}

        def observer(site: SitePlan) -> Callable[[Call], Tensor]:
            def observe(call: Call) -> Tensor:
                call = call.plain(site.causal)
                for figure, values in head_profile(call).items():
                    total = values.double().sum(0).cpu()
                    totals[site.name][figure] = totals[site.name].get(figure, 0) + total
                return call.exact()

            return observe

        with swapped(self.model, {site.name: observer(site) for site in supported}):
            for one in self.progress(batches, "entropy"):
                batch.run(self.model, one)
        count = sum(batch.count(one) for one in batches)
        for site in supported:
            for figure, total in totals[site.name].items():
                setattr(site, figure, (total / count).tolist())
            assert site.entropy is not None
            site.entropy_ratio = sum(site.entropy) / site.heads / math.log(site.tokens)

    def measure(
        self, candidates: Mapping[str, list[Candidate]], batches: Sequence[Inputs], description: str, timed: bool
    ) -> None:
        """Run every candidate of every site on the inputs that the exact model gives that site."""
        names = list(candidates)
        causal = {site.name: site.causal for site in self.plan.sites}
        for number, one in enumerate(self.progress(batches, description)):
            key = f"{description} {number} " + " ".join(f"{name} {len(candidates[name])}" for name in names)
            if self.journal.recall(key, candidates):
                continue
            seed = self.plan.seed * 1000 + number
            gradients = answer_gradients(self.model, names, one, self.answer, seed)

            def observer(name: str, gradients: Mapping[str, Tensor] = gradients) -> Callable[[Call], Tensor]:
                def observe(call: Call) -> Tensor:
                    exact = call.exact()
                    plain = call.plain(causal[name])
                    for candidate in candidates[name]:
                        if timed and not candidate.ms:
                            plain.through(candidate.layer)
                        candidate.observe(plain, exact, gradients[name])
                    return exact

                return observe

            with swapped(self.model, {name: observer(name) for name in names}):
                batch.run(self.model, one)
            self.journal.record(key, candidates)


# -- choosing --------------------------------------------------------------------------------------------------------


class Choice:
    """Plans that share out a budget over what was measured."""

    def __init__(
        self,
        plan: Plan,
        candidates: dict[str, list[Candidate]],
        tried: Mapping[str, int],
        objective: Objective,
        simple: bool,
    ) -> None:
        self.plan, self.tried, self.objective = plan, tried, objective
        self.candidates = candidates
        self.sites = {site.name: (i, site) for i, site in enumerate(plan.sites) if site.name in candidates}
        self.heads = [(name, head) for name in candidates for head in range(self.sites[name][1].heads)]
        # Causal clusters cannot stand alone, so there is nothing simpler to hold them to.
        self.options = [
            worth_their_time(candidates[name], head) if simple and not self.sites[name][1].causal else candidates[name]
            for name, head in self.heads
        ]

    def _whole(self, name: str) -> float:
        """Cost of one exact head."""
        site = self.sites[name][1]
        if self.objective == "memory":
            return site.tokens * site.geometry.row_keys
        exact = [c for c in self.candidates[name] if isinstance(c.layer, Exact)]
        if not exact:
            raise SbpatchError("--objective time shares out the time of exact attention; it needs the joint allocation")
        return exact[0].cost("time")

    def plans(self, budget: float) -> list[Plan]:
        """The plan by damage, and the one by squared output error, which makes no assumption on how errors compound."""
        limit = budget * sum(self._whole(name) for name, _ in self.heads)
        found = []
        for measure in (lambda c, h: float(c.damages[h]), lambda c, h: float(c.errors[h]) ** 2):
            curves = [
                [(c.cost(self.objective), measure(c, head)) for c in options]
                for (_, head), options in zip(self.heads, self.options, strict=True)
            ]
            chosen = allocate(curves, limit)
            if chosen is None:
                least = sum(min(cost for cost, _ in curve) for curve in curves)
                raise SbpatchError(
                    f"budget {budget:g} cannot be met: the smallest patch of these {len(self.sites)} sites takes "
                    f"{least / limit * budget:.3g} of the exact {'time' if self.objective == 'time' else 'entries'}"
                )
            found.append(self._plan(budget, [options[j] for options, j in zip(self.options, chosen, strict=True)]))
        return found[:1] if found[0].sites == found[1].sites else found

    def _plan(self, budget: float, chosen: Sequence[Candidate]) -> Plan:
        plan = self.plan.model_copy(deep=True)
        plan.budget.requested = budget
        tensors: dict[str, Tensor] = {}
        by_site: dict[str, list[Candidate]] = {}
        for (name, _), candidate in zip(self.heads, chosen, strict=True):
            by_site.setdefault(name, []).append(candidate)
        for name, heads in by_site.items():
            i, _ = self.sites[name]
            site = plan.sites[i]
            layer = _layer_of(heads, site, site_seed(plan.seed, i))
            site.use(layer, site_seed(plan.seed, i))
            tensors |= {f"{name}.{key}": tensor.cpu().clone() for key, tensor in drawn_tensors(layer).items()}
            errors = sum(float(c.errors[h]) for h, c in enumerate(heads)) / len(heads)
            site.output_error = errors if any(c.seen for c in heads) else None
            site.reason = _why(site, heads, self.tried[name])
        plan.settle_budget()
        plan.tensors = tensors
        return plan


def _layer_of(heads: Sequence[Candidate], site: SitePlan, seed: int) -> Layer | PerHead:
    """One layer of the site from the choice of each head."""
    groups: dict[int, list[int]] = {}
    for head, candidate in enumerate(heads):
        groups.setdefault(id(candidate), []).append(head)
    if len(groups) == 1:
        return heads[0].learned()
    layers: list[Layer] = []
    for group in groups.values():
        layer, geometry = heads[group[0]].learned(), replace(site.geometry, heads=len(group))
        if isinstance(layer, Scatterbrain):
            part = Scatterbrain(layer.method, geometry, seed, **layer.parameters_used)
            if part.gain is not None and layer.gain is not None:
                part.gain.copy_(layer.gain[group])
            layers.append(part)
        else:
            layers.append(Exact(geometry))
    return PerHead(site.geometry, list(groups.values()), layers)


def _why(site: SitePlan, heads: Sequence[Candidate], tried: int) -> str:
    """One line for the report: what the entropy rule would have taken, and what the measurement took."""
    assert site.entropy_ratio is not None
    if tried == 1:
        return "one setting, taken as it is"
    if site.decision == "exact":
        return f"the best of {tried} layers tried: what it costs to stay exact buys more here than elsewhere"
    stored = sum(c.layer.stored for c in heads)
    share = 1 - sum(c.layer.nnz for c in heads) / stored
    took = heads[0].layer.method
    if site.per_head is not None:
        took = ", ".join(f"{group.method} for {len(group.heads)}" for group in site.per_head) + " heads"
    return (
        f"entropy {site.entropy_ratio:.2f} of ln n suggests {site.entropy_ratio:.0%} low-rank; of {tried} layers tried, "
        f"{took}, {share:.0%} low-rank, had the damage that paid best"
    )
