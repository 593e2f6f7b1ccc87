"""Keys and values that know where they are held: PyTorch's attention called on them is computed by their holder."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

METADATA = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")}
METADATA |= {Tensor.size, Tensor.dim}


class Holder(Protocol):
    """What holds keys and values, in an order of its own."""

    def attend(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
        """Attention over all that is held, or None where it can only be had over what `in_time` gives."""

    def in_time(self, held: Tensor) -> Tensor:
        """Keys or values in the order in which they came."""


class Held(Tensor):
    """Keys or values of a `Holder`, given to one call of attention."""

    layer: Holder

    @classmethod
    def of(cls, tensor: Tensor, layer: Holder) -> Held:
        held = tensor.as_subclass(cls)
        held.layer = layer
        return held

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in METADATA:
                return func(*args, **kwargs)
            if func is F.scaled_dot_product_attention:
                return _attention(*args, **kwargs)
            return func(*(_plain(x) for x in args), **{name: _plain(x) for name, x in kwargs.items()})


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's attention, one argument of which is held by a layer."""
    if isinstance(key, Held) and isinstance(value, Held) and not dropout_p and not is_causal:
        found = key.layer.attend(query, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)
        if found is not None:
            return found
    return F.scaled_dot_product_attention(
        query, _plain(key), _plain(value), attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
        enable_gqa=enable_gqa,
    )  # fmt: skip


def _plain(x: Any) -> Any:
    """What a layer holds, in the order of time."""
    if isinstance(x, list | tuple):
        return type(x)(_plain(y) for y in x)
    return x.layer.in_time(x.as_subclass(Tensor)) if isinstance(x, Held) else x
