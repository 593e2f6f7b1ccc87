"""HyperAttention: exact blocks, and unbiased sums over the rest."""

from __future__ import annotations

import pytest
import torch
from tiny import exact_attention

from sbpatch.attention import Geometry, Scatterbrain


def test_hyperattention_is_exact_where_a_block_holds_all_keys() -> None:
    q, k, v = torch.randn(3, 2, 2, 30, 8)
    layer = Scatterbrain("hyperattention", Geometry(30, 2, 8), 0, bucket=30, rank=4)
    torch.testing.assert_close(layer(q, k, v, None, 1.0), exact_attention(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_hyperattentions_row_sums_are_unbiased(padded: bool) -> None:
    """The mean over 600 heads, each with hashes and a sample of its own, against its own standard error."""
    q, k = 0.5 * torch.randn(2, 1, 1, 40, 8, dtype=torch.double)
    mask = torch.arange(40)[None] < 29 if padded else None
    part = Scatterbrain("hyperattention", Geometry(40, 600, 8), 0, bucket=6, rank=10).low_rank
    _, _, entries, places = part.logits(*(x.expand(1, 600, 40, 8) for x in (q, k)), mask, 1.0)
    drawn = entries.exp().sum(-1).flatten(2).gather(2, places)[0]  # (600, n)
    expected = (q @ k.mT)[..., : 29 if padded else 40].exp().sum(-1)
    off = (drawn.mean(0) - expected) / (drawn.std(0) / 600**0.5)
    assert off.abs().max() < 4
    assert off.square().mean() < 2


def test_hyperattentions_blocks_hold_more_of_the_attention_than_chance() -> None:
    k = torch.nn.functional.normalize(torch.randn(1, 1, 256, 16), dim=-1) * 3
    q = k[:, :, torch.randperm(256)] + 0.1 * torch.randn(1, 1, 256, 16)
    part = Scatterbrain("hyperattention", Geometry(256, 1, 16), 0, bucket=32, rank=8).low_rank
    query, keys, _, _ = part.logits(q, k, None, 1.0)
    attention = (q @ k.mT).softmax(-1)[0, 0]
    held = sum(attention[query[0, 0, t]][:, keys[0, 0, t, :32]].sum() for t in range(8)) / 256
    assert held > 2 * 32 / 256


def test_its_gradients_are_those_of_exact_attention_where_a_block_holds_all_keys() -> None:
    q, k, v = torch.randn(3, 1, 1, 12, 4).unbind()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    layer = Scatterbrain("hyperattention", Geometry(12, 1, 4), 0, bucket=12, rank=3)
    found, expected = (
        torch.autograd.grad(out.square().sum(), inputs) for out in (layer(q, k, v, None, 1.0), exact_attention(q, k, v))
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
