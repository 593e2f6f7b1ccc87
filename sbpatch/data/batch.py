"""What a model is run on, and its answer: a batch of images or of tokenised text -> one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SbpatchError

# Images (B, 3, H, W), or what the model takes by name: `input_ids` and `attention_mask`, (B, n) both.
Inputs = Tensor | Mapping[str, Tensor]
ANSWERS = ("logits", "last_hidden_state")  # of a transformers output, the first that is there


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's answer: logits (B, classes) or (B, n, vocabulary), or features (B, n, width) where it has no head.

    Raises:
        SbpatchError: the model answers with something else.
    """
    found: Any = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    if isinstance(found, Tensor):
        return found
    if isinstance(found, Mapping):
        found = next((found[key] for key in ANSWERS if key in found), found)
    elif isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise SbpatchError(f"{type(model).__name__} answers with {type(found).__name__}: neither logits nor features")
    return found


def count(inputs: Inputs) -> int:
    """Samples in a batch."""
    return len(inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())))


def samples(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The samples from `start` to before `stop`."""
    if isinstance(inputs, Tensor):
        return inputs[start:stop]
    return {name: tensor[start:stop] for name, tensor in inputs.items()}


def first_samples(batches: Sequence[Inputs], most: int) -> list[Inputs]:
    """The first `most` samples, in batches as they came."""
    found: list[Inputs] = []
    for one in batches:
        if most <= 0:
            break
        found.append(samples(one, 0, most))
        most -= count(found[-1])
    return found


def after_samples(batches: Sequence[Inputs], first: int) -> list[Inputs]:
    """What `first_samples` of `first` leaves over."""
    found: list[Inputs] = []
    for one in batches:
        size = count(one)
        if size > first:
            found.append(samples(one, first, size))
        first = max(first - size, 0)
    return found


def singles(batches: Sequence[Inputs]) -> list[Inputs]:
    """All samples in their order, each a batch of its own."""
    return [samples(one, i, i + 1) for one in batches for i in range(count(one))]


def moved(inputs: Inputs, device: str | torch.device, dtype: torch.dtype) -> Inputs:
    """The batch on a device, its floating point values in `dtype`; token ids and masks keep their type."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, dtype if inputs.is_floating_point() else inputs.dtype)
    return {name: moved(tensor, device, dtype) for name, tensor in inputs.items()}  # type: ignore[misc]


def device(inputs: Inputs) -> torch.device:
    """Where the batch is."""
    return inputs.device if isinstance(inputs, Tensor) else next(iter(inputs.values())).device
