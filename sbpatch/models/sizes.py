"""Numbers of a model's configuration, checked against its weights before anything of that size is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds import CONFIG, PIXELS, TOKENS, shown, whole
from ..errors import SbpatchError

LAYERS = re.compile(r"(^|_)(n_?)?(layers?|blocks|depths?)$")  # keys that count modules: each has a tensor at least
POSITIONS = re.compile(r"position|max_(seq|length)|n_ctx")
SIZE_KEYS = re.compile(r"(img|image|input|patch)_size$")
FEW_LAYERS = 256  # that any configuration may name: of parts that are not taken, or as a bound of its own
ROOM = 4  # times the values of the weights that a model may hold: tied weights and tables it makes itself
LEAST_ROOM = 1 << 26  # values, for tables of small models
# Arguments of `timm.create_model` itself, which would read other files; a configuration is for the model's own.
NOT_THE_MODELS = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "model_name",
}
NOT_THE_MODELS |= {"scriptable", "exportable", "no_jit", "features_only", "num_classes"}


def check_config(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse integers that no model with these weights can have.

    Raises:
        SbpatchError: one is beyond 32 bits, counts more layers than there are tensors, or is an image size out of bounds.
    """
    for key, value in _integers(config):
        last = next((part for part in reversed(key.split(".")) if not part.isdigit()), key)
        if LAYERS.search(last) and value > max(len(state), FEW_LAYERS):
            raise SbpatchError(
                f"the configuration's {key} is {shown(value)}, and there are {len(state)} tensors in all"
            )
        if SIZE_KEYS.search(last):
            whole(value, f"the configuration's {key}", 0, PIXELS)
        most = 16 * TOKENS if POSITIONS.search(last) else CONFIG
        whole(value, f"the configuration's {key}", -CONFIG, most)


def check_arguments(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `model_args` of a timm `config.json`: the model's own alone, their numbers within bounds.

    Raises:
        SbpatchError: they are something else.
    """
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise SbpatchError(f"config.json: model_args is {shown(arguments)}, not an object")
    if wrong := sorted(NOT_THE_MODELS & arguments.keys()):
        raise SbpatchError(f"config.json: model_args holds {wrong[0]}, which is no argument of the model itself")
    check_config(arguments, state)
    largest = max((size for tensor in state.values() for size in tensor.shape), default=0)
    for key, value in _integers(arguments):
        whole(value, f"config.json: model_args.{key}", -1, max(largest, PIXELS))
    return dict(arguments)


def check_room(make: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> None:
    """Refuse a model of many times the values of its weights; it is built without memory for this.

    Raises:
        SbpatchError: it is that large.
    """
    try:
        with torch.device("meta"):
            model = make()
    except Exception:  # it cannot be built so, or not at all: then the loader says why
        return
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    given = sum(tensor.numel() for tensor in state.values())
    if needed > ROOM * given + LEAST_ROOM:
        raise SbpatchError(
            f"the configuration is that of a model of {needed:.3g} values, and the weights hold {given:.3g}: they do not fit"
        )


def _integers(values: Any, where: str = "") -> Iterator[tuple[str, int]]:
    """Every integer in a configuration, with its path; floats that are one count."""
    if isinstance(values, Mapping):
        items = [(f"{where}.{key}".strip("."), value) for key, value in values.items()]
    elif isinstance(values, (list, tuple)):
        items = [(f"{where}.{i}", value) for i, value in enumerate(values)]
    else:
        if isinstance(values, (int, float)) and not isinstance(values, bool) and values == values // 1:
            yield where, int(values) if abs(values) != float("inf") else CONFIG + 1
        return
    for key, value in items:
        yield from _integers(value, key)
