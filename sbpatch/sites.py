"""Find the attention sites of a model, and swap what they compute, reversibly.

A site is the innermost module whose forward calls `F.scaled_dot_product_attention`, nn.MultiheadAttention included.
Patching changes the module's class to a subclass whose forward runs with that call redirected to a replacement; nothing
else of the model is copied or rewritten, and its state dict keeps its keys. Modules that take the softmax of a matrix
product themselves are found too, and reported with the reason why they stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import interface
from .attention import Geometry
from .attention.per_head import Layer, PerHead
from .calls import Call as Call
from .calls import Redirect
from .errors import SbpatchError
from .inputs import Inputs
from .probe import Found, Probe


@dataclass(frozen=True)
class Site:
    """One place where softmax attention is computed, as a probe forward met it."""

    name: str
    class_name: str
    geometry: Geometry
    unsupported: str | None = None  # why it cannot be patched, or None
    by_hand: bool = False  # a softmax of the module's own, that cannot be had as a call


# -- finding ---------------------------------------------------------------------------------------------------------


def find_sites(model: nn.Module, example: Inputs) -> list[Site]:
    """Run `model` on `example` once, in evaluation mode, and list its attention sites in the order they are reached.

    Raises:
        SbpatchError: the model computes no attention, so that there is nothing to patch; or it is patched.
    """
    if any(hasattr(module, "sbpatch") for module in model.modules()):
        raise SbpatchError(f"{type(model).__name__} is patched already; call unpatch first")
    names = {module: name for name, module in model.named_modules()}
    training = [module for module in names if module.training]
    interface.admit(model)
    try:
        found = Probe().run(model.eval(), example)
    finally:
        interface.dismiss(model)
        for module in training:
            module.training = True
    if not found:
        raise SbpatchError(
            f"no attention found in {type(model).__name__}: nothing in it calls scaled_dot_product_attention or takes the "
            "softmax of a matrix product, so there is nothing to patch"
        )
    tensors = [example] if isinstance(example, Tensor) else example.values()
    image = next((tuple(x.shape[-2:]) for x in tensors if x.ndim == 4), None)
    return [_site(names[module], module, calls, image) for module, calls in found.items()]


def _site(name: str, module: nn.Module, calls: list[Found], image: tuple[int, ...] | None) -> Site:
    first = calls[0]
    reason = first.unsupported
    if len(calls) > 1 and reason is None:
        reason = f"{len(calls)} attention calls in one forward, which one setting cannot describe"
    grid, prefix = (None, 0) if image is None else _grid(first.tokens, *image)
    geometry = Geometry(
        first.tokens, first.heads, first.head_dim, first.causal, grid, prefix, 0 if reason else first.key_heads
    )
    return Site(name, type(module).__name__, geometry, reason, first.by_hand)


def _grid(tokens: int, height: int, width: int) -> tuple[tuple[int, int] | None, int]:
    """Rows, columns and class tokens of an image's tokens: the grid of the image's shape with the fewest extra tokens."""
    for prefix in range(min(tokens, 9)):
        rows = math.isqrt((tokens - prefix) * height // width)
        if rows and rows * rows * width == (tokens - prefix) * height and (tokens - prefix) % rows == 0:
            return (rows, (tokens - prefix) // rows), prefix
    return None, 0


# -- swapping --------------------------------------------------------------------------------------------------------


@cache
def _patched_class(cls: Any) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        caught: list[bool] = []  # a list, as torch.compile reads no attribute back from a mode

        def attend(call: Call) -> Tensor:
            caught.append(True)
            return self.sbpatch(call)

        with Redirect(attend):
            output = cls.forward(self, *args, **kwargs)
        if not caught:
            raise SbpatchError(
                f"a patched {cls.__name__} computed its attention in another way than at calibration (asked for its weights, "
                "or in training with dropout?); leave it exact (--exclude)"
            )
        return output

    return type(cls.__name__, (cls,), {"forward": forward, "sbpatch_original": cls, "__module__": cls.__module__})


class PatchedSite(nn.Module):
    """What a patched site computes: checks that the call is the one it was calibrated for, then runs the layer."""

    def __init__(self, name: str, layer: Layer | PerHead) -> None:
        super().__init__()
        self.name, self.layer = name, layer

    def forward(self, call: Call) -> Tensor:
        site, queries, keys = self.layer.site, call.query.shape[-2], call.key.shape[-2]
        if site.causal and (queries != keys or _one_row(call)):
            return call.exact()  # decoding with a key-value cache, or a prompt read in pieces
        heads, head_dim = call.query.shape[-3], call.query.shape[-1]
        if (heads, head_dim) != (site.heads, site.head_dim):
            raise SbpatchError(
                f"site '{self.name}' was calibrated with {site.heads} heads of width {site.head_dim} and is now called with "
                f"{heads} of width {head_dim}: the plan was made for another model"
            )
        if queries != keys or call.dropout_p:
            raise SbpatchError(
                f"site '{self.name}' was calibrated for self-attention without dropout, and is now called with "
                f"{f'dropout {call.dropout_p:g}' if call.dropout_p else f'{queries} queries and {keys} keys'}; leave it "
                "exact (--exclude), or set its dropout to 0"
            )
        if ((keys + 1) / 2 if site.causal else keys) <= self.layer.stored:
            return call.exact()  # a row reads fewer keys than the layer would store for it
        try:
            call = call.plain(site.causal)
        except SbpatchError as error:
            raise SbpatchError(f"site '{self.name}': {error}; leave it exact (--exclude)") from error
        device = call.query.device.type
        q, k, v = call.query, call.key, call.value
        if not torch.is_autocast_enabled(device):
            return self.layer(q, k, v, key_mask=call.key_mask, scale=call.scale)
        kind = torch.get_autocast_dtype(device)  # inputs as autocast gives them to PyTorch's attention, sums in float32
        with torch.autocast(device, enabled=False):
            return self.layer(q.to(kind), k.to(kind), v.to(kind), key_mask=call.key_mask, scale=call.scale)


def _one_row(call: Call) -> bool:
    """One mask for several queries, so they all stand at the same token: heads of a group, decoded as queries of one head."""
    mask = call.attn_mask
    return mask is not None and mask.ndim > 1 and mask.shape[-2] == 1 and call.query.shape[-2] > 1


def swap(model: nn.Module, replacements: Mapping[str, Callable[[Call], Tensor]]) -> None:
    """Let the named sites of `model` compute their replacement, in place. Undone by `restore`.

    Raises:
        SbpatchError: a name is not a module of the model, or is patched already.
    """
    modules = dict(model.named_modules())
    for name in replacements:
        if name not in modules:
            raise SbpatchError(f"the model has no module '{name}': the plan was made for another model")
        if hasattr(modules[name], "sbpatch"):
            raise SbpatchError(f"site '{name}' is patched already; call unpatch first")
    for name, replacement in replacements.items():
        module = modules[name]
        # A module goes through nn.Module's registration, so that it moves with the model; it brings no state dict keys.
        module.sbpatch = replacement
        if not interface.chosen(module):
            module.__class__ = _patched_class(type(module))  # type: ignore[arg-type]
        if getattr(module, "fused_attn", True) is False:  # timm's switch between one fused call and a softmax by hand
            _change(module, "fused_attn", True)
    interface.admit(model)
    _close_short_cuts(model)


def _close_short_cuts(model: nn.Module) -> None:
    """PyTorch's transformer encoders can run a layer as one operation, past its attention module; patched ones must not."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and hasattr(module.self_attn, "sbpatch"):
            _change(module, "activation_relu_or_gelu", 0)
        elif isinstance(module, nn.TransformerEncoder) and any(hasattr(m, "sbpatch") for m in module.modules()):
            _change(module, "use_nested_tensor", False)


def _change(module: nn.Module, name: str, value: object) -> None:
    """Set an attribute until `restore`."""
    before = module.__dict__.setdefault("sbpatch_before", {})
    before.setdefault(name, getattr(module, name))
    setattr(module, name, value)


def restore(model: nn.Module) -> None:
    """Give every swapped site of `model` its own attention back, in place."""
    interface.dismiss(model)
    for module in list(model.modules()):
        for name, value in module.__dict__.pop("sbpatch_before", {}).items():
            setattr(module, name, value)
        if hasattr(module, "sbpatch_original"):
            module.__class__ = module.sbpatch_original  # type: ignore[assignment]
        if hasattr(module, "sbpatch"):
            del module.sbpatch


@contextmanager
def swapped(model: nn.Module, replacements: Mapping[str, Callable[[Call], Tensor]]) -> Iterator[None]:
    """`swap` for the length of a with block."""
    swap(model, replacements)
    try:
        yield
    finally:
        restore(model)
