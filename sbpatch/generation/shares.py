"""How layers share out what a step of decoding reads: as many tokens on average as the budget says, by weight."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=64)  # all layers of a step ask for the same
def shared_out(weights: Sequence[float], mean: int, least: int, most: int) -> tuple[int, ...]:
    """Tokens that each layer reads: in proportion to its weight, from `least` to `most`, at most `mean` on average.

    Weights are over 0, and `mean` lies between the bounds. What a layer cannot use goes to the others.
    """

    def read(factor: float) -> list[float]:
        return [min(max(factor * weight, least), most) for weight in weights]

    def together(factor: float) -> float:
        return sum(read(factor))

    # What all read grows with the factor, on a straight line from where one layer reaches a bound to where the next one does.
    total = float(mean * len(weights))
    factors = sorted(bound / weight for weight in weights for bound in (least, most))
    after = bisect_right(factors, total, key=together)
    low, high = factors[max(after - 1, 0)], factors[min(after, len(factors) - 1)]
    at, to = together(low), together(high)
    factor = low + (high - low) * (total - at) / (to - at) if to > at else low
    return tuple(int(tokens + 1e-6) for tokens in read(factor))  # whole ones, but for rounding
