"""What a step of decoding reads of a compressed cache."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SbpatchError


@dataclass(frozen=True)
class Settings:
    """What a step of decoding reads.

    Attributes:
        budget: keys and values read a step, points included, as a share of the tokens in the cache; over 0, at most 1.
        block: tokens of a block, at least 2.
        recent: the latest tokens, always read exactly, at least 0.
        run: that many more may gather before they become blocks, a multiple of `block`.

    Raises:
        SbpatchError: a value is out of its range.
    """

    budget: float = 0.25
    block: int = 32
    recent: int = 128
    run: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1 or self.block < 2 or self.recent < 0 or self.run < 1 or self.run % self.block:
            raise SbpatchError(
                f"a cache with {self}: budget must be over 0 and at most 1, block at least 2, recent at least 0, and run a "
                "multiple of block"
            )

    def blocked(self, tokens: int, before: int) -> int:
        """How many of the first tokens lie in blocks, where `before` do already."""
        ready = tokens - self.recent - (before or self.block)  # the first tokens are a block of their own
        return before if ready < self.run else (before or self.block) + ready // self.run * self.run

    def best(self, tokens: int, blocked: int) -> int:
        """Blocks that a step reads exactly; under 1 where the budget has no room for one beside points and recent tokens."""
        points = blocked // self.block
        room = int(self.budget * tokens) - points - (tokens - blocked)
        return min(room // self.block, points)
