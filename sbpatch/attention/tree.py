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


def centred(x: Tensor, real: Tensor) -> Tensor:
    """Rows x (B, H, n, d) less the mean of the real ones, real (B, 1, n, 1); zeros at padding. Float32, without gradients."""
    x = x.detach().float()
    return (x - (x * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp(min=1)) * real


def balanced_tree(x: Tensor, leaf: int, mask: Tensor | None = None) -> Tensor:
    """Tokens in leaves of `leaf`, neighbours in neighbouring leaves: x (B, H, n, d), mask (B, n) -> (B, H, leaves, leaf).

    Padding sorts last. Entries of n and above are empty slots; they and the padding fill the last leaves.
    """
    batch, _, n, width = x.shape
    real = torch.ones(batch, n, dtype=torch.bool, device=x.device) if mask is None else mask
    real = real[:, None, :, None]
    x = centred(x, real)
    return split_evenly(x @ principal_axes(x, min(AXES, width)), leaf, real)


def split_evenly(point: Tensor, leaf: int, real: Tensor) -> Tensor:
    """Points (B, H, n, axes) in leaves of `leaf`: indices (B, H, leaves, leaf), see `balanced_tree`; real (B, 1, n, 1).

    A k-d tree (Bentley, 1975): each node is sorted along the one of its axes on which it varies most, and halved.
    """
    batch, heads, n, axes = point.shape
    levels = max(0, math.ceil(math.log2(n / leaf)))
    slots = leaf * 2**levels
    real = F.pad(real.expand(-1, heads, -1, -1), (0, 0, 0, slots - n))[:, :, None]  # (B, H, nodes, slots a node, 1)
    point = F.pad(point, (0, 0, 0, slots - n))[:, :, None]  # padding: zeros
    index = torch.arange(slots, device=point.device).expand(batch, heads, 1, -1)
    for _ in range(levels):
        size = real.sum(-2).clamp(min=1)
        spread = point.square().sum(-2) - point.sum(-2).square() / size
        axis = spread.argmax(-1)[..., None, None].expand(*point.shape[:-1], 1)
        value = point.gather(-1, axis).masked_fill(~real, torch.inf)
        order = value.squeeze(-1).argsort(-1)  # (B, H, nodes, slots a node)
        first = order.shape[-1] * torch.arange(order[..., 0].numel(), device=order.device).view(*order.shape[:-1], 1)
        flat = (order + first).reshape(-1)
        half = (*order.shape[:-2], 2 * order.shape[-2], order.shape[-1] // 2)
        index = index.reshape(-1).index_select(0, flat).view(half)
        point = point.reshape(-1, axes).index_select(0, flat).view(*half, axes)
        real = real.reshape(-1, 1).index_select(0, flat).view(*half, 1)
    return index
