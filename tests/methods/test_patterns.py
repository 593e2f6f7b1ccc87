"""Fixed patterns: sinks, longformer, bigbird, strided and random keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sbpatch.attention import PARTS, Geometry, Scatterbrain
from sbpatch.attention.patterns import UNIT, real_tokens
from sbpatch.errors import SbpatchError

PARAMETERS = {
    "sinks": {"window": 6, "first": 3},
    "longformer": {"window": 6, "first": 3},
    "bigbird": {"window": 5, "first": 2, "random": 4},
    "strided": {"keys": 7},
    "random": {"keys": 7},
}


@pytest.mark.parametrize("n", [1, 2, 19, 64, 83])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("low_rank", ["", "+favor"])
@pytest.mark.parametrize("method", PARAMETERS)
def test_patterns_agree_with_their_dense_references(
    method: str, low_rank: str, causal: bool, n: int, agrees: Callable[..., Scatterbrain]
) -> None:
    rank = {"rank": 8} if low_rank else {}
    for padded in (False, True):
        agrees(method + low_rank, n, causal=causal, padded=padded, **PARAMETERS[method], **rank)


@pytest.mark.parametrize("n", [3, 50, 81])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", PARAMETERS)
def test_nnz_is_the_number_of_pairs(method: str, causal: bool, n: int, counts: Callable[[Scatterbrain], float]) -> None:
    layer = Scatterbrain(method, Geometry(n, 2, 8, causal), 0, **PARAMETERS[method])
    assert layer.nnz == pytest.approx(counts(layer))


@pytest.mark.parametrize("method", PARAMETERS)
def test_patterns_fit_the_budget_they_are_sized_for(method: str) -> None:
    site = Geometry(300, 2, 8, prefix=1)
    assert PARTS[method].sized(0.5, site) is None
    for stored in (3, 8, 20.5, 60):
        parameters = PARTS[method].sized(stored, site)
        if parameters is not None:
            assert 0.5 * stored <= Scatterbrain(method, site, 0, **parameters).nnz <= stored
    assert parameters is not None


@pytest.mark.parametrize("method", PARAMETERS)
def test_patterns_follow_their_seed_and_nothing_else(method: str) -> None:
    q = torch.zeros(1, 2, 90, 8)

    def pairs(seed: int) -> torch.Tensor:
        support = Scatterbrain(method, Geometry(90, 2, 8), seed, **PARAMETERS[method]).support
        return support.dense(q, q, None)

    assert torch.equal(pairs(1), pairs(1))
    assert torch.equal(pairs(1), pairs(2)) == (method not in ("bigbird", "random"))


def test_sinks_are_read_by_the_last_query() -> None:
    layer = Scatterbrain("sinks", Geometry(100, 1, 8, causal=True), 0, window=5, first=2)
    q = torch.zeros(1, 1, 100, 8)
    v = torch.zeros(1, 1, 100, 1)
    v[0, 0, 0] = 7
    assert float(layer(q, q, v)[0, 0, -1]) == pytest.approx(1)  # one of 5 + 2 keys holds the 7


def test_global_tokens_read_and_are_read_by_all() -> None:
    layer = Scatterbrain("longformer", Geometry(60, 1, 8), 0, window=3, first=2)
    q = torch.zeros(1, 1, 60, 8)
    mean = layer(q, q, torch.arange(60.0).view(1, 1, 60, 1))[0, 0, :, 0]
    assert mean[:2].tolist() == pytest.approx([29.5, 29.5])
    assert float(mean[40]) == pytest.approx((0 + 1 + 39 + 40 + 41) / 5)


def test_bigbird_serves_lengths_beyond_its_own() -> None:
    layer = Scatterbrain("bigbird", Geometry(40, 1, 8), 0, window=3, first=1, random=5)
    q, k, v = torch.randn(3, 1, 1, 130, 8)
    pairs = layer.support.dense(q, k, None)
    expected = (q @ k.mT * 8**-0.5).masked_fill(~pairs, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(layer(q, k, v), expected, atol=1e-5, rtol=1e-5)


def test_strided_keys_skip_padding() -> None:
    mask = torch.tensor([[False, True, True, False, True, True, False, True]])
    place = -(-torch.arange(5) * UNIT // 5)
    index, new = real_tokens(place, 8, mask)
    assert index.tolist() == [[1, 2, 4, 5, 7]]
    assert new.all()
    assert not real_tokens(place, 8, torch.zeros_like(mask))[1].any()
    assert real_tokens(place, 3, None)[1].sum() == 3  # five places on three tokens: each token once


def test_random_keys_are_uniform_within_their_stretches() -> None:
    """With equal logits the output is the mean over the drawn keys; its expectation is known, its spread too."""
    q, v = torch.zeros(1, 1, 64, 8), torch.randn(1, 1, 64, 4)
    site = Geometry(64, 1, 8)
    outs = torch.stack([Scatterbrain("random", site, seed, keys=8)(q, q, v)[0, 0, 0] for seed in range(600)])
    stretches = v[0, 0].view(8, 8, 4).mean(1)
    expected = (v[0, 0, 0] + stretches[1:].sum(0)) / 8  # the first draw is pinned to the first token
    assert ((outs.mean(0) - expected).abs() < 4 * outs.std(0) / 600**0.5).all()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("sinks", {"window": 4, "first": 0}),
        ("bigbird", {"window": 4, "random": 0}),
        ("strided", {"keys": 0}),
        ("longformer", {"window": 0}),
    ],
)
def test_empty_patterns_are_refused(method: str, parameters: dict[str, int]) -> None:
    with pytest.raises(SbpatchError, match="at least"):
        Scatterbrain(method, Geometry(64, 1, 8), 0, **parameters)
