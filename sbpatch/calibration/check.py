"""The whole model with a plan: what its sites' errors come to together, and the search for a plan that keeps a promise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import processes
from ..attention.per_head import Layer, PerHead
from ..data import batch
from ..data.batch import Inputs
from ..errors import SbpatchError
from ..models.answers import MOST_NLL, embedding
from ..models.checkpoint import Answer
from ..plan.patch import patch, unpatch
from ..plan.plan import Plan, SitePlan
from ..progress import Progress
from ..sites.calls import Call
from ..sites.fidelity import matrix_error, output_error
from ..sites.observe import Watcher, check_finite, observed

ROWS = 256  # of logits over a vocabulary that are compared at once
KEPT = 1 << 20  # numbers in the exact model's answer to a batch, up to which it is kept
MATRIX_SAMPLES = 4  # for the matrix error, which costs as much as exact attention in eager mode
BUDGETS = [0.75 * 2 ** (-i / 2) for i in range(20)]  # what --max-drop chooses from, down to a thousandth


@dataclass
class Check:
    """A model and the samples that plans are tried on: those that candidates were measured on, and others."""

    model: nn.Module
    answer: Answer
    screen: list[Inputs]
    unseen: list[Inputs]
    progress: Progress[Any]
    _answers: dict[int, Tensor] = field(default_factory=dict)  # of the exact model

    def figures(self, plans: Sequence[Plan], batches: Sequence[Inputs], description: str) -> list[dict[str, float]]:
        """Each plan against the exact model, which runs once a batch: `agreement` in percent or `cosine`, `divergence`
        (Kullback-Leibler in nats, or 1 - cosine), `perplexity_ratio` of a text, and `drop` (see `Totals.figures`).
        """
        found = []  # by batch and plan
        for one in self.progress(processes.share(batches), description):
            exact = self.exact(one)
            found.append([Totals.of(self.answer, self.patched(plan, one), exact, one) for plan in plans])
        whole = shared([[asdict(total) for total in totals] for totals in found])
        return [Totals.together(self.answer, [totals[i] for totals in whole]).figures() for i in range(len(plans))]

    def exact(self, one: Inputs) -> Tensor:
        """The exact model's answer to one of the batches, kept where it is small: a text's logits are not."""
        known = self._answers.get(id(one))  # the batches live as long as this does
        if known is not None:
            return known
        found = batch.run(self.model, one)
        check_finite(found, "the model", "its answer")
        if found.numel() <= KEPT:
            self._answers[id(one)] = found
        return found

    def patched(self, plan: Plan, one: Inputs) -> Tensor:
        """The model's answer under a plan."""
        patch(self.model, plan)
        try:
            found = batch.run(self.model, one)
        finally:
            unpatch(self.model)
        check_finite(found, "the patched model", "its answer")
        return found


