"""WildCat: exact where the keys that differ are chosen, Nystrom's weights, an error that falls fast."""

from __future__ import annotations

import pytest
import torch
from tiny import exact_attention

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.attention.reference import scatterbrain_matrix


@pytest.mark.parametrize("padded", [False, True])
def test_wildcat_is_exact_where_all_keys_are_chosen(padded: bool) -> None:
    q, k, v = torch.randn(3, 2, 2, 24, 8)
    mask = torch.rand(2, 24) > 0.3 if padded else None
    layer = Scatterbrain("wildcat", Geometry(24, 2, 8), 0, rank=24)
    torch.testing.assert_close(layer(q, k, v, mask, 1.0), exact_attention(q, k, v, mask), atol=1e-4, rtol=1e-4)


def test_wildcat_is_exact_where_the_chosen_keys_are_all_that_differ() -> None:
    """Five different keys, each eight times: five pivots explain them all, and the others are found to be of no use."""
    q, v = torch.randn(2, 1, 1, 40, 8)
    k = torch.randn(1, 1, 5, 8).repeat(1, 1, 8, 1)
    for rank in (5, 9):
        layer = Scatterbrain("wildcat", Geometry(40, 1, 8), 0, rank=rank)
        torch.testing.assert_close(layer(q, k, v, None, 1.0), exact_attention(q, k, v), atol=1e-4, rtol=1e-4)


def test_wildcats_weights_are_nystroms_and_its_output_stays_in_the_range_of_the_values() -> None:
    q, k, v = 1.5 * torch.randn(3, 1, 2, 60, 8)
    layer = Scatterbrain("wildcat", Geometry(60, 2, 8), 3, rank=7)
    pivot, weight = layer.low_rank.coreset(q, k, None, 1.0)
    own = weight.gather(-1, pivot[..., None, :].expand(1, 2, 7, 7))  # a chosen key stands for itself alone
    torch.testing.assert_close(own, torch.eye(7, dtype=torch.double).expand(1, 2, 7, 7), atol=1e-6, rtol=0)
    matrix = scatterbrain_matrix(layer, q, k, 1.0, None)
    low, high = (f(v.double(), -2, keepdim=True) for f in (torch.amin, torch.amax))
    expected = (matrix @ v.double()).clamp(low, high)
    torch.testing.assert_close(layer(q, k, v, None, 1.0).double(), expected, atol=1e-4, rtol=1e-4)


def test_wildcats_error_falls_faster_than_a_power_of_its_rank() -> None:
    """For bounded inputs: each fourfold rank divides the error by more than the one before, and by more than sampling's two."""
    q, k, v = 0.7 * torch.randn(3, 1, 4, 256, 4)
    errors = []
    for rank in (8, 32, 128):
        layer = Scatterbrain("wildcat", Geometry(256, 4, 4), 0, rank=rank)
        errors.append(float((layer(q, k, v) - exact_attention(q / 2, k, v)).norm()))
    first, second = errors[0] / errors[1], errors[1] / errors[2]
    assert 2 < first < second


def test_its_gradients_are_those_of_exact_attention_where_all_keys_are_chosen() -> None:
    q, k, v = torch.randn(3, 1, 1, 12, 4).unbind()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    layer = Scatterbrain("wildcat", Geometry(12, 1, 4), 0, rank=12)
    found, expected = (
        torch.autograd.grad(out.square().sum(), inputs) for out in (layer(q, k, v, None, 1.0), exact_attention(q, k, v))
    )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
