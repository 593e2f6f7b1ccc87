"""What a step of decoding reads of a compressed cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import SbpatchError

# Tokens that a layer reads a step: of what layers read on average, of the fewest that one can read, and of all that there are.
Reads = Callable[[int, int, int], int]
WORTH = 0.5  # share of a past above which copying blocks of it takes longer than reading all of it


@dataclass(frozen=True)
class Settings:
    """What a step of decoding reads.

    Attributes:
        budget: keys and values read a step, points included, as a share of the tokens in the cache, on average over the
            layers; over 0, at most 1. Where it comes to more than `WORTH`, all are read.
        least: so many tokens are read whatever the budget: a quarter of a short past loses much and saves little; at least 0.
        block: tokens of a block, at least 2.
        recent: the latest tokens, always read exactly, at least 0.
        run: that many more may gather before they become blocks, a multiple of `block`.

    Raises:
        SbpatchError: a value is out of its range.
    """

    budget: float = 0.25
    block: int = 16
    recent: int = 128
    run: int = 256
    least: int = 2000

    def __post_init__(self) -> None:
        run = self.block > 1 and self.run > 0 and self.run % self.block == 0
        if not (0 < self.budget <= 1 and min(self.recent, self.least) >= 0 and run):
            raise SbpatchError(
                f"a cache with {self}: budget must be over 0 and at most 1, block at least 2, recent and least at least 0, "
                "and run a multiple of block"
            )

    def blocked(self, tokens: int, before: int) -> int:
        """How many of the first tokens lie in blocks, where `before` do already."""
        ready = tokens - self.recent - (before or self.block)  # the first tokens are a block of their own
        if ready < self.run or self._all(tokens):
            return before
        return (before or self.block) + ready // self.run * self.run

    def best(self, tokens: int, blocked: int, reads: Reads) -> int:
        """Blocks that a step reads exactly, of a layer that reads what `reads` says, points included.

        0 where there is no room for one on average, or nothing is saved: then a step reads all.
        """
        points, mean = blocked // self.block, self._mean(tokens)
        rest = points + tokens - blocked
        if self._all(tokens) or mean - rest < self.block:
            return 0
        read = reads(mean, rest + self.block, tokens)
        return points if read >= tokens else min((read - rest) // self.block, points)

    def _mean(self, tokens: int) -> int:
        """How many of so many tokens a step is to read, on average over the layers."""
        return max(int(self.budget * tokens), self.least)

    def _all(self, tokens: int) -> bool:
        """Whether a step reads all of so many tokens, as it would read too many of them to gain by it."""
        return self._mean(tokens) > WORTH * tokens