@dataclass
class Totals:
    """Sums over the answers that are compared: samples, or positions of a text. What has fractions is kept in parts, so that
    the sum does not depend on which process ran a batch.
    """

    answer: Answer
    count: int = 0
    agree: int = 0
    divergence: list[float] = field(default_factory=list)
    nll: list[list[float]] = field(default_factory=lambda: [[], []])  # patched, exact; of the tokens that follow
    margins: list[float] = field(default_factory=list)  # exact logits: highest - second
    shifts: list[float] = field(default_factory=list)  # how much the patch changes that difference

    @classmethod
    def of(cls, answer: Answer, found: Tensor, exact: Tensor, inputs: Inputs) -> Totals:
        """Of one batch."""
        totals = cls(answer)
        totals.add(found, exact, inputs)
        return totals

    @classmethod
    def together(cls, answer: Answer, parts: Sequence[Mapping[str, Any]]) -> Totals:
        """Of many batches, each as `asdict` gives it, in their order."""
        totals = cls(answer)
        for part in parts:
            totals.count += part["count"]
            totals.agree += part["agree"]
            totals.divergence += part["divergence"]
            totals.nll = [mine + more for mine, more in zip(totals.nll, part["nll"], strict=True)]
            totals.margins += part["margins"]
            totals.shifts += part["shifts"]
        return totals

    def add(self, found: Tensor, exact: Tensor, inputs: Inputs) -> None:
        if self.answer == "features":
            cosine = (embedding(found, inputs) * embedding(exact, inputs)).sum(-1)
            self.count += len(cosine)
            self.divergence.append(float((1 - cosine).sum()))
            return
        labels = None
        if self.answer != "classes":
            assert not isinstance(inputs, Tensor)
            ids, real = inputs["input_ids"], inputs.get("attention_mask")
            if self.answer == "next-token":
                found, exact, labels = found[:, :-1], exact[:, :-1], ids[:, 1:].flatten()
                real = None if real is None else real[:, 1:] * real[:, :-1]
            keep = torch.ones(found.shape[:2], dtype=torch.bool) if real is None else real.bool().cpu()
            index = keep.flatten().nonzero()[:, 0].to(found.device)
            found, exact = found.flatten(0, 1)[index], exact.flatten(0, 1)[index]
            labels = None if labels is None else labels[index]
        for i, (f, e) in enumerate(zip(found.split(ROWS), exact.split(ROWS), strict=True)):
            self._add_rows(f.float(), e.float(), None if labels is None else labels.split(ROWS)[i])

    def _add_rows(self, found: Tensor, exact: Tensor, labels: Tensor | None) -> None:
        log_q, log_p = found.log_softmax(-1), exact.log_softmax(-1)
        self.count += len(found)
        self.agree += int((found.argmax(-1) == exact.argmax(-1)).sum())
        self.divergence.append(float(F.kl_div(log_q, log_p, log_target=True, reduction="sum")))
        if labels is not None:
            for parts, x in zip(self.nll, (log_q, log_p), strict=True):
                parts.append(float(F.nll_loss(x, labels, reduction="sum")))
        if self.answer == "classes" and exact.shape[-1] > 1:
            (high, second), top = exact.topk(2).values.unbind(-1), exact.topk(2).indices
            now, then = found.gather(-1, top).unbind(-1)
            self.margins += (high - second).tolist()
            self.shifts += (now - then - (high - second)).tolist()

    def figures(self) -> dict[str, float]:
        """Means, and `drop`: percent of perplexity, points of cosine x 100, or points of agreement.

        A top-1 changes where the patch shifts the margin between the two highest logits by more than the margin. Where few
        samples were run, none may, so the share that will is also estimated with normal shifts of the size that was
        seen, P(shift < -margin), and the larger of the two is the drop.
        """
        mean = sum(self.divergence) / max(self.count, 1)
        if self.answer == "features":
            return {"cosine": 1 - mean, "divergence": mean, "drop": 100 * mean}
        agreement = 100 * self.agree / max(self.count, 1)
        figures = {"agreement": agreement, "divergence": mean, "drop": 100 - agreement}
        if self.answer == "next-token":
            ratio = math.exp(min((sum(self.nll[0]) - sum(self.nll[1])) / max(self.count, 1), MOST_NLL))
            figures |= {"perplexity_ratio": ratio, "drop": 100 * (ratio - 1)}
        elif self.margins:
            margin, shift = (torch.tensor(x, dtype=torch.float64) for x in (self.margins, self.shifts))
            spread = shift.square().mean().sqrt().clamp(min=1e-30)
            figures["drop"] = max(100 - agreement, 100 * float(torch.special.ndtr(-margin / spread).mean()))
        return figures


def pick(plans: Sequence[Plan], check: Check) -> Plan:
    """The plan under which the whole model's answer diverges least, on the samples that made the plans."""
    if len(plans) == 1:
        return plans[0]
    found = [figures["divergence"] for figures in check.figures(plans, check.screen, "comparing plans")]
    return plans[found.index(min(found))]


def smallest_that_keeps(
    plans: Callable[[float], list[Plan]], fits: Callable[[float], bool], max_drop: float, check: Check
) -> Plan:
    """The plan of the smallest budget whose drop stays within `max_drop`, searched on half of the samples.

    The other half then has to confirm it, or the next larger budget is taken: the smallest of many that pass on some
    samples passes partly by luck.

    Raises:
        SbpatchError: not even the largest budget keeps it.
    """
    samples = check.unseen or check.screen
    search, confirm = samples[::2], samples[1::2] or samples
    best: dict[int, Plan] = {}

    def keeps(level: int, batches: Sequence[Inputs]) -> bool:
        if not fits(BUDGETS[level]):  # too little for the smallest patch
            return False
        if level not in best:
            best[level] = plans(BUDGETS[level])[0]
        (figures,) = check.figures([best[level]], batches, f"budget {BUDGETS[level]:.4f}")
        return figures["drop"] <= max_drop

    low, high = 0, len(BUDGETS)  # the level sought is in [low, high): below it all keep, from it on none does
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if keeps(middle, search) else (low, middle)
    for level in range(low - 1, -1, -1):
        if keeps(level, confirm):
            return best[level]
    raise SbpatchError(
        f"no plan keeps a drop of at most {max_drop:g}: even with {BUDGETS[0]:g} of the entries it is larger; raise --max-drop "
        "or exclude the sites that suffer"
    )


