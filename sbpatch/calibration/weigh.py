"""Measured candidates compared with each other: which ones are measured further, and which never pay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..plan.recipe import Objective
from .candidates import Candidate

PROMISING = 1.25  # times the lowest error at no higher cost: what the first look must not exceed
SIMPLER = 0.8  # of the root of the damage of a method of one part, at no higher cost: what a joined one must get below


def coherence(tried: Sequence[Candidate]) -> None:
    """Set the coherence of a site's candidates: of each method one, the geometric mean over its candidates and heads."""
    by_method: dict[str, list[Candidate]] = {}
    for candidate in tried:
        by_method.setdefault(candidate.layer.method, []).append(candidate)
    for same in by_method.values():
        apart = torch.cat([c.at_best(c.damage_sum) for c in same])
        together = torch.cat([c.at_best(c.together_sum) for c in same])
        measured = (apart > 0) & (together > 0)
        ratio = float((together[measured] / apart[measured]).log().mean().exp()) if bool(measured.any()) else 1.0
        for candidate in same:
            candidate.coherence = ratio


def promising(tried: list[Candidate], objective: Objective = "memory") -> list[Candidate]:
    """Candidates that for some head are near the lowest error, or the lowest damage, of all that cost no more."""
    best = torch.full((2, tried[0].layer.site.heads), math.inf, dtype=torch.float64)
    kept = []
    for candidate in sorted(tried, key=lambda c: (c.cost(objective), float(c.errors.mean()))):
        found = torch.stack((candidate.errors, candidate.damages.sqrt()))
        best = torch.minimum(best, found)
        if bool((found <= PROMISING * best).any()):
            kept.append(candidate)
    return kept


def without_weak_pairs(tried: Sequence[Candidate], heads: range) -> list[Candidate]:
    """Without joined methods that are not clearly better than one part of their size: two parts take more time."""
    alone = [c for c in tried if not c.joined]

    def damage(candidate: Candidate) -> float:
        return float(candidate.damages[heads.start : heads.stop].sum())

    def limit(candidate: Candidate) -> float:
        affordable = (damage(c) for c in alone if c.entries() <= candidate.entries())
        return SIMPLER**2 * min(affordable, default=math.inf)

    return [c for c in tried if not c.joined or damage(c) < limit(c)]
