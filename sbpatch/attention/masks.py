"""Attention masks as models hand them to PyTorch, and the padding and causality that most of them say.

A mask broadcasts to (B, H, queries, keys). Bool: True where a pair is used. Float: added to the logits, so 0 where a pair is
used and `HIDDEN` or less (minus infinity, the dtype's lowest number) where it is not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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

    Rows that are left without any key may be closed, or open to all keys or to their own: some libraries open such rows to
    avoid NaN. One that reads anything else is no row of padding (a mask in chunks looks like padding to its last row).
    """
    if is_bias(mask):
        return False
    mask = _four(mask)
    if mask.stride(-2) == 0:
        mask = mask[..., :1, :]  # expanded over the queries
    pairs = allowed(key_mask, causal, queries, key_mask.shape[-1])
    empty = ~pairs.any(-1)
    same = mask == pairs if mask.dtype == torch.bool else torch.where(pairs, mask == 0, mask <= HIDDEN)
    if not bool((same | empty[..., None]).all()):
        return False
    return not bool(empty.any()) or bool((_opened(_used(mask)) | ~empty).all())


def reach(mask: Tensor) -> int | None:
    """How far a local mask lets tokens read, in tokens, their own counted; None where the mask is not local.

    Local: every token reads one stretch of the real keys around it, and none as far as the longest sample has real keys. So
    are sliding windows, causal or not, and sequences in chunks. Rows without any key, or open to all, are taken for padding.
    """
    mask = _four(mask)
    if is_bias(mask) or mask.shape[-2] != mask.shape[-1]:
        return None
    if mask.shape[1] > 1 and not bool((mask == mask[:, :1]).all()):
        return None
    mask = mask[:, 0]
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask <= HIDDEN)).all()):
        return None
    used, n = _used(mask), mask.shape[-1]  # (B, n, n)
    count = used.sum(-1)
    real = (used & (count < n)[..., None]).any(-2)  # (B, n)
    some = (count > 0) & ((count < n) | real)
    first = used.to(torch.uint8).argmax(-1)  # of several largest, the first
    last = n - 1 - used.flip(-1).to(torch.uint8).argmax(-1)
    before = F.pad(real.cumsum(-1), (1, 0))  # (B, n + 1): real keys before each
    stretch = before.gather(-1, last + 1) - before.gather(-1, first)
    if not bool((some & (stretch == count) | ~some).all()):
        return None
    row = torch.arange(n, device=mask.device)
    found = 1 + int((torch.maximum(row - first, last - row) * some).amax())
    return found if bool(some.any()) and found < int(real.sum(-1).amax()) else None


def looks_back(mask: Tensor) -> bool:
    """Whether no row reads a later key than its own; rows that are open to all keys apart."""
    used = _used(_four(mask)[:, 0])
    closed = ~used.all(-1, keepdim=True)
    return not bool((used.triu(1) & closed).any())


def _used(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def _opened(used: Tensor) -> Tensor:
    """Rows (..., queries) of (..., queries, keys) that read nothing, everything, or their own key alone."""
    queries, keys = used.shape[-2:]
    count = used.sum(-1)
    found = (count == 0) | (count == keys)
    return found | (count == 1) & used.diagonal(dim1=-2, dim2=-1) if queries == keys else found


def _four(mask: Tensor) -> Tensor:
    """(keys,) up to (B, H, queries, keys) -> four dimensions."""
    return mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)) if mask.ndim < 4 else mask
