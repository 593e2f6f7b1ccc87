"""How layers share out what a step of decoding reads: as many tokens on average as the budget says, by weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

HALVINGS = 60  # of the interval that the common factor is sought in


@lru_cache(maxsize=64)  # all layers of a step ask for the same
def shared_out(weights: Sequence[float], mean: int, least: int, most: int) -> tuple[int, ...]:
    """Tokens that each layer reads: in proportion to its weight, from `least` to `most`, at most `mean` on average.

    Weights are over 0, and `mean` lies between the bounds. What a layer cannot use goes to the others.
    """

    def read(factor: float) -> list[float]:
        return [min(max(factor * weight, least), most) for weight in weights]

    low, high = 0.0, most / min(weights)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(read(middle)) <= mean * len(weights) else (low, middle)
    return tuple(int(tokens + 1e-6) for tokens in read(low))  # whole ones, but for rounding
