"""The layers that calibration tries at a site, and what it measured of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention import PARTS, Scatterbrain, pairwise, parse_method
from ..attention.per_head import Exact, Layer
from ..attention.registry import NAIVE, fits
from ..errors import SbpatchError
from ..plan.plan import SitePlan
from ..plan.recipe import Allocation, Objective
from ..sites.calls import Call
from ..sites.fidelity import output_error
from .costs import CostTable
from .sensitivity import damages

FINE, COARSE = 2 ** (1 / 3), 2**0.5  # steps between the budgets tried at a head
FEW_HEADS = 16  # of all sites together, up to which the steps are fine
LOWEST, HIGHEST = 1 / 8, 16.0  # budgets tried, in multiples of the one asked for; from 1 / 4 on where steps are fine
LARGEST = 0.75  # share of a row above which only exact attention is tried
# Times what a chosen layer stores: sizes that are tried next to it.
SIZES_AROUND = tuple(2 ** (step / 6) for step in (-2, -1, 0, 1, 2))
SHARES_AROUND = (-0.15, 0.0, 0.15)  # added to its low-rank share: splits that are tried next to it
GAINS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, -0.5)  # of the low-rank part beside a sparse one, in nats
Moments = tuple[Tensor, Tensor] | None  # of a site's queries and keys, see `fidelity.second_moments`


@dataclass
class Candidate:
    """A layer tried at a site, with sums per head over the samples it has seen, for each of `gains` of the low-rank part."""

    layer: Layer
    ms: float | None = None  # of one sample, all heads, by the cost table
    error_sum: Tensor = field(init=False)  # (gains, H) of output errors
    damage_sum: Tensor = field(init=False)  # (gains, H) see sensitivity
    together_sum: Tensor = field(init=False)  # (gains, H) the same where errors of different tokens add up
    coherence: float = 1.0  # how much larger that is, see `weigh.coherence`
    seen: int = 0

    def __post_init__(self) -> None:
        shape = (len(self.gains), self.layer.site.heads)
        self.error_sum, self.damage_sum, self.together_sum = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))

    @property
    def name(self) -> str:
        """The same for the same method and parameters."""
        return f"{self.layer.method} {self.layer.parameters_used}"

    @property
    def gains(self) -> tuple[float, ...]:
        """Gains that are measured apart: of two parts beside each other, whose sums are merged anew for each of them."""
        return GAINS if self.joined and isinstance(self.layer, Scatterbrain) and self.layer.gain is not None else (0.0,)

    @property
    def best(self) -> Tensor:
        """Index of each head's gain of least damage, (1, H)."""
        return self.damage_sum.argmin(0, keepdim=True)

    @property
    def errors(self) -> Tensor:
        """Mean output error of each head at its gain."""
        return self.at_best(self.error_sum) / max(self.seen, 1)

    @property
    def damages(self) -> Tensor:
        """Mean damage of each head at its gain."""
        return self.coherence * self.at_best(self.damage_sum) / max(self.seen, 1)

    def at_best(self, sums: Tensor) -> Tensor:
        """(gains, H) -> (H,), each head at its gain."""
        return sums.gather(0, self.best)[0]

    def learned(self) -> Layer:
        """The layer, with the gains that were best."""
        if len(self.gains) > 1 and isinstance(self.layer, Scatterbrain) and self.layer.gain is not None:
            self.layer.gain.copy_(torch.tensor(self.gains)[self.best[0]])
        return self.layer

    @property
    def joined(self) -> bool:
        return "+" in self.layer.method

    def entries(self) -> float:
        """Entries that one head stores for one sample."""
        return self.layer.stored * self.layer.site.rows

    def cost(self, objective: Objective) -> float:
        """What one head costs for one sample: entries stored, or milliseconds."""
        if objective == "memory":
            return self.entries()
        if self.ms is None:
            raise SbpatchError("--objective time needs the times of a cost table")
        return self.ms / self.layer.site.heads

    def measured(self, call: Call, exact: Tensor, gradient: Tensor) -> Tensor:
        """Run the layer on a plain call: (3, gains, H) sums over samples of how far it is from `exact` (B, H, n, d)."""
        found = []
        for output in self._outputs(call):
            output = output.to(exact.dtype)
            error = output_error(output, exact, call.query_mask)
            found.append(torch.stack([x.sum(0).double().cpu() for x in (error, *damages(output, exact, gradient))]))
        return torch.stack(found, 1)

    def add(self, sums: Tensor, samples: int) -> None:
        """Take in what was `measured` on so many samples."""
        self.error_sum += sums[0]
        self.damage_sum += sums[1]
        self.together_sum += sums[2]
        self.seen += samples

    def _outputs(self, call: Call) -> Iterator[Tensor]:
        if len(self.gains) == 1 or not isinstance(self.layer, Scatterbrain) or self.layer.gain is None:
            yield call.through(self.layer)
            return
        sums = self.layer.split(call.query, call.key, call.value, call.key_mask, call.softmax_scale)
        for gain in self.gains:
            yield pairwise.merged(*sums, torch.full_like(self.layer.gain, gain))


