"""Attention from what a method selected: by the fast form where one fused call can do it, else by the general one."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import fused, kernels, pairwise, stretches
from .core import Expansion, Landmarks, Points, Selection


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    scale: float,
    *,
    key_mask: Tensor | None = None,
    causal: bool = False,
    gain: Tensor | None = None,
    naive: bool = False,
) -> Tensor:
    """Attention of every query over what was selected for it.

    Args:
        q, k, v: (B, H, n_q, d), (B, H_k, n, d) and (B, H_k, n, e), H a multiple of H_k; the logits are scale q.k.
        key_mask: (B, n) bool, True for real keys.
        causal: no query reads a later key.
        gain: (H_k,) nats added to the logits of the low-rank part where there is a sparse one.
        naive: count the low-rank part on the support too, the paper's baseline.

    Returns:
        (B, H, n_q, e) in v's dtype; zeros for a query that no real key is left for.
    """
    tiles, low = selection
    if isinstance(low, Landmarks):
        return fused.over_landmarks(q, v, low)
    form: ModuleType = fused
    over_blocks = stretches.over_blocks
    if kernels.chosen(q) and kernels.chosen(v):
        from .kernels import forms as form

        over_blocks = form.over_blocks
    if isinstance(low, Expansion):
        return over_blocks(q, k, v, low, scale, gain)
    simple = low is None or (
        isinstance(low, Points) and low.ready is None
    )  # else what a row may read differs in a tile
    if simple and low is not None and not tiles:
        return form.over_points(q, low, scale)
    if simple and len(tiles) == 1 and (tiles[0].shared or low is None) and not naive:
        return form.over_tiles(q, k, v, tiles[0], low, scale, key_mask, causal, gain)
    sums = pairwise.split(q, k, v, selection, scale, key_mask, causal, naive)
    return pairwise.merged(*sums, gain).to(v.dtype)
