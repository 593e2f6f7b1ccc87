"""Find the attention sites of a model, and swap what they compute, reversibly.

A site is the innermost module whose forward calls `F.scaled_dot_product_attention`. Patching changes the module's class to
a subclass whose forward runs with that call redirected to a replacement; nothing else of the model is copied or rewritten,
and its state dict keeps its keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention import Geometry, Scatterbrain
from .errors import SbpatchError

SDPA = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Call:
    """The arguments of one attention call, as PyTorch names them; q, k, v are (B, H, n, d)."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def softmax_scale(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def exact(self) -> Tensor:
        """What the model itself computes here."""
        return SDPA(
            self.query, self.key, self.value, attn_mask=self.attn_mask, dropout_p=self.dropout_p,
            is_causal=self.is_causal, scale=self.scale, enable_gqa=self.enable_gqa,
        )  # fmt: skip


Replacement = Callable[[Call], Tensor]


@dataclass(frozen=True)
class Site:
    """One place where softmax attention is computed, as a probe forward met it."""

    name: str
    class_name: str
    geometry: Geometry
    unsupported: str | None = None  # why it cannot be patched, or None


class _Redirect(TorchFunctionMode):
    """While active, attention calls go to `replacement`; calls made inside it reach PyTorch as usual."""

    def __init__(self, replacement: Replacement) -> None:
        super().__init__()
        self.replacement = replacement

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SDPA:
            return self.replacement(Call(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


# -- finding ---------------------------------------------------------------------------------------------------------


def find_sites(model: nn.Module, example: Tensor) -> list[Site]:
    """Run `model(example)` once and list its attention sites in the order they are reached.

    Raises:
        SbpatchError: the model calls no scaled_dot_product_attention, so that there is nothing to patch; or it is patched.
    """
    if any(hasattr(module, "sbpatch_original") for module in model.modules()):
        raise SbpatchError(f"{type(model).__name__} is patched already; call unpatch first")
    names = {module: name for name, module in model.named_modules()}
    inside: list[nn.Module] = []
    calls: dict[nn.Module, list[Call]] = {}

    def record(call: Call) -> Tensor:
        calls.setdefault(inside[-1], []).append(call)
        return call.exact()

    handles = []
    for module in names:
        handles.append(module.register_forward_pre_hook(lambda m, _: inside.append(m)))
        handles.append(module.register_forward_hook(lambda m, _, __: inside.pop() and None, always_call=True))
    try:
        with torch.inference_mode(), _Redirect(record):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise SbpatchError(
            f"no attention found in {type(model).__name__}: nothing in it calls scaled_dot_product_attention, so there "
            "is nothing to patch"
        )
    image = tuple(example.shape[-2:]) if example.ndim == 4 else None
    return [_site(names[module], module, found, image) for module, found in calls.items()]


def _site(name: str, module: nn.Module, calls: list[Call], image: tuple[int, ...] | None) -> Site:
    call = calls[0]
    tokens, heads, head_dim = call.key.shape[-2], call.query.shape[-3], call.query.shape[-1]
    unsupported = None
    if len(calls) > 1:
        unsupported = f"{len(calls)} attention calls in one forward"
    elif call.query.shape[-2] != tokens:
        unsupported = f"{call.query.shape[-2]} queries against {tokens} keys: not self-attention"
    elif call.value.shape[-1] != head_dim:
        unsupported = f"values {call.value.shape[-1]} wide and queries {head_dim}"
    elif call.attn_mask is not None:
        unsupported = "a dense attention mask or bias"
    elif call.query.ndim != 4 or call.enable_gqa:
        unsupported = "grouped-query heads" if call.enable_gqa else f"{call.query.ndim}-D queries"
    grid, prefix = (None, 0) if image is None else _grid(tokens, *image)
    geometry = Geometry(tokens, heads, head_dim, call.is_causal, grid, prefix)
    return Site(name, type(module).__name__, geometry, unsupported)


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
        with _Redirect(self.sbpatch):
            return cls.forward(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "sbpatch_original": cls, "__module__": cls.__module__})


class PatchedSite(nn.Module):
    """What a patched site computes: checks that the call is the one it was calibrated for, then runs the layer."""

    def __init__(self, name: str, layer: Scatterbrain) -> None:
        super().__init__()
        self.name, self.layer = name, layer

    def forward(self, call: Call) -> Tensor:
        if (
            call.attn_mask is not None
            or call.dropout_p
            or call.enable_gqa
            or call.query.shape[-2] != call.key.shape[-2]
        ):
            raise SbpatchError(
                f"site '{self.name}' was calibrated for self-attention without mask, dropout or grouped heads, and "
                "is now called with one; leave it exact (--exclude) or calibrate on such inputs"
            )
        site, (heads, head_dim) = self.layer.site, (call.query.shape[-3], call.query.shape[-1])
        if (heads, head_dim) != (site.heads, site.head_dim):
            raise SbpatchError(
                f"site '{self.name}' was calibrated with {site.heads} heads of width {site.head_dim} and is now called with "
                f"{heads} of width {head_dim}: the plan was made for another model"
            )
        device = call.query.device.type
        if not torch.is_autocast_enabled(device):
            return self.layer(call.query, call.key, call.value, scale=call.scale)
        kind = torch.get_autocast_dtype(device)  # inputs as autocast gives them to PyTorch's attention, sums in float32
        with torch.autocast(device, enabled=False):
            return self.layer(call.query.to(kind), call.key.to(kind), call.value.to(kind), scale=call.scale)


def swap(model: nn.Module, replacements: Mapping[str, Callable[[Call], Tensor]]) -> None:
    """Let the named sites of `model` compute their replacement, in place. Undone by `restore`.

    Raises:
        SbpatchError: a name is not a module of the model, or is patched already.
    """
    modules = dict(model.named_modules())
    for name in replacements:
        if name not in modules:
            raise SbpatchError(f"the model has no module '{name}': the plan was made for another model")
        if hasattr(modules[name], "sbpatch_original"):
            raise SbpatchError(f"site '{name}' is patched already; call unpatch first")
    for name, replacement in replacements.items():
        module = modules[name]
        # A module goes through nn.Module's registration, so that it moves with the model; it brings no state dict keys.
        module.sbpatch = replacement
        module.__class__ = _patched_class(type(module))  # type: ignore[arg-type]


def restore(model: nn.Module) -> None:
    """Give every swapped site of `model` its own attention back, in place."""
    for module in list(model.modules()):
        if hasattr(module, "sbpatch_original"):
            module.__class__ = module.sbpatch_original  # type: ignore[assignment]
            del module.sbpatch


@contextmanager
def swapped(model: nn.Module, replacements: Mapping[str, Callable[[Call], Tensor]]) -> Iterator[None]:
    """`swap` for the length of a with block."""
    swap(model, replacements)
    try:
        yield
    finally:
        restore(model)