def site_seed(seed: int, index: int) -> int:
    return seed * 10_007 + 2 * index


def auto_methods(site: SitePlan) -> list[str]:
    """Methods that `auto` tries: what the parts themselves say of the site, joined ones first, windows among them first."""
    if site.entropy_ratio is None:
        raise SbpatchError(f"site '{site.name}' was not measured")
    found = (part.tried(site.geometry, site.entropy_ratio) for part in PARTS.values())
    fitting = {method for method in found if method and fits(method, site.geometry)}
    return sorted(fitting, key=lambda method: ("+" in method, method), reverse=True)


def built(method: str, site: SitePlan, seed: int, moments: Moments, **parameters: int) -> Scatterbrain:
    """The layer, fitted to the second moments of the site's queries and keys where there are any."""
    layer = Scatterbrain(method, site.geometry, seed, **parameters)
    if moments is not None:
        layer.fit(*moments)
    return layer


def candidates_for(
    site: SitePlan,
    seed: int,
    budget: float,
    *,
    moments: Moments,
    method: str,
    allocation: Allocation,
    heads: int,
    device: torch.device,
    costs: CostTable | None,
) -> tuple[list[Candidate], float]:
    """Layers to try at a site: methods x splits x budgets, simplest first, exact attention last.

    Args:
        seed: of what the layers draw.
        budget: shares of a row's keys are tried around this one, and only this one unless the allocation is joint.
        moments: see `fidelity.second_moments`, means over the samples; None at a causal site.
        method: `auto`, or one method, of which the parts alone are tried too where the allocation is joint.
        heads: of all sites together; many heads are tried in coarser steps.
        costs: where given, layers that are not faster than exact attention are left out.

    Returns:
        Exact attention among them where the allocation is joint, alone where no method can be so small; none where there
        are layers and all are slower than exact attention. And the milliseconds of the fastest one that was looked at.

    Raises:
        SbpatchError: the budget is less than any method can work with.
    """
    joint = allocation == "joint"
    methods = auto_methods(site) if method == "auto" else [method]
    if allocation in ("entropy", "uniform"):
        methods = methods[:1]
    tried: dict[str, Candidate] = {}  # by `Candidate.name`
    possible, fastest = False, math.inf
    too_slow: set[tuple[str, float]] = set()  # methods and splits whose larger layers need not be looked at
    for level, share_of_row in enumerate(_budgets(budget, heads) if joint else [budget]):
        for one in methods:
            stored = share_of_row * site.geometry.row_keys
            for share in _shares(one, site, allocation, alone=joint or method == "auto"):
                if (one, share) in too_slow or (level % 2 and _coarse(one, share, heads)):
                    continue
                layers = [
                    x for x in _layers(one, stored, share, site, seed, moments) if x.stored < site.geometry.row_keys
                ]
                possible |= bool(layers)
                for layer in layers:
                    candidate = Candidate(layer.to(device))
                    if candidate.name in tried:
                        continue
                    if costs is not None:
                        candidate.ms = costs.ms(layer)
                        fastest = min(fastest, candidate.ms)
                    if costs is None or costs.pays(layer):
                        tried[candidate.name] = candidate
                if costs is not None and layers and all(costs.too_slow(x) for x in layers):
                    too_slow.add((one, share))
                if layers and allocation in ("entropy", "uniform"):
                    break  # what follows is for where the rule's split leaves a part too little to work with
    if not possible and not (joint and not method.startswith(NAIVE)):
        raise SbpatchError(
            f"budget {budget:g} leaves site '{site.name}' ({site.tokens} tokens) less than {method} can work "
            "with: raise --budget or exclude the site"
        )
    if (tried or not possible) and joint and not method.startswith(NAIVE):
        exact = Exact(site.geometry)
        tried["exact"] = Candidate(exact, None if costs is None else costs.ms(exact))
    return list(tried.values()), fastest


