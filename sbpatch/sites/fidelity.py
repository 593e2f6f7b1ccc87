"""How far an approximation is from the exact attention of a call, and what that attention is like."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attention.core import repeated
from .calls import Call

SINKS = 4  # first tokens, on which models park attention that has nowhere to go
NEAR = 64  # nearest tokens, for locality
COLUMNS = 1024  # of a matrix whose errors are added up: of longer calls that many at even strides


def output_error(output: Tensor, exact: Tensor, real: Tensor | None = None) -> Tensor:
    """||O' - O||_F / ||O||_F per sample and head: (B, H, n, d) twice -> (B, H); rows of padding (real (B, n)) left out."""
    difference, exact = (output - exact).float(), exact.float()
    if real is not None:
        difference, exact = (x.masked_fill(~real[:, None, :, None], 0) for x in (difference, exact))
    return torch.linalg.vector_norm(difference, dim=(-2, -1)) / torch.linalg.vector_norm(exact, dim=(-2, -1)).clamp(
        min=1e-30
    )


def all_heads(call: Call) -> Call:
    """The call with as many key as query heads."""
    k, v = (repeated(x, call.query.shape[1]) for x in (call.key, call.value))
    return Call(call.query, k, v, is_causal=call.is_causal, scale=call.scale, key_mask=call.key_mask)


def _logits(call: Call, rows: Tensor, columns: Tensor) -> Tensor:
    """q.k of a plain call for these query rows and key columns, (B, H, rows, columns) float32; -inf where hidden."""
    q, k = call.query.index_select(2, rows).float(), call.key.index_select(2, columns).float()
    logits = q @ k.mT * call.softmax_scale
    if call.key_mask is not None:
        logits = logits.masked_fill(~call.key_mask[:, None, None, columns], -torch.inf)
    return logits.masked_fill(columns[None, :] > rows[:, None], -torch.inf) if call.is_causal else logits


def matrix_error(layer: nn.Module, call: Call, columns: int = 256) -> Tensor:
    """||A' - A||_F / ||A||_F of the normalised attention per sample and head, (B, H), without holding either matrix.

    Columns of A' are what the layer gives for columns of the identity as values. Rows of padding are left out. Of calls longer
    than `COLUMNS` tokens, it is an estimate by that many columns.
    """
    call = all_heads(call)
    heads = call.query.shape[:2]
    every = torch.arange(call.key.shape[-2], device=call.query.device)
    queries = torch.arange(call.query.shape[-2], device=call.query.device)
    real = None if call.query_mask is None else call.query_mask[:, None, :, None]
    log_sum = torch.cat([_logits(call, rows, every).logsumexp(-1) for rows in queries.split(columns)], 2)[..., None]
    wrong, whole = torch.zeros(2, *heads, device=every.device)
    count = min(len(every), COLUMNS)
    chosen = torch.arange(count, device=every.device) * len(every) // count
    for column in chosen.split(columns):
        part = (every[:, None] == column).to(call.query.dtype).expand(*heads, -1, -1)
        exact = (_logits(call, queries, column) - log_sum).exp()
        found = layer(call.query, call.key, part, key_mask=call.key_mask, scale=call.scale).float()
        if real is not None:
            exact, found = exact.masked_fill(~real, 0), found.masked_fill(~real, 0)
        wrong += (found - exact).square().sum((-2, -1))
        whole += exact.square().sum((-2, -1))
    return (wrong / whole).sqrt()


FIGURES = ("entropy", "logit_spread", "sink_mass", "locality")  # of `head_profile`


def head_profile(call: Call, rows: int = 256) -> dict[str, Tensor]:
    """What the exact attention of each head is like, means over `rows` evenly spaced query rows: {name: (B, H)}.

    Where queries and keys are of different numbers, near to a query are the keys as far along theirs as it is along its own.

    `entropy` in nats; `logit_spread`, the standard deviation of a row's logits; `sink_mass` and `locality`, the shares of the
    attention that the first `SINKS` and the `NEAR` nearest tokens get. Rows of padding are left out.
    """
    call = all_heads(call)
    n, queries, device = call.key.shape[-2], call.query.shape[-2], call.query.device
    every = torch.arange(n, device=device)
    index = torch.arange(min(rows, queries), device=device) * queries // min(rows, queries)
    logits = _logits(call, index, every)
    seen = logits > -torch.inf
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    count = seen.sum(-1).clamp(min=1)
    centred = (logits - (logits.masked_fill(~seen, 0).sum(-1) / count)[..., None]).masked_fill(~seen, 0)
    near = (every[None, :] - index[:, None] * n // queries).abs() <= (NEAR if call.is_causal else NEAR // 2)
    figures = {
        "entropy": -(p * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1),  # 0 ln 0 = 0
        "logit_spread": (centred.square().sum(-1) / count).sqrt(),
        "sink_mass": p[..., :SINKS].sum(-1),
        "locality": (p * near).sum(-1),
    }
    weight = torch.ones_like(count, dtype=torch.float32)
    if call.key_mask is not None:
        real = call.key_mask.any(-1, keepdim=True) if call.query_mask is None else call.query_mask[:, index]
        weight = weight * real[:, None]
        figures = {name: values.masked_fill(weight == 0, 0) for name, values in figures.items()}  # all hidden: NaN
    total = weight.sum(-1).clamp(min=1)
    return {name: (values * weight).sum(-1) / total for name, values in figures.items()}


def second_moments(call: Call) -> tuple[Tensor, Tensor]:
    """Of the queries, and of the keys about their mean, scaled so that q.k is the logit: two (B, H, d, d) float64."""
    call = all_heads(call)

    def weighted(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        real = torch.ones_like(x[:, :1, :, :1], dtype=torch.float32) if mask is None else mask[:, None, :, None].float()
        return x.float() * real, real, real.sum(-2, keepdim=True).clamp(min=1)

    (q, _, queries), (k, real, keys) = weighted(call.query, call.query_mask), weighted(call.key, call.key_mask)
    k = (k - k.sum(-2, keepdim=True) / keys) * real
    query, key = ((x.mT @ x / n * abs(call.softmax_scale)).double() for x, n in ((q, queries), (k, keys)))
    return query, key
