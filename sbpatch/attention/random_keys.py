"""Random keys, a baseline: the same `keys` tokens for every query, drawn once from the seed."""

from __future__ import annotations

import torch
from torch import Tensor

from .patterns import UNIT
from .registry import register
from .strided import Strided


@register("random")
class RandomKeys(Strided):
    """One token drawn from each of `keys` equal stretches of the sequence; the first token stands in for the first draw."""

    def _places(self, keys: int, seed: int) -> Tensor:
        draws = torch.randint(UNIT, (keys,), generator=torch.Generator().manual_seed(seed))
        draws[0] = 0  # so that no row of a causal site is empty
        return (torch.arange(keys) * UNIT + draws) // keys
