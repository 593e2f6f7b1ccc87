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


def _logits(call: Call, rows: Tensor, columns: Tensor) -> Tensor:
    """q.k of the call for these query rows and key columns, (B, H, rows, columns) float32; -inf where the call is causal."""
    q, k = call.query.index_select(2, rows).float(), call.key.index_select(2, columns).float()
    logits = q @ k.mT * call.softmax_scale
    return logits.masked_fill(columns[None, :] > rows[:, None], -torch.inf) if call.is_causal else logits


def matrix_error(layer: Scatterbrain, call: Call, columns: int = 256) -> Tensor:
    """||A' - A||_F / ||A||_F of the normalised attention per sample and head, (B, H), without holding either matrix.

    Columns of A' are what the layer gives for columns of the identity as values.
    """
    heads = call.query.shape[:2]
    every = torch.arange(call.key.shape[-2], device=call.query.device)
    log_sum = torch.cat([_logits(call, rows, every).logsumexp(-1) for rows in every.split(columns)], 2)[..., None]
    wrong, whole = torch.zeros(2, *heads, device=every.device)
    for column in every.split(columns):
        part = (every[:, None] == column).to(call.query.dtype).expand(*heads, -1, -1)
        exact = (_logits(call, every, column) - log_sum).exp()
        found = layer(call.query, call.key, part, scale=call.scale).float()
        wrong += (found - exact).square().sum((-2, -1))
        whole += exact.square().sum((-2, -1))
    return (wrong / whole).sqrt()


def row_entropy(call: Call, rows: int = 256) -> Tensor:
    """Entropy in nats of the exact attention, mean over `rows` evenly spaced query rows: (B, H)."""
    n = call.key.shape[-2]
    every = torch.arange(n, device=call.query.device)
    index = torch.arange(min(rows, n), device=call.query.device) * n // min(rows, n)
    log_p = _logits(call, index, every).log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1).mean(-1)  # 0 ln 0 = 0
