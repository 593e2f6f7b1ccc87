"""A balanced tree over tokens: equal groups of tokens that lie close together, with shapes that depend on n alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

AXES = 8  # principal axes a split may use; with 32 the groups were no better
STEPS = 4  # of power iteration for each


def principal_axes(x: Tensor, count: int) -> Tensor:
    """The first directions of largest variance of centred rows x (B, H, n, d) -> (B, H, d, count), by deflation."""
    rest = x.mT @ x  # (B, H, d, d)
    axes: list[Tensor] = []
    for _ in range(count):
        start = rest.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
        axis = rest.gather(-1, start.expand(*rest.shape[:-1], 1))  # (B, H, d, 1)
        for _ in range(STEPS):
            axis = rest @ (axis / torch.linalg.vector_norm(axis, dim=-2, keepdim=True).clamp(min=1e-30))
        value = torch.linalg.vector_norm(axis, dim=-2, keepdim=True)
        axis = axis / value.clamp(min=1e-30)
        rest = rest - value * axis * axis.mT
        axes.append(axis)
    return torch.cat(axes, dim=-1)


def balanced_tree(x: Tensor, leaf: int, mask: Tensor | None = None) -> Tensor:
    """Tokens in leaves of `leaf`, neighbours in neighbouring leaves: x (B, H, n, d), mask (B, n) -> (B, H, leaves, leaf).

    A k-d tree (Bentley, 1975): each node is sorted along the one of its principal axes on which it varies most, and halved.
    Padding sorts last. Entries of n and above are empty slots; they and the padding fill the last leaves.
    """
    batch, heads, n, width = x.shape
    levels = max(0, math.ceil(math.log2(n / leaf)))
    real = torch.ones(batch, n, dtype=torch.bool, device=x.device) if mask is None else mask
    real = real[:, None, :, None]
    x = x.detach().float()
    x = (x - (x * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp(min=1)) * real
    slots = leaf * 2**levels
    real = F.pad(real.expand(-1, heads, -1, -1), (0, 0, 0, slots - n))[:, :, None]  # (B, H, nodes, slots a node, 1)
    point = F.pad(x @ principal_axes(x, min(AXES, width)), (0, 0, 0, slots - n))[:, :, None]  # padding: zeros
    index = torch.arange(slots, device=x.device).expand(batch, heads, 1, -1)
    for _ in range(levels):
        count = real.sum(-2).clamp(min=1)
        spread = point.square().sum(-2) - point.sum(-2).square() / count
        axis = spread.argmax(-1)[..., None, None].expand(*point.shape[:-1], 1)
        order = point.gather(-1, axis).masked_fill(~real, torch.inf).squeeze(-1).argsort(-1)
        index = index.gather(-1, order).unflatten(-1, (2, -1)).flatten(2, 3)
        both = [x.gather(-2, order[..., None].expand(*order.shape, x.shape[-1])) for x in (point, real)]
        point, real = (x.unflatten(-2, (2, -1)).flatten(2, 3) for x in both)
    return index
