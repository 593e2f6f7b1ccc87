"""How far an approximation is from the exact attention of a call, and how diffuse that attention is."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import Scatterbrain
from .sites import Call


def output_error(output: Tensor, exact: Tensor) -> Tensor:
    """||O' - O||_F / ||O||_F per sample and head: (B, H, n, d) twice -> (B, H)."""
    difference = torch.linalg.vector_norm((output - exact).float(), dim=(-2, -1))
    return difference / torch.linalg.vector_norm(exact.float(), dim=(-2, -1)).clamp(min=1e-30)


def matrix_error(layer: Scatterbrain, call: Call, columns: int = 256) -> Tensor:
    """||A' - A||_F / ||A||_F of the normalised attention per sample and head, (B, H), without holding either matrix.

    Columns of A' are what the layer gives for columns of the identity as values.
    """
    q, k, n = call.query.float(), call.key.float(), call.key.shape[-2]
    log_sum = torch.cat([(rows @ k.mT * call.softmax_scale).logsumexp(-1) for rows in q.split(256, 2)], 2)[..., None]
    wrong, whole = torch.zeros(2, *q.shape[:2], device=q.device)
    for first in range(0, n, columns):
        column = torch.arange(first, min(first + columns, n), device=q.device)
        part = (torch.arange(n, device=q.device)[:, None] == column).float().expand(*q.shape[:2], -1, -1)
        exact = (q @ k[:, :, first : first + columns].mT * call.softmax_scale - log_sum).exp()
        found = layer(call.query, call.key, part.to(call.query.dtype), scale=call.scale).float()
        wrong += (found - exact).square().sum((-2, -1))
        whole += exact.square().sum((-2, -1))
    return (wrong / whole).sqrt()


def row_entropy(call: Call, rows: int = 256) -> Tensor:
    """Entropy in nats of the exact attention, mean over `rows` evenly spaced query rows: (B, H)."""
    n = call.query.shape[-2]
    index = torch.arange(min(rows, n), device=call.query.device) * n // min(rows, n)
    logits = call.query.index_select(2, index).float() @ call.key.float().mT * call.softmax_scale
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean(-1)
