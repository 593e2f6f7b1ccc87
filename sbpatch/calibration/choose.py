"""One choice a head from what was measured: candidates -> plans, each within one budget for the whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..attention import Scatterbrain
from ..attention.per_head import Exact, Layer, PerHead
from ..errors import SbpatchError
from ..plan.plan import Plan, SitePlan, patch_tensors
from ..plan.recipe import Objective
from .allocate import SLACK, allocate
from .candidates import Candidate, closer, site_seed
from .costs import CostTable
from .weigh import without_weak_pairs


class Choice:
    """Plans that share out a budget over what was measured: one candidate a unit, a head or the heads that share keys."""

    def __init__(
        self,
        plan: Plan,
        candidates: dict[str, list[Candidate]],
        tried: Mapping[str, int],
        objective: Objective,
        simple: bool,
        costs: CostTable | None,
    ) -> None:
        self.plan, self.tried, self.objective, self.costs = plan, tried, objective, costs
        self.candidates = candidates
        self.sites = {site.name: (i, site) for i, site in enumerate(plan.sites) if site.name in candidates}
        self.units = [
            (name, range(first, first + self.sites[name][1].geometry.group))
            for name in candidates
            for first in range(0, self.sites[name][1].heads, self.sites[name][1].geometry.group)
        ]
        self.options = [
            without_weak_pairs(candidates[name], heads) if simple else candidates[name] for name, heads in self.units
        ]

    def _exact(self) -> float:
        """Cost of exact attention at all sites."""
        return sum(len(heads) * self._whole(name) for name, heads in self.units)

    def _whole(self, name: str) -> float:
        """Cost of one exact head."""
        site = self.sites[name][1]
        if self.objective == "memory":
            return site.geometry.rows * site.geometry.row_keys
        exact = [c for c in self.candidates[name] if isinstance(c.layer, Exact)]
        if not exact:
            raise SbpatchError("--objective time shares out the time of exact attention; it needs the joint allocation")
        return exact[0].cost("time")

    def fits(self, budget: float) -> bool:
        """Whether the budget is enough for the smallest patch of every site."""
        least = sum(
            len(heads) * min(c.cost(self.objective) for c in options)
            for (_, heads), options in zip(self.units, self.options, strict=True)
        )
        return least <= budget * self._exact() * (1 + SLACK)

    def plans(self, budget: float) -> list[Plan]:
        """The plan by damage, and the one by squared output error, which makes no assumption on how errors compound.

        Raises:
            SbpatchError: the budget is too small for the smallest patch of every site.
        """
        found = [self._plan(budget, chosen) for chosen in self._chosen(budget)]
        return found[:1] if found[0].sites == found[1].sites else found

    def closer(
        self, budget: float, moments: Mapping[str, tuple[Tensor, Tensor]], device: torch.device
    ) -> dict[str, list[Candidate]]:
        """Candidates near those that the budget allows, by site, without those that were measured already."""
        found: dict[str, list[Candidate]] = {}
        both = self._chosen(budget)
        for name, measured in self.candidates.items():
            i, site = self.sites[name]
            known = {c.name for c in measured}
            around = {
                new.name: new
                for chosen in both
                for (owner, _), one in zip(self.units, chosen, strict=True)
                if owner == name
                for new in closer(one, site, site_seed(self.plan.seed, i), moments.get(name), device, self.costs)
            }
            fixed = self.tried[name] == 1  # a recipe's setting, taken as it is
            found[name] = [] if fixed else [new for key, new in around.items() if key not in known]
        return found

    def _chosen(self, budget: float) -> list[list[Candidate]]:
        """One candidate a unit: by damage, and by squared output error."""
        limit = budget * self._exact()
        found = []
        for measure in (lambda c: c.damages, lambda c: c.errors.square()):
            curves = [
                [
                    (len(heads) * c.cost(self.objective), float(measure(c)[heads.start : heads.stop].sum()))
                    for c in options
                ]
                for (_, heads), options in zip(self.units, self.options, strict=True)
            ]
            chosen = allocate(curves, limit)
            if chosen is None:
                least = sum(min(cost for cost, _ in curve) for curve in curves)
                raise SbpatchError(
                    f"budget {budget:g} cannot be met: the smallest patch of these {len(self.sites)} sites takes "
                    f"{least / limit * budget:.3g} of the exact {'time' if self.objective == 'time' else 'entries'}"
                )
            found.append([options[j] for options, j in zip(self.options, chosen, strict=True)])
        return found

    def _plan(self, budget: float, chosen: Sequence[Candidate]) -> Plan:
        plan = self.plan.model_copy(deep=True)
        plan.budget.requested = budget
        tensors: dict[str, Tensor] = {}
        by_site: dict[str, list[Candidate]] = {}
        for (name, unit), candidate in zip(self.units, chosen, strict=True):
            by_site.setdefault(name, []).extend([candidate] * len(unit))
        for name, heads in by_site.items():
            i, _ = self.sites[name]
            site = plan.sites[i]
            layer = layer_of_heads(heads, site, site_seed(plan.seed, i))
            site.use(layer, site_seed(plan.seed, i))
            tensors |= {f"{name}.{key}": tensor.cpu().clone() for key, tensor in patch_tensors(layer).items()}
            errors = sum(float(c.errors[h]) for h, c in enumerate(heads)) / len(heads)
            site.output_error = errors if any(c.seen for c in heads) else None
            if self.costs is not None:
                site.exact_ms = self.costs.exact_ms(site.geometry)
                site.patched_ms = sum((c.ms or 0.0) / site.heads for c in heads)
            site.reason = _why(site, heads, self.tried[name])
        plan.settle_budget()
        plan.tensors = tensors
        return plan


def layer_of_heads(heads: Sequence[Candidate], site: SitePlan, seed: int) -> Layer | PerHead:
    """One layer of the site from the choice of each head."""
    groups: dict[int, list[int]] = {}
    for head, candidate in enumerate(heads):
        groups.setdefault(id(candidate), []).append(head)
    if len(groups) == 1:
        return heads[0].learned()
    layers: list[Layer] = []
    for group in groups.values():
        layer, geometry = heads[group[0]].learned(), site.geometry.of_heads(len(group))
        if isinstance(layer, Scatterbrain):
            part = Scatterbrain(layer.method, geometry, seed, **layer.parameters_used)
            measured = patch_tensors(layer)
            for name, mine in patch_tensors(part).items():  # one of each head, or one for all
                theirs, size = measured[name], site.geometry.group
                index = group if len(theirs) == site.heads else [head // size for head in group[::size]]
                mine.copy_(theirs if theirs.shape == mine.shape else theirs[index])
            layers.append(part)
        else:
            layers.append(Exact(geometry))
    return PerHead(site.geometry, list(groups.values()), layers)


def _why(site: SitePlan, heads: Sequence[Candidate], tried: int) -> str:
    """One line for the report: what the entropy rule would have taken, and what the measurement took."""
    assert site.entropy_ratio is not None
    if tried == 1:
        return "one setting, taken as it is" if site.decision == "patch" else "no method can work with so few entries"
    if site.decision == "exact":
        return f"the best of {tried} layers tried: its entries lower the damage more here than at other sites"
    stored = sum(c.layer.stored for c in heads)
    share = 1 - sum(c.layer.nnz for c in heads) / stored
    took = heads[0].layer.method
    if site.per_head is not None:
        heads_by = Counter({group.method: 0 for group in site.per_head})
        for group in site.per_head:
            heads_by[group.method] += len(group.heads)
        took = ", ".join(f"{method} for {count}" for method, count in heads_by.items()) + " heads"
    return (
        f"entropy {site.entropy_ratio:.2f} of ln n suggests {site.entropy_ratio:.0%} low-rank; of {tried} layers tried, "
        f"{took}, {share:.0%} low-rank, lowers the damage most for what it stores"
    )
