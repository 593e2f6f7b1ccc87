"""Swap what attention sites compute, reversibly.

A module of transformers is told by its configuration where its attention is computed (see interface). Any other site's module
gets a subclass of its class, whose forward runs with its attention call redirected to a replacement. Nothing else of the model
is copied or rewritten, and its state dict keeps its keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.core import captured
from ..attention.per_head import Layer, PerHead
from ..errors import SbpatchError
from . import graphs, interface
from .calls import Call, Redirect
from .graphs import Replays
from .products import multiplied_out


@cache
def _patched_class(cls: Any) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        caught: list[bool] = []  # a list, as torch.compile reads no attribute back from a mode

        def attend(call: Call) -> Tensor:
            caught.append(True)
            return self.sbpatch(call)

        with Redirect(attend):
            output = multiplied_out(cls.forward(self, *args, **kwargs))
        if not caught:
            raise SbpatchError(
                f"a patched {cls.__name__} computed its attention in another way than at calibration (asked for its weights, "
                "or in training with dropout?); leave it exact (--exclude)"
            )
        return output

    return type(cls.__name__, (cls,), {"forward": forward, "sbpatch_original": cls, "__module__": cls.__module__})


class PatchedSite(nn.Module):
    """What a patched site computes: checks that the call is the one it was calibrated for, then runs the layer.

    A causal site that is called with sequences of 1.5 times the length it was calibrated for, or more, runs a layer that
    reads the same share of the keys, by powers of two of the length (see `Part.longer`). Shorter ones run the layer as it is,
    or exact attention where that reads fewer keys. Sequences longer than `reach`, of a site with a window, are exact: there
    the site is local, and reads few keys. With `graphs`, calls of a shape that came before are replays on a CUDA device.
    """

    def __init__(self, name: str, layer: Layer | PerHead, reach: int | None = None, graphs: bool = False) -> None:
        super().__init__()
        self.name, self.layer, self.reach, self.graphs = name, layer, reach, graphs
        self._longer: dict[tuple[int, torch.device], Layer | PerHead] = {}
        self._replays = Replays()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PatchedSite:
        """Follow the model to another device, but not into half precision: layers read their tables as float32."""
        self._replays.clear()
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def layer_for(self, keys: int, device: torch.device) -> Layer | PerHead:
        """The layer for a sequence of so many tokens, made when it is first asked for.

        Raises:
            SbpatchError: it would have to be made while the model is compiled or exported.
        """
        site = self.layer.site
        if not site.causal or 2 * keys < 3 * site.tokens:
            return self.layer
        times = 2 ** round(math.log2(keys / site.tokens))
        if (times, device) not in self._longer:
            if torch.compiler.is_compiling():
                raise SbpatchError(
                    f"site '{self.name}' was calibrated at {site.tokens} tokens and is compiled with {keys}: run the model "
                    "once at this length before, or calibrate with --length"
                )
            self._longer[times, device] = self.layer.longer(times).to(device)
        return self._longer[times, device]

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
        if (queries != keys and not site.queries) or call.dropout_p:
            raise SbpatchError(
                f"site '{self.name}' was calibrated for self-attention without dropout, and is now called with "
                f"{f'dropout {call.dropout_p:g}' if call.dropout_p else f'{queries} queries and {keys} keys'}; leave it "
                "exact (--exclude), or set its dropout to 0"
            )
        if self.reach is not None and keys > self.reach:
            return call.exact()
        layer = self.layer_for(keys, call.query.device)
        if min(queries, (keys + 1) / 2 if site.causal else keys) <= layer.stored:
            # A row reads fewer keys than the layer would store for it, or is one of few that read them.
            return call.exact()
        try:
            call = call.plain(site.causal)
        except SbpatchError as error:
            raise SbpatchError(f"site '{self.name}': {error}; leave it exact (--exclude)") from error
        if site.causal and call.key_mask is not None and (groups := _alike(call.key_mask)):
            return self._apart(call, groups)
        device = call.query.device.type
        if not torch.is_autocast_enabled(device):
            return self._attend(layer, call)
        kind = torch.get_autocast_dtype(device)  # inputs as autocast gives them to PyTorch's attention, sums in float32
        with torch.autocast(device, enabled=False):
            q, k, v = (x.to(kind) for x in (call.query, call.key, call.value))
            return self._attend(layer, replace(call, query=q, key=k, value=v))

    def _attend(self, layer: Layer | PerHead, call: Call) -> Tensor:
        """The layer's attention, on a CUDA device as a replay where that can be."""
        inputs = (call.query, call.key, call.value)
        if self.graphs and call.key_mask is None and graphs.possible(*inputs):
            return self._replays.attend(layer, *inputs, call.scale)
        return call.through(layer)

    def _apart(self, call: Call, groups: Mapping[tuple[int, int], list[int]]) -> Tensor:
        """Prompts of unequal length, each as if it stood alone: its tiles begin where it begins, and a short one is exact.

        `groups` has the samples whose tokens are those from the first to the second number. Padding gets zeros.
        """
        out: Tensor | None = None
        for (start, stop), rows in groups.items():
            q, k, v = (x[rows, :, start:stop] for x in (call.query, call.key, call.value))
            alone = replace(call, query=q, key=k, value=v, is_causal=True, key_mask=None)
            found = self(alone)
            if out is None:
                out = found.new_zeros(*call.query.shape[:-1], found.shape[-1])
            out[rows, :, start:stop] = found
        assert out is not None
        return out


def _alike(key_mask: Tensor) -> dict[tuple[int, int], list[int]]:
    """Samples by where their real tokens begin and end; none where some are not one stretch, or values may not be asked."""
    if torch.compiler.is_compiling() or captured(key_mask.device):
        return {}
    ones = key_mask.to(torch.uint8)
    start, stop = ones.argmax(-1), ones.shape[-1] - ones.flip(-1).argmax(-1)
    count = ones.sum(-1)
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (first, end, tokens) in enumerate(torch.stack((start, stop, count), dim=1).tolist()):
        if tokens not in (0, end - first):
            return {}
        if tokens:
            groups.setdefault((first, end), []).append(row)
    return groups


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
        if (config := interface.redirected(module)) is not None:
            _change(module, "config", config)
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
