"""`generate` of a patched model with a compressed cache."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from functools import cache as remembered
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..errors import SbpatchError
from ..plan import hub, patch
from ..sites.swap import PatchedSite

SWITCH = ("compressed", "exact")
POWER = 1.5  # to which a layer's share of its plan's entries is its weight in the cache (docs/generation.md)


def load(directory: str | Path) -> nn.Module:
    """The patched model of a directory that `calibrate -o` wrote, or of the hub's `owner/name`.

    It is in evaluation mode, float32, on the CPU. Where it generates text, its `generate` uses a compressed cache for the
    patched layers, see `with_compressed_cache`.

    Raises:
        SbpatchError: the directory is no such one, or one of its files is damaged.
    """
    model = patch.load(hub.local(directory))
    layers = patched_layers(model)
    return with_compressed_cache(model, layers) if layers else model


def patched_layers(model: nn.Module) -> dict[int, float]:
    """The layers of a text generator whose attention is patched, as its cache counts them; none for other models.

    With each its weight, a power of the share of the exact entries that its patch stores. Calibration gave more to layers whose
    errors the model suffers from, and the same layers suffer from a cache that is read in part.
    """
    found: dict[int, float] = {}
    if getattr(model, "can_generate", lambda: False)():
        for module in model.modules():
            site, number = getattr(module, "sbpatch", None), getattr(module, "layer_idx", None)
            if isinstance(site, PatchedSite) and isinstance(number, int):
                found[number] = (site.layer.stored / site.layer.site.row_keys) ** POWER
    return found


def with_compressed_cache(
    model: nn.Module, layers: Collection[int] | Mapping[int, float] | None = None, settings: Any = None
) -> nn.Module:
    """Let `model.generate` use a `CompressedCache` of these layers (default: all), in place; `unpatch` takes it back.

    `generate` then takes `cache="exact"` for transformers' own cache. A cache that is given, `cache_implementation`,
    `use_cache=False` and a model that assists mean what they mean in transformers.

    Args:
        layers: as `chosen` of `CompressedCache`.
        settings: a `Settings`, where it is not to be the default.

    Raises:
        SbpatchError: the model does not generate, or does so with a compressed cache already.
    """
    if not getattr(model, "can_generate", lambda: False)():
        raise SbpatchError(f"{type(model).__name__} does not generate text, so it has no use for a cache")
    if hasattr(model, "sbpatch_original"):
        raise SbpatchError(f"{type(model).__name__} has a compressed cache already; call unpatch first")
    model.__class__ = _generating(cast(Any, type(model)))
    model.sbpatch_cache = (settings, layers)  # type: ignore[assignment]
    return model


def cache_name(cls: Any) -> str:
    """How a class of models calls its cache, as an argument and in its output: transformers has renamed it."""
    return "cache" if "cache" in inspect.signature(cls.forward).parameters else "past_key_values"


@remembered
def _generating(cls: Any) -> type[nn.Module]:
    name = cache_name(cls)

    def generate(self: Any, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        if isinstance(cache, str) and cache not in SWITCH:
            raise SbpatchError(f"generate with cache='{cache}': it is {' or '.join(SWITCH)}, or a Cache")
        if cache == "compressed" or (cache is None and not _decided(self, kwargs)):
            from .cache import CompressedCache  # transformers is there, as the model is one of its

            settings, layers = self.sbpatch_cache
            cache = CompressedCache(self.config, settings, layers)
        given = {} if cache is None or isinstance(cache, str) else {name: cache}
        return cls.generate(self, *args, **given, **kwargs)

    return type(cls.__name__, (cls,), {"generate": generate, "sbpatch_original": cls, "__module__": cls.__module__})


def _decided(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of `generate` say already which cache is used, or that none is."""
    if any(kwargs.get(x) is not None for x in ("past_key_values", "assistant_model", "prompt_lookup_num_tokens")):
        return True
    config = kwargs.get("generation_config") or model.generation_config

    def setting(name: str) -> Any:
        return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)

    return setting("use_cache") is False or setting("cache_implementation") is not None
