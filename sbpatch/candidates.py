"""The layers that calibration tries at a site, and the choice of one for each under the budget of the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import PARTS, Scatterbrain, parse_method
from .attention.registry import NAIVE
from .errors import SbpatchError
from .fidelity import output_error
from .plan import Plan, SitePlan
from .sites import Call

LEVELS = tuple(2 ** (i / 3) for i in range(-5, 13))  # site budgets tried, from a third to 16 times the budget
SHARES = (0.25, 0.5, 0.75)  # of a site's budget for the low-rank part, beside 0, 1 and the entropy's
PROMISING = 1.25  # times the lowest error at no higher cost: what the first look must not exceed
SIMPLER = 0.6  # of the error of a method of one part, at no higher cost: what a joined one must get below


@dataclass
class Candidate:
    """A layer tried at a site, with the mean of its output errors over what it has seen."""

    layer: Scatterbrain
    error_sum: float = 0.0
    seen: int = 0

    @property
    def error(self) -> float:
        return self.error_sum / max(self.seen, 1)

    def cost(self, site: SitePlan) -> float:
        """Entries stored for one sample."""
        return self.layer.stored * site.tokens * site.heads

    def observe(self, call: Call, exact: Tensor) -> None:
        error = output_error(self.layer(call.query, call.key, call.value, scale=call.scale), exact)
        self.error_sum += float(error.sum())
        self.seen += error.numel()


def site_seed(seed: int, index: int) -> int:
    return seed * 10_007 + 2 * index


def candidates_for(
    site: SitePlan, plan: Plan, index: int, method: str, device: torch.device, uniform: bool = False
) -> list[Candidate]:
    """Layers to try at a site: methods x splits x budgets, simplest first, none that the whole budget could not pay for.

    `uniform`: every site at the budget itself, and joined methods joined, as a comparison of methods wants it.
    """
    assert site.entropy_ratio is not None
    if method == "auto":
        local = "window2d" if site.grid is not None else "window"
        methods = [f"{local}+clusters", "lsh+clusters"] if not site.causal else ["window+clusters"]
    else:
        methods = [method]
    whole = sum(s.entries for s in plan.patched)
    tried: dict[str, Candidate] = {}
    for level in (1.0,) if uniform else LEVELS:
        share_of_n = min(plan.budget.requested * level, 0.5)
        if share_of_n * site.entries > plan.budget.requested * whole * (1 + 1e-9):
            continue
        stored = share_of_n * site.tokens
        for joined in methods:
            sparse, low_rank = parse_method(joined)
            shares = [site.entropy_ratio, *SHARES] if uniform else [1.0, 0.0, site.entropy_ratio, *SHARES]
            if not (sparse and low_rank):
                shares = [1.0 if low_rank else 0.0]
            prefix = NAIVE if joined.startswith(NAIVE) else ""
            for share in shares:
                layer = _layer(prefix, sparse, low_rank, stored, share, site, site_seed(plan.seed, index))
                if layer is not None:
                    tried.setdefault(f"{layer.method} {layer.parameters_used}", Candidate(layer.to(device)))
    if not tried:
        raise SbpatchError(
            f"budget {plan.budget.requested:g} leaves site '{site.name}' ({site.tokens} tokens) less than {method} can work "
            "with: raise --budget or exclude the site"
        )
    return list(tried.values())


def promising(tried: list[Candidate], site: SitePlan) -> list[Candidate]:
    """Candidates whose error is near the lowest of all that cost no more."""
    best: float = math.inf
    kept = []
    for candidate in sorted(tried, key=lambda c: (c.cost(site), c.error)):
        best = min(best, candidate.error)
        if candidate.error <= PROMISING * best:
            kept.append(candidate)
    return kept


def worth_their_time(tried: list[Candidate], site: SitePlan) -> list[Candidate]:
    """Methods of one part, and the joined ones that are clearly better: two parts take more time than one of equal size."""
    alone = [c for c in tried if "+" not in c.layer.method]

    def limit(candidate: Candidate) -> float:
        affordable = (c.error for c in alone if c.cost(site) <= candidate.cost(site))
        return SIMPLER * min(affordable, default=math.inf)

    return alone + [c for c in tried if c not in alone and c.error < limit(c)]


def _layer(
    prefix: str, sparse: str | None, low_rank: str | None, stored: float, share: float, site: SitePlan, seed: int
) -> Scatterbrain | None:
    """The method sized so that the low-rank part gets `share` of the stored entries; None where a part gets too few."""
    names: list[str] = []
    parameters: dict[str, int] = {}
    for name, part in ((sparse, stored * (1 - share)), (low_rank, stored * share)):
        if name is None or part <= 0:
            continue
        sized = PARTS[name].sized(part, site.geometry)
        if sized is None:
            return None
        names.append(name)
        parameters |= sized
    if site.causal and low_rank in names and low_rank == "clusters" and parameters.get("window", 0) < 64:
        return None  # causal clusters need the window to cover their chunk
    if not names:
        return None
    method = "+".join(names)
    return Scatterbrain(prefix + method if len(names) == 2 else method, site.geometry, seed, **parameters)


def allocate(plan: Plan, candidates: dict[str, list[Candidate]]) -> dict[str, Candidate]:
    """One candidate a site, the summed squared output error small, the stored entries within the budget.

    Raises:
        SbpatchError: even the cheapest candidates together exceed the budget.
    """
    sites = {site.name: site for site in plan.patched}
    limit = plan.budget.requested * sum(site.entries for site in sites.values()) * (1 + 1e-9)
    chosen = {name: min(tried, key=lambda c: c.cost(sites[name])) for name, tried in candidates.items()}
    spent = sum(c.cost(sites[name]) for name, c in chosen.items())
    if spent > limit:
        raise SbpatchError(
            f"budget {plan.budget.requested:g} cannot be met: the smallest patch of these {len(sites)} sites stores "
            f"{spent / limit * plan.budget.requested:.3g} of the entries"
        )
    while True:
        best: tuple[float, str, Candidate] | None = None
        for name, current in chosen.items():
            for candidate in candidates[name]:
                more = candidate.cost(sites[name]) - current.cost(sites[name])
                gain = current.error**2 - candidate.error**2
                if gain <= 0 or spent + more > limit:
                    continue
                rate = gain / more if more > 0 else math.inf
                if best is None or rate > best[0] or (rate == best[0] == math.inf and candidate.error < best[2].error):
                    best = (rate, name, candidate)
        if best is None:
            break
        _, name, candidate = best
        spent += candidate.cost(sites[name]) - chosen[name].cost(sites[name])
        chosen[name] = candidate
    return chosen
