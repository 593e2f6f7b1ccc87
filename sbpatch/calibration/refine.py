"""Learn the few numbers of a patch that are learned, by matching each site's output; the model's weights stay as they are.

A head of a low-rank part may have two: `sharpness`, a factor of its logits, and beside a sparse part `gain`, of its weight.
Heads are independent, so all of them take a step at once and each keeps what lowered its damage (see sensitivity). Half of
the samples are for the search; a head whose damage is not lower on the other half keeps what it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import processes
from ..attention import Scatterbrain
from ..attention.per_head import Layer, PerHead
from ..data import batch
from ..data.batch import Inputs
from ..models.checkpoint import Answer
from ..plan.plan import Plan, patch_tensors
from ..progress import Progress
from ..sites.calls import Call
from ..sites.observe import Watcher, observed
from .sensitivity import answer_gradients, damage

LEARNED = (0.06, 0.03)  # steps of ln(sharpness) that every calibration takes; the gain's are GAIN times as long
REFINED = (0.06, 0.06, 0.03, 0.03, 0.015, 0.015, 0.0075, 0.0075)
GAIN = 6.0
GRADIENTS_KEPT = 2  # gradients a sample, see sensitivity
Factors = dict[str, Tensor]  # "sharpness" (as its logarithm) and "gain" of the heads of a site, (H,) each


def learn(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Inputs],
    answer: Answer,
    steps: Sequence[float],
    progress: Progress[Any],
) -> Plan:
    """The plan with the learned tensors that are better on samples they were not learned on.

    Gradients of the samples are held meanwhile: `GRADIENTS_KEPT` numbers for each number that the patched sites put out.
    Several processes share the samples, and what they find is added up in the samples' order.
    """
    layers = {name: layer.to(batch.device(batches[0])) for name, layer in plan.layers().items()}
    layers = {name: layer for name, layer in layers.items() if factors_of(layer)}
    singles = batch.singles(batches)
    if not layers or len(singles) < 2:
        return plan
    causal = {site.name: site.causal for site in plan.patched}
    search, confirm = range(0, len(singles), 2), range(1, len(singles), 2)
    seed = plan.seed * 1000 + 500
    gradients = {
        i: answer_gradients(model, list(layers), singles[i], answer, seed + i, at_most=GRADIENTS_KEPT)
        for which in (search, confirm)
        for i in processes.share(which)
    }

    def damages(which: Sequence[int], tried: Mapping[str, Sequence[Factors]]) -> dict[str, Tensor]:
        """Damage of each set of factors at each site: {name: (sets, H)}."""
        own: list[dict[str, list[list[float]]]] = []  # by sample

        def watcher(name: str, gradient: Tensor) -> Watcher:
            def watch(call: Call, output: Tensor) -> None:
                own[-1][name] = []
                for factors in tried[name]:
                    set_factors(layers[name], factors)
                    found = damage(call.through(layers[name]), output, gradient).sum(0).double()
                    own[-1][name].append(found.tolist())

            return watch

        for i in processes.share(which):
            own.append({})
            observed(model, singles[i], {name: watcher(name, gradients[i][name]) for name in tried}, causal)
        every = processes.in_order(processes.gathered(own))
        sums = {name: torch.zeros(len(sets), layers[name].site.heads).double() for name, sets in tried.items()}
        for name, total in sums.items():
            for one in every:
                total += torch.tensor(one[name], dtype=torch.float64)
        return {name: _shared(total, layers[name].site.group) for name, total in sums.items()}

    start = {name: factors_of(layer) for name, layer in layers.items()}
    factors = {name: dict(values) for name, values in start.items()}
    for step in progress(steps, "learning"):
        tried = {name: [values, *_moves(values, step)] for name, values in factors.items()}
        for name, found in damages(search, tried).items():
            best = found.argmin(0)  # (H,); the first, no move, where nothing is better
            best = torch.where(found.gather(0, best[None])[0] < found[0], best, 0)
            for factor in factors[name]:
                choices = torch.stack([values[factor] for values in tried[name]])
                factors[name][factor] = choices.gather(0, best.to(choices.device)[None])[0]
    learned: dict[str, Tensor] = {}
    for name, found in damages(confirm, {name: [start[name], factors[name]] for name in layers}).items():
        better = found[1] < found[0]
        kept = {k: torch.where(better.to(v.device), factors[name][k], v) for k, v in start[name].items()}
        set_factors(layers[name], kept)
        learned |= {f"{name}.{key}": tensor.cpu().clone() for key, tensor in patch_tensors(layers[name]).items()}
    return plan.model_copy(update={"tensors": {**plan.tensors, **learned}})


def _moves(values: Factors, step: float) -> Iterator[Factors]:
    """One factor of all heads up or down, the others as they are."""
    for factor in values:
        for sign in (1, -1):
            yield {**values, factor: values[factor] + sign * step * (GAIN if factor == "gain" else 1.0)}


def _parts(layer: Layer | PerHead) -> list[tuple[list[int], Scatterbrain]]:
    """The approximations of a layer, with the heads that each computes."""
    if isinstance(layer, PerHead):
        pairs = zip(layer.heads, layer.layers, strict=True)
        return [(heads, part) for heads, part in pairs if isinstance(part, Scatterbrain)]
    return [(list(range(layer.site.heads)), layer)] if isinstance(layer, Scatterbrain) else []


def _shared(sums: Tensor, group: int) -> Tensor:
    """Sums (sets, H) added up over the heads that share keys, and so their factors."""
    return sums.unflatten(1, (-1, group)).sum(-1).repeat_interleave(group, 1)


def factors_of(layer: Layer | PerHead) -> Factors:
    """What can be learned at a site, zeros for heads that have no such factor; empty where none has any."""
    factors: Factors = {}
    for heads, part in _parts(layer):
        for name, buffer in part.learned.items():
            values = factors.setdefault(name, torch.zeros(layer.site.heads, device=buffer.device))
            values[heads] = (buffer if name == "gain" else buffer.log()).repeat_interleave(len(heads) // len(buffer))
    return factors


def set_factors(layer: Layer | PerHead, factors: Factors) -> None:
    for heads, part in _parts(layer):
        for name, buffer in part.learned.items():
            values = factors[name][heads][:: len(heads) // len(buffer)]
            buffer.copy_(values if name == "gain" else values.exp())
