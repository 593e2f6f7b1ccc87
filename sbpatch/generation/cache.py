"""A cache of transformers whose layers read a share of the past a step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from .layer import CompressedLayer
from .settings import Reads, Settings
from .shares import shared_out
from .step import Scratch


class CompressedCache(Cache):
    """Keys and values of all layers: all stored, and of each layer in `chosen` a share read a step (see `Settings`).

    For any model of transformers whose attention is "sdpa" or "scatterbrain", patched or not. Layers of a sliding window or a
    recurrent state, and those that are not chosen, are transformers' own.

    Args:
        config: of the model.
        settings: what a step reads.
        chosen: numbers of layers; all where it is None. With a weight each, a layer reads in proportion to it, as far as
            it has tokens, and the budget is the mean of the chosen ones (see `generate.patched_layers`).
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        settings: Settings | None = None,
        chosen: Collection[int] | Mapping[int, float] | None = None,
    ) -> None:
        self.settings = settings or Settings()
        scratch = Scratch()
        plain = DynamicCache(config=config).layers
        numbers = [i for i, x in enumerate(plain) if type(x) is DynamicLayer and (chosen is None or i in chosen)]
        weights = tuple(chosen[i] if isinstance(chosen, Mapping) else 1.0 for i in numbers)

        def reads(place: int) -> Reads:
            return lambda mean, least, most: shared_out(weights, mean, least, most)[place]

        layers: list[Any] = list(plain)
        for place, number in enumerate(numbers):
            layers[number] = CompressedLayer(self.settings, scratch, reads(place))
        super().__init__(layers=layers)

    @property
    def read_share(self) -> float | None:
        """Keys and values that the steps so far read of what an exact cache reads; None before the first step.

        Of layers that read all their tokens and the compressed ones, not of sliding windows.
        """
        compressed = [layer for layer in self.layers if isinstance(layer, CompressedLayer)]
        whole = sum(type(layer) is DynamicLayer for layer in self.layers)
        offered = sum(layer.offered for layer in compressed)
        if not offered:
            return None
        beside = whole * offered / len(compressed)  # layers side by side see the same steps
        return float((sum(layer.read for layer in compressed) + beside) / (offered + beside))

    @property
    def stored_share(self) -> float | None:
        """Bytes that the compressed layers hold, of those of their keys and values alone; None while they are empty."""
        pairs = [layer.stored_bytes for layer in self.layers if isinstance(layer, CompressedLayer)]
        alone = sum(pair[1] for pair in pairs)
        return sum(pair[0] for pair in pairs) / alone if alone else None
