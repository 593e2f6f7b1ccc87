"""Plain dense versions: exact attention, and the Scatterbrain matrix by its definition. Slow, n x n, easy to trust."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Joined
from .scatterbrain import Scatterbrain


def allowed_pairs(
    n: int, causal: bool, key_mask: Tensor | None, device: torch.device, rows: int | None = None
) -> Tensor:
    """Pairs that attention may use at all, bool (1 or B, 1, rows, n): real keys, and the past where causal.

    `rows` are the queries, where not as many as the n keys.
    """
    pairs = torch.ones(1, 1, n if rows is None else rows, n, dtype=torch.bool, device=device)
    if causal:
        pairs = pairs.tril()
    return pairs if key_mask is None else pairs & key_mask[:, None, None, :]


def exact_matrix(q: Tensor, k: Tensor, scale: float, causal: bool = False, key_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale) over the allowed pairs, (B, H, n, n) float64; a row without any is zero."""
    pairs = allowed_pairs(k.shape[-2], causal, key_mask, q.device, q.shape[-2])
    logits = (q.double() @ k.double().mT * scale).masked_fill(~pairs, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0)


def scatterbrain_matrix(
    layer: Scatterbrain, q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None = None
) -> Tensor:
    """A' of `layer`: exp(q.k) on the support and L elsewhere (eq. 1), rows normalised; (B, H, n, n) float64.

    L carries the layer's gain. A naive sum keeps L on the support too; a whole method gives its own matrix.

    The unnormalised entries are formed as they stand, so the logits must be moderate (below some hundreds).
    """
    half = scale**0.5
    q, k = q * half, k * half
    part = layer.low_rank
    if part is not None and part.kind == "whole":
        return part.dense(q, k, key_mask)
    pairs = allowed_pairs(k.shape[-2], layer.site.causal, key_mask, q.device, q.shape[-2])
    entries = torch.zeros(*q.shape[:2], *pairs.shape[-2:], dtype=torch.float64, device=q.device)
    if part is not None:
        entries = part.dense(q, k, key_mask)
    support = None
    if isinstance(part, Joined):
        support = part.pairs(q, k, key_mask)
    elif layer.support is not None:
        support = layer.support.dense(q, k, key_mask)
    if support is not None:
        if not layer.naive:  # where L is signed and does not leave a positive remainder, there is none
            rest = entries.masked_fill(support | ~pairs, 0).sum(-1, keepdim=True)
            entries = entries.masked_fill(rest <= 0, 0)
        if layer.gain is not None:
            gain = layer.gain.repeat_interleave(q.shape[1] // len(layer.gain))  # of heads, or of key heads
            entries = entries * gain.double().exp()[:, None, None]
        exact = (q.double() @ k.double().mT).exp()
        entries = torch.where(support, exact + entries if layer.naive else exact, entries)
    entries = entries.masked_fill(~pairs, 0)
    return entries / entries.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
