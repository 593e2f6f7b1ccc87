"""Attention from what a method selected: by the fast form where one fused call can do it, else by the general one."""

from __future__ import annotations

from torch import Tensor

from . import fused, pairwise
from .core import Landmarks, Points, Selection


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
        q, k, v: (B, H, n, d), (B, H_k, n, d) and (B, H_k, n, e), H a multiple of H_k; the logits are scale q.k.
        key_mask: (B, n) bool, True for real keys.
        causal: no query reads a later key.
        gain: (H_k,) nats added to the logits of the low-rank part where there is a sparse one.
        naive: count the low-rank part on the support too, the paper's baseline.

    Returns:
        (B, H, n, e) in v's dtype; zeros for a query that no real key is left for.
    """
    tiles, low = selection
    if isinstance(low, Landmarks):
        return fused.over_landmarks(q, low, v.dtype)
    if isinstance(low, Points) and not tiles and low.ready is None:
        return fused.over_points(q, low, scale)
    points = low if isinstance(low, Points) else None
    ready = points is None or points.ready is None or (tiles and tiles[0].reach is not None)
    if len(tiles) == 1 and (tiles[0].shared or low is None) and points is low and ready and not naive:
        return fused.over_tiles(q, k, v, tiles[0], points, scale, key_mask, causal, gain)
    sums = pairwise.split(q, k, v, selection, scale, key_mask, causal, naive)
    return pairwise.merged(*sums, gain).to(v.dtype)
