"""One attention call, caught on its way to PyTorch: its arguments, its mask in plain form, and the catching itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..attention import masks
from ..attention.core import captured, query_mask
from ..errors import SbpatchError
from .products import product

SDPA = F.scaled_dot_product_attention
MULTI_HEAD = F.multi_head_attention_forward  # what nn.MultiheadAttention runs; its own call of SDPA no mode can see


@dataclass(frozen=True)
class Call:
    """The arguments of one attention call, as PyTorch names them; q is (B, H, n, d), k and v too or of fewer heads.

    `key_mask` (B, n), True for real keys, says what `attn_mask` said once the call is in plain form; never both.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    key_mask: Tensor | None = None

    @property
    def softmax_scale(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def query_mask(self) -> Tensor | None:
        """Which queries are real, (B, n) bool: those of the real keys' tokens; None where all are, or nothing is known."""
        return query_mask(self.query, self.key_mask, self.key)

    def exact(self) -> Tensor:
        """What the model itself computes here."""
        mask, causal = self.attn_mask, self.is_causal
        if self.key_mask is not None:
            pairs = (self.query.shape[-2], self.key.shape[-2])
            mask, causal = masks.allowed(self.key_mask, self.is_causal, *pairs), False
        return SDPA(
            self.query, self.key, self.value, attn_mask=mask, dropout_p=self.dropout_p, is_causal=causal,
            scale=self.scale, enable_gqa=self.enable_gqa,
        )  # fmt: skip

    def through(self, layer: Callable[..., Tensor]) -> Tensor:
        """What an attention layer makes of the call, which is in plain form."""
        return layer(self.query, self.key, self.value, key_mask=self.key_mask, scale=self.scale)

    def causality(self) -> bool | None:
        """Whether the call is causal, by its flag or its mask; None where it is not plain attention but for padding."""
        if self.attn_mask is None:
            return self.is_causal
        for causal in (False, True):
            if masks.is_plain(self.attn_mask, self._key_mask(self.attn_mask), causal, self.query.shape[-2]):
                return causal
        return None

    def reach(self) -> int | None:
        """How far its mask lets tokens read, where that makes it local attention (see `masks.reach`); else None."""
        return None if self.attn_mask is None or self.causality() is not None else masks.reach(self.attn_mask)

    def looks_back(self) -> bool:
        """Whether no token of a call with a local mask reads a later one; rows of padding, open to all keys, apart."""
        return self.attn_mask is not None and masks.looks_back(self.attn_mask)

    def plain(self, causal: bool) -> Call:
        """The same call without a mask of pairs: what it says is in `key_mask` and `is_causal`.

        Where nothing of the mask's values may be asked, under compilation, export and the capture of a CUDA graph, it is
        trusted.

        Raises:
            SbpatchError: the call is causal and should not be or the reverse, or its mask says more than padding does.
        """
        if self.attn_mask is None:
            if self.is_causal != causal:
                called, not_as = ("causal", "without") if self.is_causal else ("not causal", "as causal")
                raise SbpatchError(f"attention is called {called}, and was calibrated {not_as}")
            return self
        key_mask = self._key_mask(self.attn_mask)
        asked = not (torch.compiler.is_compiling() or captured(self.query.device))
        if masks.is_bias(self.attn_mask) or (
            asked and not masks.is_plain(self.attn_mask, key_mask, causal, self.query.shape[-2])
        ):
            kind = "causal attention with padding" if causal else "padding"
            raise SbpatchError(f"attention is called with a mask or bias that is not {kind} alone")
        padded = not (asked and bool(key_mask.all()))
        return replace(self, attn_mask=None, is_causal=causal, key_mask=key_mask if padded else None)

    def _key_mask(self, mask: Tensor) -> Tensor:
        return masks.real_keys(mask, self.query.shape[0], self.key.shape[-2])


Replacement = Callable[[Call], Tensor]


class Redirect(TorchFunctionMode):
    """While active, attention calls go to `replacement`; calls made inside it reach PyTorch as usual.

    A call is that of scaled_dot_product_attention by a module or by nn.MultiheadAttention, or what a module writes out as
    softmax(Q K^T scale) V (see products).
    """

    def __init__(self, replacement: Replacement) -> None:
        super().__init__()
        self.replacement = replacement
        self.attending = False  # a Product attends outside of any torch function, where the mode is still on

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.attending:
            return func(*args, **kwargs)
        if func is SDPA:
            return self.attend(Call(*args, **kwargs))
        if func is MULTI_HEAD:
            return multi_head(self.attend, *args, **kwargs)
        result = product(self._attend_product, func, args, kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result

    def attend(self, call: Call) -> Tensor:
        self.attending = True
        try:
            return self.replacement(call)
        finally:
            self.attending = False

    def _attend_product(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if query.ndim == 4:
            return self.attend(Call(query, key, value, scale=scale))
        q, k, v = (x[:, None] for x in (query, key, value))  # one head
        return self.attend(Call(q, k, v, scale=scale))[:, 0].contiguous()  # as bmm gives it


# -- nn.MultiheadAttention -------------------------------------------------------------------------------------------


def multi_head_reason(query: Tensor, static_k: Tensor | None, bias_k: Tensor | None, zero: bool, weights: bool) -> str:
    """Why the call inside nn.MultiheadAttention cannot be had, or nothing."""
    if weights:
        return "nn.MultiheadAttention with need_weights=True, which returns the attention matrix itself"
    if query.ndim != 3:
        return "nn.MultiheadAttention without a batch dimension"
    if static_k is not None or bias_k is not None or zero:
        return "nn.MultiheadAttention with added or static keys"
    return ""


def multi_head(
    attend: Replacement,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """F.multi_head_attention_forward with `attend` for its attention: query (n, B, width) -> ((n, B, width), None).

    Where `multi_head_reason` has one, PyTorch's own runs, untouched.
    """
    weights = options.get("need_weights", True)
    if multi_head_reason(query, options.get("static_k"), bias_k, add_zero_attn, weights):
        return MULTI_HEAD(
            query, key, value, embed_dim, heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn, dropout_p,
            out_proj_weight, out_proj_bias, **options,
        )  # fmt: skip
    if options.get("use_separate_proj_weight"):
        projections = [options[f"{name}_proj_weight"] for name in "qkv"]
    else:
        assert in_proj_weight is not None
        projections = list(in_proj_weight.chunk(3))
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)  # (n, B, width) -> (B, H, n, d)
        for x, w, b in zip((query, key, value), projections, biases, strict=True)
    )
    padding, mask, causal = options.get("key_padding_mask"), options.get("attn_mask"), options.get("is_causal", False)
    if causal and padding is None:
        mask = None  # the flag says what the mask says
    else:
        mask, causal = _joined(mask, padding, heads, q.dtype), False
    dropout = dropout_p if options.get("training", True) else 0.0
    found = attend(Call(q, k, v, mask, dropout, causal))
    return F.linear(found.permute(2, 0, 1, 3).flatten(-2), out_proj_weight, out_proj_bias), None


def _joined(mask: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """nn.MultiheadAttention's masks, in which True hides, as one that SDPA takes: float, (B or 1, H or 1, n or 1, n)."""
    found: Tensor | None = None
    if mask is not None:  # (n, n) or (B * H, n, n)
        found = _as_bias(mask, dtype)
        found = found[None, None] if found.ndim == 2 else found.unflatten(0, (-1, heads))
    if padding is not None:  # (B, n)
        hidden = _as_bias(padding, dtype)[:, None, None, :]
        found = hidden if found is None else found + hidden
    return found


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
