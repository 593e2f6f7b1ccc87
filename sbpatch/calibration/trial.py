"""Runs of the exact model in which something is measured at its sites: what each head is like, and what candidates do there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import processes
from ..data import batch
from ..data.batch import Inputs
from ..models.checkpoint import Answer
from ..plan.plan import Plan, SitePlan
from ..progress import Progress
from ..sites.calls import Call
from ..sites.fidelity import head_profile, second_moments
from ..sites.observe import Watcher, check_finite, in_plain_form, observed
from .candidates import Candidate
from .journal import Journal
from .sensitivity import with_gradients


class Trial:
    """Runs of the exact model in which something is measured at its sites; each batch's figures go to the journal.

    Several processes share the candidates of each site, and measure them on all samples.
    """

    def __init__(self, model: nn.Module, plan: Plan, answer: Answer, journal: Journal, progress: Progress[Any]) -> None:
        self.model, self.plan, self.answer, self.journal, self.progress = model, plan, answer, journal, progress

    def profile(self, batches: Sequence[Inputs]) -> tuple[Plan, dict[str, tuple[Tensor, Tensor]]]:
        """The plan with each supported site's entropy and the other figures of its heads.

        Beside it, second moments of the queries and keys of the sites that may be patched and are not causal, (H, d, d) each.
        """
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        supported = [site for site in self.plan.sites if site.decision != "unsupported" and not site.local]
        totals: dict[str, dict[str, Tensor]] = {site.name: {} for site in supported}

        def watcher(site: SitePlan) -> Watcher:
            def watch(call: Call, output: Tensor) -> None:
                for figure, values in head_profile(call).items():
                    check_finite(values, f"site '{site.name}'", figure.replace("_", " "))
                    total = values.double().sum(0).cpu()
                    totals[site.name][figure] = totals[site.name].get(figure, 0) + total
                if site.decision == "patch" and not site.causal:
                    seen = tuple(x.sum(0).cpu() / count for x in second_moments(call))
                    check_finite(torch.stack(seen), f"site '{site.name}'", "the second moment of its queries and keys")
                    before = moments.get(site.name, (0, 0))
                    moments[site.name] = (before[0] + seen[0], before[1] + seen[1])

            return watch

        count = sum(batch.count(one) for one in batches)
        watchers, causal = (
            {site.name: watcher(site) for site in supported},
            {site.name: site.causal for site in supported},
        )
        for one in self.progress(batches, "entropy"):
            observed(self.model, one, watchers, causal)
        figures = {
            name: {figure: (total / count).tolist() for figure, total in found.items()}
            for name, found in totals.items()
        }
        sites = [_profiled(site, figures[site.name]) if site.name in figures else site for site in self.plan.sites]
        return self.plan.model_copy(update={"sites": sites}), moments

    def measure(self, candidates: Mapping[str, list[Candidate]], batches: Sequence[Inputs], description: str) -> None:
        """Run every candidate of every site on the inputs that the exact model gives that site."""
        names = list(candidates)
        causal = {site.name: site.causal for site in self.plan.sites}
        for number, one in enumerate(self.progress(batches, description)):
            key = f"{description} {number} " + " ".join(f"{name} {len(candidates[name])}" for name in names)
            if self.journal.recall(key, candidates):
                continue
            seen = with_gradients(self.model, names, one, self.answer, self.plan.seed * 1000 + number)
            while seen:  # what a site no longer needs is freed before the next one
                name, (call, output, gradient) = seen.popitem()
                site, plain = f"site '{name}'", in_plain_form(call, name, causal[name])
                check_finite(output, site, "its attention's output")
                check_finite(gradient, site, "the gradient of the model's answer there")
                for candidate in processes.share(candidates[name]):
                    candidate.observe(plain, output, gradient)
                    check_finite(candidate.sums, site, f"the error of {candidate.name}")
            _exchange(candidates)
            self.journal.record(key, candidates)


def _profiled(site: SitePlan, figures: Mapping[str, list[float]]) -> SitePlan:
    ratio = sum(figures["entropy"]) / site.heads / math.log(max(site.tokens, 2))
    return site.model_copy(update={**figures, "entropy_ratio": ratio})


def _exchange(candidates: Mapping[str, list[Candidate]]) -> None:
    """Give every process what the others measured of their candidates, all bits of it."""
    if processes.count() == 1:
        return
    own = {name: [(c.sums.tolist(), c.seen) for c in processes.share(tried)] for name, tried in candidates.items()}
    shares = processes.gathered(own)
    for name, tried in candidates.items():
        measured = processes.in_order([part[name] for part in shares])
        for candidate, (sums, seen) in zip(tried, measured, strict=True):
            candidate.error_sum, candidate.damage_sum, candidate.together_sum = torch.tensor(sums, dtype=torch.float64)
            candidate.seen = seen