def closer(
    chosen: Candidate, site: SitePlan, seed: int, moments: Moments, device: torch.device, costs: CostTable | None
) -> list[Candidate]:
    """A chosen layer's method at sizes and splits around it, between those of the first grid."""
    if not isinstance(chosen.layer, Scatterbrain):
        return []
    method, stored = chosen.layer.method, chosen.layer.stored
    share = 1 - chosen.layer.nnz / stored
    shares = [share + more for more in SHARES_AROUND if 0 < share + more < 1] if chosen.joined else [share]
    layers = [
        layer
        for factor in SIZES_AROUND
        for part in shares
        for layer in _layers(method, stored * factor, part, site, seed, moments)
        if layer.stored < site.geometry.row_keys and (costs is None or costs.pays(layer))
    ]
    return [Candidate(layer.to(device), None if costs is None else costs.ms(layer)) for layer in layers]


def _budgets(budget: float, heads: int) -> list[float]:
    step, lowest = (FINE, 2 * LOWEST) if heads <= FEW_HEADS else (COARSE, LOWEST)
    count = round(math.log(HIGHEST / lowest, step))
    levels = (budget * lowest * step**i for i in range(count + 1))
    return [level for level in levels if level <= LARGEST] or [budget]


def _coarse(method: str, share: float, heads: int) -> bool:
    """Whether a split of a method is tried at every other budget alone: those by place are many and rarely chosen."""
    sparse, _ = parse_method(method)
    return heads <= FEW_HEADS and 0 < share < 1 and sparse is not None and not PARTS[sparse].by_content


def _shares(method: str, site: SitePlan, allocation: Allocation, alone: bool) -> Sequence[float]:
    """Splits to try: the low-rank part's share of what is stored."""
    sparse, low_rank = parse_method(method)
    if not (sparse and low_rank):
        return [1.0 if low_rank else 0.0]
    ratio = site.entropy_ratio
    if ratio is None:
        raise SbpatchError(f"site '{site.name}' was not measured")
    if allocation == "uniform":
        return [0.5, 1.0, 0.0]
    if allocation == "entropy":
        return [ratio, 1.0, 0.0]
    # where the sparse part finds the largest keys, few points are enough for the others
    grid = (0.25, 0.5) if PARTS[sparse].by_content else (ratio, 0.5)
    return [1.0, 0.0, *grid] if alone else grid


def _layers(
    method: str, stored: float, share: float, site: SitePlan, seed: int, moments: Moments
) -> list[Scatterbrain]:
    """The method sized so that the low-rank part gets `share` of the stored entries; none where a part gets too few."""
    sparse, low_rank = parse_method(method)
    names: list[str] = []
    settings: list[dict[str, int]] = [{}]
    for name, part in ((sparse, stored * (1 - share)), (low_rank, stored * share)):
        if name is None or (part == 0 and sparse and low_rank):
            continue
        joined = PARTS[name].kind == "joined"
        sizes = PARTS[name].variants(stored if joined else part, site.geometry)
        settings = [before | size for before in settings for size in sizes]
        names.append(name)
    prefix = NAIVE if method.startswith(NAIVE) and len(names) == 2 else ""
    found = prefix + "+".join(names)
    return [built(found, site, seed, moments, **parameters) for parameters in settings]
