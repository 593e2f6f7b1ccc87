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
from ..sites.fidelity import FIGURES, head_profile, second_moments
from ..sites.observe import Watcher, check_finite, in_plain_form, observed
from .candidates import Candidate
from .journal import Journal
from .sensitivity import with_gradients


class Trial:
    """Runs of the exact model in which something is measured at its sites; each sample's figures go to the journal.

    Several processes share the samples, one each at a time, and where there are fewer samples than processes also the
    candidates of each site. What they find is added up in the samples' order, so that no bit depends on how many they are.
    """

    def __init__(self, model: nn.Module, plan: Plan, answer: Answer, journal: Journal, progress: Progress[Any]) -> None:
        self.model, self.plan, self.answer, self.journal, self.progress = model, plan, answer, journal, progress
        self.causal = {site.name: site.causal for site in plan.sites}

    def profile(self, batches: Sequence[Inputs]) -> tuple[Plan, dict[str, tuple[Tensor, Tensor]]]:
        """The plan with each supported site's entropy and the other figures of its heads.

        Beside it, second moments of the queries and keys of the sites that may be patched and are not causal, (H, d, d) each.
        """
        supported = [site for site in self.plan.sites if site.decision != "unsupported" and not site.local]
        samples = batch.singles(batches)
        means: dict[str, Tensor] = {}
        for some in self.progress(processes.rounds(samples), "entropy"):
            own: dict[str, Tensor] = {}
            for one in processes.share(some):  # one, or none at the end
                watchers = {site.name: _profiler(site, own) for site in supported}
                observed(self.model, one, watchers, {site.name: site.causal for site in supported})
            for found in processes.gathered_tensors(own):
                for key, values in found.items():
                    means[key] = means.get(key, 0) + values / len(samples)
        sites = [_profiled(site, means) if site in supported else site for site in self.plan.sites]
        moments = {
            site.name: (means[f"query {site.name}"], means[f"key {site.name}"])
            for site in supported
            if f"query {site.name}" in means
        }
        return self.plan.model_copy(update={"sites": sites}), moments

    def measure(self, candidates: Mapping[str, list[Candidate]], batches: Sequence[Inputs], description: str) -> None:
        """Run every candidate of every site on the inputs that the exact model gives that site."""
        pieces = [
            (batch.samples(one, i, i + 1), number, (i, batch.count(one)))
            for number, one in enumerate(batches)
            for i in range(batch.count(one))
        ]
        measured = 0
        for some in self.progress(processes.rounds(pieces), description):
            measured += len(some)
            key = f"{description}, {measured} samples: " + " ".join(
                f"{name} {len(c)}" for name, c in candidates.items()
            )
            if self.journal.recall(key, candidates):
                continue
            teams = processes.Teams(len(some))
            shares = processes.gathered(self._measured(candidates, teams, *some[teams.item]))
            for item in range(len(some)):
                for name, tried in candidates.items():
                    sums = teams.in_order(item, [share[name] for share in shares])
                    for candidate, found in zip(tried, sums, strict=True):
                        candidate.add(torch.tensor(found, dtype=torch.float64), 1)
            self.journal.record(key, candidates)

    def _measured(
        self,
        candidates: Mapping[str, list[Candidate]],
        teams: processes.Teams,
        one: Inputs,
        number: int,
        place: tuple[int, int],
    ) -> dict[str, list[Any]]:
        """This process's candidates on a sample, which lies at a place in the batch of that number: sums by site."""
        seed = self.plan.seed * 1000 + number
        seen = with_gradients(self.model, list(candidates), one, self.answer, seed, place=place)
        found: dict[str, list[Any]] = {}
        while seen:  # what a site no longer needs is freed before the next one
            name, (call, output, gradient) = seen.popitem()
            site, plain = f"site '{name}'", in_plain_form(call, name, self.causal[name])
            check_finite(output, site, "its attention's output")
            check_finite(gradient, site, "the gradient of the model's answer there")
            found[name] = []
            for candidate in teams.share(candidates[name]):
                sums = candidate.measured(plain, output, gradient)
                check_finite(sums, site, f"the error of {candidate.name}")
                found[name].append(sums.tolist())
        return found


def _profiled(site: SitePlan, means: Mapping[str, Tensor]) -> SitePlan:
    figures = {figure: means[f"{figure} {site.name}"].tolist() for figure in FIGURES}
    ratio = sum(figures["entropy"]) / site.heads / math.log(max(site.tokens, 2))
    return site.model_copy(update={**figures, "entropy_ratio": ratio})


def _profiler(site: SitePlan, own: dict[str, Tensor]) -> Watcher:
    """Puts the figures of a site's heads in one sample into `own`, and the second moments of what calibration fits to."""

    def watch(call: Call, output: Tensor) -> None:
        for figure, values in head_profile(call).items():
            check_finite(values, f"site '{site.name}'", figure.replace("_", " "))
            own[f"{figure} {site.name}"] = values.double().sum(0).cpu()
        if site.decision == "patch" and not site.causal:
            for key, values in zip(("query", "key"), second_moments(call), strict=True):
                check_finite(values, f"site '{site.name}'", "the second moment of its queries and keys")
                own[f"{key} {site.name}"] = values.sum(0).cpu()

    return watch
