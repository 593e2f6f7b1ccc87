"""One budget for all heads: a choice on each head's curve of damage against cost, the sum of damages small."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from ..errors import SbpatchError

SLACK = 1e-9  # share by which a sum of costs may exceed its limit, for rounding
Curve = Sequence[tuple[float, float]]  # (cost, damage) of each choice


def allocate(curves: Sequence[Curve], limit: float) -> list[int] | None:
    """Indices of one choice a curve, the costs within `limit` together; None where even the cheapest are not.

    From the cheapest choices on, always the step that lowers the damage most per cost. On each curve that walks along its
    convex hull, which is the optimum of the relaxed problem; at the limit, smaller steps that still fit are taken.

    Raises:
        SbpatchError: a number is not finite: nothing below would end.
    """
    if not all(math.isfinite(x) for curve in curves for choice in curve for x in choice) or not math.isfinite(limit):
        raise SbpatchError("a cost or a damage is not a finite number: no budget can be shared out over it")
    chosen = [min(range(len(curve)), key=lambda j: (curve[j][0], curve[j][1])) for curve in curves]
    spent = sum(curve[j][0] for curve, j in zip(curves, chosen, strict=True))
    if spent > limit * (1 + SLACK):
        return None
    steps: list[tuple[float, float, int, int]] = []  # (minus gain per cost, damage after, curve, choice)

    def offer(u: int) -> None:
        cost, damage = curves[u][chosen[u]]
        best: tuple[float, float, int, int] | None = None
        for j, (more, less) in enumerate(curves[u]):
            if less >= damage or spent + more - cost > limit * (1 + SLACK):
                continue
            rate = (damage - less) / (more - cost) if more > cost else math.inf
            best = min(best or (math.inf, 0.0, 0, 0), (-rate, less, u, j))
        if best is not None:
            heapq.heappush(steps, best)

    for u in range(len(curves)):
        offer(u)
    while steps:
        _, _, u, j = heapq.heappop(steps)
        more = curves[u][j][0] - curves[u][chosen[u]][0]
        if spent + more <= limit * (1 + SLACK):
            spent += more
            chosen[u] = j
        offer(u)  # the next step from here, or, where that one no longer fits, a smaller one
    return chosen