def shared(found: list[Any]) -> list[Any]:
    """What each process found on its batches, of all batches in their order."""
    return processes.in_order(processes.gathered(found))


class SiteErrors:
    """Errors of a site's patch in one batch: sums over samples, by head, of the output's, and single ones of the matrix."""

    def __init__(self, wanted: int) -> None:
        """`wanted`: of the matrix errors, which cost as much as exact attention in eager mode."""
        self.wanted, self.errors, self.matrix = max(wanted, 0), [0.0], list[float]()

    def watcher(self, name: str, layer: Layer | PerHead) -> Watcher:
        def watch(call: Call, output: Tensor) -> None:
            error = output_error(call.through(layer), output, call.query_mask)
            check_finite(error, f"site '{name}'", "the error of its patch")
            self.errors = (torch.tensor(self.errors, dtype=torch.float64) + error.double().sum(0).cpu()).tolist()
            more = min(len(output), self.wanted)
            self.wanted -= more
            for b in range(more):
                q, k, v = (x[b : b + 1] for x in (call.query, call.key, call.value))
                mask = None if call.key_mask is None else call.key_mask[b : b + 1]
                one = Call(q, k, v, is_causal=call.is_causal, scale=call.scale, key_mask=mask)
                self.matrix += matrix_error(layer, one).flatten().tolist()

        return watch


def checked(plan: Plan, check: Check) -> Plan:
    """The plan with the errors of each patched site and the figures of the whole model, on unseen samples if there are any."""
    samples = check.unseen or check.screen
    layers = {name: layer.to(batch.device(samples[0])) for name, layer in plan.layers().items()}
    causal = {site.name: site.causal for site in plan.patched}
    wanted = 1 if check.answer in ("next-token", "tokens") else MATRIX_SAMPLES
    found = []  # by batch
    before = itertools.accumulate((batch.count(one) for one in samples), initial=0)
    numbered = list(zip(samples, before, strict=False))
    for one, first in check.progress(processes.share(numbered), "checking the plan"):
        seen = {name: SiteErrors(wanted - first) for name in layers}
        watchers = {name: seen[name].watcher(name, layers[name]) for name in layers}
        exact = observed(check.model, one, watchers, causal)
        whole = Totals.of(check.answer, check.patched(plan, one), exact, one)
        found.append([{name: (x.errors, x.matrix) for name, x in seen.items()}, asdict(whole)])
    batches = shared(found)
    count = sum(batch.count(one) for one in samples)
    by_site = [errors for errors, _ in batches]
    sites = [_with_errors(site, by_site, count) if site.name in layers else site for site in plan.sites]
    figures = Totals.together(check.answer, [totals for _, totals in batches]).figures()
    of_model = {"samples": count, "unseen": float(bool(check.unseen)), **figures}
    return plan.model_copy(update={"sites": sites, "check": of_model})


def _with_errors(site: SitePlan, batches: Sequence[Mapping[str, Any]], count: int) -> SitePlan:
    """The site with the means of its errors: by batch, for each site, of its outputs' sums and single ones of its matrices."""
    errors = torch.zeros(site.heads, dtype=torch.float64)
    for found in batches:
        errors += torch.tensor(found[site.name][0], dtype=torch.float64)
    matrix = [x for found in batches for x in found[site.name][1]]
    groups = site.per_head and [
        group.model_copy(update={"output_error": float(errors[group.heads].mean()) / count}) for group in site.per_head
    ]
    means = {"output_error": float(errors.mean()) / count, "matrix_error": float(torch.tensor(matrix).mean())}
    return site.model_copy(update={**means, "per_head": groups})
