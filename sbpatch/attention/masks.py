"""Attention masks as models hand them to PyTorch, and the padding and causality that most of them say.

A mask broadcasts to (B, H, queries, keys). Bool: True where a pair is used. Float: added to the logits, so 0 where a pair is
used and `HIDDEN` or less (minus infinity, the dtype's lowest number) where it is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN = -1e4


def allowed(key_mask: Tensor, causal: bool, queries: int, keys: int) -> Tensor:
    """The pairs that real keys and causality leave: key_mask (B, n) -> bool (B, 1, 1 or queries, keys)."""
    pairs = key_mask[:, None, None, :]
    if causal:
        pairs = pairs & torch.ones(queries, keys, dtype=torch.bool, device=key_mask.device).tril()
    return pairs


def real_keys(mask: Tensor, batch: int, keys: int) -> Tensor:
    """The keys that the last query uses, bool (B, keys): all real ones, where the mask is padding, causal or not.

    No branch depends on the mask's values, so that this can be compiled and exported.
    """
    last = _four(mask)[:, 0, -1, :]
    return (last if last.dtype == torch.bool else last > HIDDEN).expand(batch, keys)


def is_bias(mask: Tensor) -> bool:
    """Whether a mask adds numbers head by head: a learned bias, whatever it holds at the moment (some begin as zeros)."""
    mask = _four(mask)
    return mask.is_floating_point() and mask.shape[1] > 1 and mask.stride(1) != 0


def is_plain(mask: Tensor, key_mask: Tensor, causal: bool, queries: int) -> bool:
    """Whether a mask says no more than `key_mask` (B, keys) and causality do.

    Rows that are left without any key may say anything: some libraries open such rows to avoid NaN.
    """
    if is_bias(mask):
        return False
    mask = _four(mask)
    if mask.stride(-2) == 0:
        mask = mask[..., :1, :]  # expanded over the queries
    pairs = allowed(key_mask, causal, queries, key_mask.shape[-1])
    empty = ~pairs.any(-1, keepdim=True)
    same = mask == pairs if mask.dtype == torch.bool else torch.where(pairs, mask == 0, mask <= HIDDEN)
    return bool((same | empty).all())


def _four(mask: Tensor) -> Tensor:
    """(keys,) up to (B, H, queries, keys) -> four dimensions."""
    return mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)) if mask.ndim < 4 else mask
