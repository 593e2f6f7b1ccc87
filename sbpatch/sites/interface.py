"""The attention implementation of transformers that a patched model may use: attn_implementation="scatterbrain".

model = AutoModel.from_pretrained(name, attn_implementation="scatterbrain")
sbpatch.patch(model, plan)

transformers then hands every attention call to `attention` below, which needs no class swap, and gets k and v before
their heads are repeated. Masks are made as for "sdpa". A model without a plan is refused, not quietly run exact.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..errors import SbpatchError
from .calls import Call

NAME = "scatterbrain"
HOME = "transformers.modeling_utils"  # where the registry of attention functions lives


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


def serves(module: nn.Module) -> bool:
    """Whether a swapped module gets its replacement here."""
    return hasattr(module, "sbpatch") and not hasattr(module, "sbpatch_original")


def admit(model: nn.Module) -> None:
    """Let the modules of a model that came by this door run: there is a plan, or they are being looked at."""
    for module in model.modules():
        if chosen(module):
            module.sbpatch_plan = True  # type: ignore[assignment]


def dismiss(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "sbpatch_plan"):
            del module.sbpatch_plan


# -- registration ----------------------------------------------------------------------------------------------------


def register() -> None:
    """Make the implementation known to transformers: now, or as soon as it is imported, which takes seconds."""
    if HOME in sys.modules:
        _register(sys.modules[HOME])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(home: ModuleType) -> None:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    home.AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


class _Finder(MetaPathFinder):
    """Finds nothing of its own: lets the import of `HOME` run as it would, and registers after it."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != HOME:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module)
