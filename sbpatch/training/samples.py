"""Samples to train on and samples to choose the best state by, both of a source's training part, none in both."""

from __future__ import annotations

import numpy as np

from ..data.samples import Part, Samples
from ..errors import SbpatchError


def divided(whole: Samples, validation: int, seed: int) -> tuple[Part, Part]:
    """Training samples, and `validation` others drawn by the seed.

    Raises:
        SbpatchError: there are not more samples than that.
    """
    if len(whole) <= validation:
        raise SbpatchError(
            f"{whole.name} has {len(whole)} samples to train on, of which {validation} are to be set aside: "
            "give a smaller --validation"
        )
    order = np.random.default_rng([seed, len(whole)]).permutation(len(whole)).tolist()
    return Part(whole, sorted(order[validation:])), Part(whole, sorted(order[:validation]))
