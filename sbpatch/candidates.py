"""The layers that calibration tries at a site, and what it measured of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .attention import PARTS, Scatterbrain, parse_method
from .attention.clusters import Clusters
from .attention.per_head import Exact, Layer
from .attention.registry import NAIVE
from .calls import Call
from .errors import SbpatchError
from .fidelity import output_error
from .measure import elapsed_ms
from .plan import SitePlan
from .sensitivity import damages

Objective = Literal["memory", "time"]
Allocation = Literal["joint", "measured", "entropy", "uniform"]
FINE, COARSE = 2 ** (1 / 3), 2**0.5  # steps between the budgets tried at a head
FEW_HEADS = 16  # of all sites together, up to which the steps are fine
LOWEST, HIGHEST = 1 / 8, 16.0  # budgets tried, in multiples of the one asked for; from 1 / 4 on where steps are fine
LARGEST = 0.75  # share of a row above which only exact attention is tried
CLOSER = tuple(2 ** (step / 6) for step in (-2, -1, 0, 1, 2))  # times what a choice stores: a second look, round it
OTHERWISE = (-0.15, 0.0, 0.15)  # added to the low-rank share of such a choice
SHARES = (0.5,)  # of a budget for the low-rank part, beside 0, 1 and the entropy's
RETRIEVING = ("top-clusters",)
RETRIEVING_SHARES = (0.25, 0.5)  # where the sparse part finds the largest keys, few clusters are enough for the others
CAUSAL_SHARES = (0.3,)  # few clusters go far, and the window has to reach over a chunk of them
CAUSAL_LEAST = {"window": 0, "sinks": 4, "pages": 28}  # keys that a sparse part reads beside that window, at least
PEAKED = 0.8  # entropy / ln n below which a query's largest keys are looked for by content, not only by place
GAINS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, -0.5)  # of the low-rank part beside a sparse one, in nats


@dataclass
class Candidate:
    """A layer tried at a site, with sums per head over the samples it has seen, for each of `gains` of the low-rank part."""

    layer: Layer
    error_sum: Tensor = field(init=False)  # (gains, H) of output errors
    damage_sum: Tensor = field(init=False)  # (gains, H) see sensitivity
    together_sum: Tensor = field(init=False)  # (gains, H) the same where errors of different tokens add up
    coherence: float = 1.0  # how much larger that is, see `weigh.coherence`
    seen: int = 0
    ms: list[float] = field(default_factory=list)  # per sample and head, one a batch

    def __post_init__(self) -> None:
        shape = (len(self.gains), self.layer.site.heads)
        self.error_sum, self.damage_sum, self.together_sum = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))

    @property
    def name(self) -> str:
        """The same for the same method and parameters."""
        return f"{self.layer.method} {self.layer.parameters_used}"

    @property
    def gains(self) -> tuple[float, ...]:
        return GAINS if isinstance(self.layer, Scatterbrain) and self.layer.gain is not None else (0.0,)

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
        if isinstance(self.layer, Scatterbrain) and self.layer.gain is not None:
            self.layer.gain.copy_(torch.tensor(self.gains)[self.best[0]])
        return self.layer

    @property
    def joined(self) -> bool:
        return "+" in self.layer.method

    def entries(self) -> float:
        """Entries that one head stores for one sample."""
        return self.layer.stored * self.layer.site.tokens

    def cost(self, objective: Objective) -> float:
        """What one head costs for one sample: entries stored, or milliseconds (the median batch)."""
        return sorted(self.ms)[len(self.ms) // 2] if objective == "time" else self.entries()

    def observe(self, call: Call, exact: Tensor, gradient: Tensor) -> None:
        """Run the layer on a plain call and add up how far it is from `exact` (B, H, n, d)."""

        def work() -> list[Tensor]:
            if not isinstance(self.layer, Scatterbrain) or self.layer.gain is None:
                return [call.through(self.layer)]
            sums = self.layer.split(call.query, call.key, call.value, call.key_mask, call.softmax_scale)
            return [self.layer.merged(*sums, torch.full_like(self.layer.gain, gain)) for gain in self.gains]

        found, ms = elapsed_ms(work, call.query.device)
        self.ms.append(ms / exact.shape[0] / exact.shape[1])
        for i, output in enumerate(found):
            output = output.to(exact.dtype)
            self.error_sum[i] += output_error(output, exact, call.key_mask).sum(0).double().cpu()
            apart, together = (x.sum(0).double().cpu() for x in damages(output, exact, gradient))
            self.damage_sum[i] += apart
            self.together_sum[i] += together
        self.seen += len(exact)


def site_seed(seed: int, index: int) -> int:
    return seed * 10_007 + 2 * index


def auto_methods(site: SitePlan) -> list[str]:
    """Methods that `auto` tries, with the parts of the joined ones alone."""
    if site.causal:
        return ["sinks+clusters", "pages+clusters"]
    methods = ["window2d+clusters" if site.grid is not None else "window+clusters", "lsh+clusters", "coreset"]
    assert site.entropy_ratio is not None
    return methods + (["top-clusters+clusters"] if site.entropy_ratio < PEAKED else [])


def built(
    method: str, site: SitePlan, seed: int, moments: tuple[Tensor, Tensor] | None, **parameters: int
) -> Scatterbrain:
    """The layer; where its low-rank part is fitted to data, by the second moments of the site's queries and keys."""
    layer = Scatterbrain(method, site.geometry, seed, **parameters)
    if moments is not None and hasattr(layer.low_rank, "fit"):
        layer.parameters_used |= layer.low_rank.fit(*moments)
    return layer


