"""Attention from what a method selected: by the fast form where one fused call can do it, else by the general one."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import fused, kernels, pairwise
from .core import Expansion, Landmarks, Points, Selection, Stretches
from .patterns import listed
from .stretches import over_stretches


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
    selected, low = selection
    if isinstance(low, Landmarks):
        return fused.over_landmarks(q, v, low)
    form: ModuleType = fused
    if kernels.chosen(q) and kernels.chosen(v):
        from .kernels import forms as form
    whole = form is fused and not torch.compiler.is_exporting()  # files hold the form that more runtimes read
    if isinstance(low, Expansion):
        if whole:
            return over_stretches(q, k, v, low.read, low, scale, key_mask, gain)
        return form.over_blocks(q, k, v, low, scale, gain)
    if whole and low is None and len(selected) == 1 and isinstance(selected[0], Stretches):
        return over_stretches(q, k, v, selected[0], None, scale, key_mask, None)
    tiles = [listed(one, k.shape[2]) if isinstance(one, Stretches) else one for one in selected]
    # Else what a row may read differs in a tile.
    simple = low is None or (isinstance(low, Points) and low.ready is None)
    if simple and low is not None and not tiles:
        return form.over_points(q, low, scale)
    if simple and len(tiles) == 1 and (tiles[0].shared or low is None) and not naive:
        return form.over_tiles(q, k, v, tiles[0], low, scale, key_mask, causal, gain)
    sums = pairwise.split(q, k, v, selection, scale, key_mask, causal, naive)
    return pairwise.merged(*sums, gain).to(v.dtype)
