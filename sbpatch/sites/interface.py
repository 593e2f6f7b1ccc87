"""The attention implementation of transformers that a patched model may use: attn_implementation="scatterbrain".

model = AutoModel.from_pretrained(name, attn_implementation="scatterbrain")
sbpatch.patch(model, plan)

transformers then hands every attention call to `attention` below, which needs no class swap, and gets k and v before
their heads are repeated. Masks are made as for "sdpa". A model without a plan is refused, not quietly run exact.

A model that was loaded as usual gets there too: `redirected` gives each module of a patched site a configuration of its own
that names this implementation.
"""

from __future__ import annotations

import copy
import dis
import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..errors import SbpatchError
from .calls import Call

NAME = "scatterbrain"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (B, H, n, d), key and value of as many heads or fewer -> ((B, n, H, d), None).

    Raises:
        SbpatchError: no plan was applied to the model, or a planned site is called with a position bias.
    """
    if not getattr(module, "sbpatch_plan", False):
        raise SbpatchError(
            f"the model was loaded with attn_implementation='{NAME}' and has no plan: call sbpatch.patch(model, plan), "
            "or load it with attn_implementation='sdpa'"
        )
    if not serves(module):  # not planned, so exact; or planned by class, so that the call is caught further on
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )  # fmt: skip
    if kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        raise SbpatchError(f"a patched {type(module).__name__} is called with a position bias or a paged cache")
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = queries > 1 and attention_mask is None and causal
    if causal and keys > queries:  # a static cache that was empty: what lies behind the queries is not filled yet
        key, value = key[:, :, :queries], value[:, :, :queries]
    grouped = key.shape[1] != query.shape[1]
    call = Call(query, key, value, attention_mask, dropout, causal, scaling, enable_gqa=grouped)
    output: Tensor = module.sbpatch(call)  # type: ignore[operator]
    return output.transpose(1, 2).contiguous(), None


def chosen(module: nn.Module) -> bool:
    """Whether transformers runs the module through `attention`."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME


def redirected(module: nn.Module) -> Any:
    """The configuration with which a module of transformers runs through `attention`; None where none would make it."""
    config = getattr(module, "config", None)
    plain = getattr(config, "_attn_implementation", None) == "sdpa" and not getattr(config, "sub_configs", None)
    if not plain or not _looks_up(type(module).forward):
        return None
    own = copy.copy(config)
    own._attn_implementation = NAME  # type: ignore[union-attr]
    return own


@cache
def _looks_up(forward: Callable[..., Any]) -> bool:
    """Whether it takes the attention function that a module's configuration names, and asks that name for nothing else."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    asked = [] if code is None else [step.argval for step in dis.get_instructions(code)]
    return asked.count("_attn_implementation") == 1 and "get_interface" in asked


def serves(module: nn.Module) -> bool:
    """Whether a swapped module gets its replacement here."""
    return hasattr(module, "sbpatch") and not hasattr(module, "sbpatch_original")


def admit(model: nn.Module) -> None:
    """Let the modules that call `attention` run: there is a plan, or their calls are being recorded."""
    for module in model.modules():
        if chosen(module):
            module.sbpatch_plan = True  # type: ignore[assignment]


def dismiss(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "sbpatch_plan"):
            del module.sbpatch_plan


def register(registry: ModuleType) -> None:
    """Make the implementation known to transformers, whose registry of attention functions is in `registry`."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    registry.AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