def candidates_for(
    site: SitePlan,
    seed: int,
    budget: float,
    *,
    moments: tuple[Tensor, Tensor] | None,
    method: str,
    allocation: Allocation,
    heads: int,
    device: torch.device,
) -> list[Candidate]:
    """Layers to try at a site: methods x splits x budgets, simplest first, exact attention last.

    Args:
        seed: of what the layers draw.
        budget: shares of a row's keys are tried around this one, and only this one unless the allocation is joint.
        moments: see `fidelity.second_moments`, means over the samples; None at a causal site.
        method: `auto`, or one method, of which the parts alone are tried too where the allocation is joint.
        heads: of all sites together; many heads are tried in coarser steps.
    """
    assert site.entropy_ratio is not None
    joint = allocation == "joint"
    methods = auto_methods(site) if method == "auto" else [method]
    if allocation in ("entropy", "uniform"):
        methods = methods[:1]
    tried: dict[str, Candidate] = {}  # by `Candidate.name`
    for level, share_of_row in enumerate(_budgets(budget, heads) if joint else [budget]):
        for joined in methods:
            sparse, low_rank = parse_method(joined)
            prefix = NAIVE if joined.startswith(NAIVE) else ""
            for share in _shares(sparse, low_rank, site, allocation, alone=joint or method == "auto"):
                joined_by_place = 0 < share < 1 and sparse not in RETRIEVING
                slow = sparse == "pages" if site.causal else joined_by_place and heads <= FEW_HEADS
                if slow and level % 2:
                    continue  # in coarser steps: they are many
                stored = share_of_row * site.geometry.row_keys
                layer = _layer(prefix, sparse, low_rank, stored, share, site, seed, moments)
                if layer is not None and layer.stored < site.geometry.row_keys:
                    candidate = Candidate(layer.to(device))
                    tried.setdefault(candidate.name, candidate)
                    if allocation in ("entropy", "uniform"):
                        break  # what follows is for where the rule's split leaves a part too little to work with
    if joint and not method.startswith(NAIVE):
        tried["exact"] = Candidate(Exact(site.geometry))
    if not tried:
        raise SbpatchError(
            f"budget {budget:g} leaves site '{site.name}' ({site.tokens} tokens) less than {method} can work "
            "with: raise --budget or exclude the site"
        )
    return list(tried.values())


def closer(
    chosen: Candidate, site: SitePlan, seed: int, moments: tuple[Tensor, Tensor] | None, device: torch.device
) -> list[Candidate]:
    """The method of a choice with a little less and a little more, and split otherwise: what lies between the first ones."""
    if not isinstance(chosen.layer, Scatterbrain):
        return []
    method, stored = chosen.layer.method, chosen.layer.stored
    sparse, low_rank = parse_method(method)
    share = 1 - chosen.layer.nnz / stored
    shares = [share + more for more in OTHERWISE if 0 < share + more < 1] if sparse and low_rank else [share]
    prefix = NAIVE if method.startswith(NAIVE) else ""
    layers = [
        _layer(prefix, sparse, low_rank, stored * factor, part, site, seed, moments)
        for factor in CLOSER
        for part in shares
    ]
    return [Candidate(x.to(device)) for x in layers if x is not None and x.stored < site.geometry.row_keys]


def _budgets(budget: float, heads: int) -> list[float]:
    step, lowest = (FINE, 2 * LOWEST) if heads <= FEW_HEADS else (COARSE, LOWEST)
    count = round(math.log(HIGHEST / lowest, step))
    levels = (budget * lowest * step**i for i in range(count + 1))
    return [level for level in levels if level <= LARGEST] or [budget]


def _shares(
    sparse: str | None, low_rank: str | None, site: SitePlan, allocation: Allocation, alone: bool
) -> Sequence[float]:
    """Splits to try: the low-rank part's share of what is stored."""
    if not (sparse and low_rank):
        return [1.0 if low_rank else 0.0]
    assert site.entropy_ratio is not None
    if allocation == "uniform":
        return [0.5, 1.0, 0.0]
    if allocation == "entropy":
        return [site.entropy_ratio, 1.0, 0.0]
    shares = RETRIEVING_SHARES if sparse in RETRIEVING else SHARES
    grid = CAUSAL_SHARES if site.causal else (site.entropy_ratio, *shares)
    return [1.0, 0.0, *grid] if alone else grid


def _layer(
    prefix: str,
    sparse: str | None,
    low_rank: str | None,
    stored: float,
    share: float,
    site: SitePlan,
    seed: int,
    moments: tuple[Tensor, Tensor] | None,
) -> Scatterbrain | None:
    """The method sized so that the low-rank part gets `share` of the stored entries; None where a part gets too few."""
    names: list[str] = []
    parameters: dict[str, int] = {}
    if site.causal and low_rank == "clusters" and sparse in CAUSAL_LEAST and 0 < share < 1:
        share = min(share, 1 - (Clusters.CAUSAL_CHUNK + CAUSAL_LEAST[sparse]) / stored)
    for name, part in ((sparse, stored * (1 - share)), (low_rank, stored * share)):
        if name is None or part == 0:
            continue
        sized = PARTS[name].sized(part, site.geometry)
        if sized is None:
            return None
        names.append(name)
        parameters |= sized
    if not names:
        return None
    if site.causal and names[-1] == "clusters" and parameters.get("window", 0) < Clusters.CAUSAL_CHUNK:
        return None  # causal clusters need the window to cover their chunk
    method = "+".join(names)
    return built(prefix + method if len(names) == 2 else method, site, seed, moments, **parameters)
