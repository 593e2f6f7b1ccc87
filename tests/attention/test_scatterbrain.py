"""The layer against its definition, against the exact attention, and at the edges."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.attention.reference import exact_matrix, scatterbrain_matrix

from .helpers import (
    ANY_LENGTH,
    CASES,
    CAUSAL_METHODS,
    METHODS,
    allowed,
    attention_by_definition,
    build,
    draw,
    entries_by_definition,
    favor_entries,
    padding,
    probe,
    support_pairs,
    unnormalise,
)

any_case = st.sampled_from([(m, c) for m, c in CASES if m in ANY_LENGTH])


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    """Within `tolerance` of the largest wanted value; NaN nowhere."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).abs().max().item()
    assert error <= tolerance * max(1.0, wanted.abs().max().item()), error


# -- the layer is its reference ------------------------------------------------------------------------------------


@settings(max_examples=120)
@given(
    case=any_case,
    n=st.integers(1, 150),
    d=st.integers(1, 12),
    heads=st.integers(1, 3),
    batch=st.integers(1, 2),
    masked=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_any_shape_is_the_reference(
    case: tuple[str, bool], n: int, d: int, heads: int, batch: int, masked: bool, seed: int
) -> None:
    method, causal = case
    layer = build(method, n, heads=heads, d=d, causal=causal, seed=seed)
    torch.manual_seed(seed)
    q, k, v = draw(layer, batch=batch, width=3)
    mask = padding(batch, n, seed) if masked else None
    wanted = scatterbrain_matrix(layer, q, k, d**-0.5, mask) @ v.double()
    close(layer(q, k, v, mask), wanted)


@settings(max_examples=80)
@given(
    n=st.integers(1, 130),
    window=st.integers(1, 200),
    bucket=st.integers(1, 140),
    rounds=st.integers(1, 4),
    rank=st.integers(1, 140),
    steps=st.integers(0, 3),
    causal=st.booleans(),
    low=st.sampled_from(["favor", "clusters"]),
)
def test_any_parameters_are_the_reference(
    n: int, window: int, bucket: int, rounds: int, rank: int, steps: int, causal: bool, low: str
) -> None:
    """Windows, buckets and ranks beyond n, more clusters than distinct keys, no Lloyd step: all the same algebra."""
    clusters = {"steps": steps} if low == "clusters" else {}
    causal = causal and not clusters
    layers = [
        build(f"window+{low}", n, causal=causal, window=window, rank=rank, **clusters),
        build(f"lsh+{low}", n, causal=causal, bucket=bucket, rounds=rounds, rank=rank, **clusters),
    ]
    for layer in layers:
        q, k, v = draw(layer, batch=1)
        close(layer(q, k, v), scatterbrain_matrix(layer, q, k, 8**-0.5) @ v.double())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("method", "causal"), CASES)
def test_layer_and_reference_are_the_definition(method: str, causal: bool, masked: bool) -> None:
    """The reference shares its parts' code with the layer; the loops in helpers.py share nothing with either."""
    layer = build(method, 131, causal=causal)
    q, k, v = draw(layer)
    mask = padding(2, layer.site.tokens) if masked else None
    wanted = attention_by_definition(layer, q, k, v, mask, 0.3)
    close(layer(q, k, v, mask, 0.3), wanted)
    close(scatterbrain_matrix(layer, q, k, 0.3, mask) @ v.double(), wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_the_exact_reference_is_softmax_attention(causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 2, 40, 8)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    close(exact_matrix(q, k, 8**-0.5, causal) @ v.double(), wanted)


@pytest.mark.parametrize("method", ["window", "lsh", "favor", "clusters", "window+clusters"])
def test_the_default_scale_is_softmax_attentions(method: str) -> None:
    layer = build(method, 40, d=8)
    q, k, v = draw(layer)
    assert torch.equal(layer(q, k, v), layer(q, k, v, scale=8**-0.5))
    assert not torch.allclose(layer(q, k, v), layer(q, k, v, scale=1.0), atol=1e-3)


# -- equation 1, read off the layer itself -------------------------------------------------------------------------


@pytest.mark.parametrize("trial", range(3))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", ["window+favor", "lsh+favor", "window2d+favor"])
def test_exact_on_the_support_and_features_elsewhere(method: str, causal: bool, trial: int) -> None:
    """A' = exp(q.k) on the support and phi(q).phi(k) off it, on fresh inputs; no dense() of the package involved."""
    layer = build(method, 77, causal=causal, seed=trial)
    torch.manual_seed(100 + trial)
    q, k, _ = (0.6 * x for x in draw(layer))
    pairs = allowed(layer.site.tokens, causal, None)
    support = support_pairs(layer, q, k, None) & pairs
    rows = probe(layer, q, k)
    exact, low = (q.double() @ k.double().mT).exp(), favor_entries(layer.low_rank, q, k)
    covered = support.expand_as(rows).any(-1)  # hashing may leave a causal row without an exact pair
    assert covered.double().mean() > 0.3
    found = unnormalise(rows, exact.log(), support.expand_as(rows))
    wanted = torch.where(support, exact, low).masked_fill(~pairs, 0)
    torch.testing.assert_close(found[covered], wanted[covered], rtol=2e-4, atol=2e-5)
    # the two families differ by far more than the tolerance, so the test tells them apart
    assert ((exact - low).abs() > 0.02)[pairs.expand_as(rows)].double().mean() > 0.5


@pytest.mark.parametrize(("method", "causal"), CASES)
def test_rows_sum_to_one_and_use_allowed_pairs_only(method: str, causal: bool) -> None:
    layer = build(method, 101, causal=causal)
    q, k, _ = draw(layer)
    mask = padding(2, layer.site.tokens)
    rows = probe(layer, q, k, mask)
    pairs = allowed(layer.site.tokens, causal, mask).expand_as(rows)
    assert rows[~pairs].abs().max() == 0
    assert rows.min() > -1e-6
    total = rows.sum(-1)
    empty = ~(entries_by_definition(layer, q, k, mask) > 0).any(-1)  # a sparse row may hold no real key: zeros
    torch.testing.assert_close(total, (~empty).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("low", ["", "+favor", "+clusters"])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_hash_rounds_count_nothing_twice(rounds: int, low: str) -> None:
    """Pairs that meet in several rounds weigh exp(q.k), once; with 5 rounds of a third of n most pairs meet again."""
    layer = build(f"lsh{low}", 33, bucket=11, rounds=rounds)
    q, k, _ = draw(layer)
    exact = (q.double() @ k.double().mT).exp()
    support = support_pairs(layer, q, k, None)
    singly = [
        support_pairs(build("lsh", 33, bucket=11, rounds=r), q, k, None).sum().item() for r in range(1, rounds + 1)
    ]
    assert rounds == 1 or support.sum() < singly[0] * rounds * 0.9  # there are repeats to be counted twice
    found = unnormalise(probe(layer, q, k), exact.log(), support)
    # atol: what a key leaves of its cluster's float32 sums is zero up to their rounding, whatever the size of its own entry
    torch.testing.assert_close(found[support], exact[support], rtol=2e-4, atol=3e-5 if low == "+clusters" else 0)
    if not low:
        assert found[~support].abs().max() == 0


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("window+favor", {"window": 200}),
        ("window+clusters", {"window": 200}),
        ("lsh+favor", {"bucket": 60, "rounds": 2}),
        ("lsh+clusters", {"bucket": 75, "rounds": 1}),
        ("window2d+favor", {"window": 30}),
    ],
)
@pytest.mark.parametrize("size", [1.0, 4.0])
def test_a_support_that_covers_all_is_exact_attention(method: str, parameters: dict[str, int], size: float) -> None:
    """Whatever L is: with q and k four times as long, the features are wrong by hundreds of orders of magnitude."""
    layer = build(method, 60, **parameters)
    q, k, v = draw(layer)
    if layer.site.prefix:  # class tokens read class tokens only: drop those rows
        wanted = exact_matrix(q * size, k * size, 1.0) @ v.double()
        close(layer(q * size, k * size, v, scale=1.0)[:, :, 2:], wanted[:, :, 2:])
        return
    for mask in (None, padding(2, 60)):
        wanted = exact_matrix(q * size, k * size, 1.0, key_mask=mask) @ v.double()
        close(layer(q * size, k * size, v, mask, 1.0), wanted)


def test_a_causal_support_that_covers_all_is_exact_attention() -> None:
    layer = build("window+favor", 150, causal=True, window=150)
    q, k, v = (3 * x for x in draw(layer))
    close(layer(q, k, v, scale=1.0), exact_matrix(q, k, 1.0, causal=True) @ v.double())


# -- causality and padding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in CAUSAL_METHODS if "lsh" not in m])
@pytest.mark.parametrize("first", [1, 64, 70, 129])
def test_the_future_changes_nothing(method: str, first: int) -> None:
    layer = build(method, 150, causal=True)
    q, k, v = draw(layer)
    before = layer(q, k, v)
    for x in (q, k, v):
        x[:, :, first:] = 3 * torch.randn_like(x[:, :, first:])
    torch.testing.assert_close(layer(q, k, v)[:, :, :first], before[:, :, :first], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lsh", "lsh+favor"])
def test_future_values_change_nothing_under_hashing(method: str) -> None:
    """Sorting all keys into equal buckets lets future keys decide which past pairs meet; their values never leak."""
    layer = build(method, 90, causal=True)
    q, k, v = draw(layer)
    before = layer(q, k, v)
    v[:, :, 50:] = 100.0
    assert torch.equal(layer(q, k, v)[:, :, :50], before[:, :, :50])


@pytest.mark.parametrize(("method", "causal"), CASES)
def test_what_lies_in_padding_changes_nothing(method: str, causal: bool) -> None:
    layer = build(method, 83, causal=causal)
    q, k, v = draw(layer)
    mask = padding(2, layer.site.tokens)
    before = layer(q, k, v, mask)
    k[~mask[:, None].expand(k.shape[:3])] = 5 * torch.randn(8)
    v[~mask[:, None].expand(v.shape[:3])] = 1e4
    torch.testing.assert_close(layer(q, k, v, mask), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "causal"), CASES)
def test_without_any_real_key_the_output_is_zero(method: str, causal: bool) -> None:
    layer = build(method, 70, causal=causal)
    q, k, v = draw(layer)
    mask = torch.ones(2, layer.site.tokens, dtype=torch.bool)
    mask[1] = False
    for x in (q, k, v):
        x.requires_grad_()
    out = layer(q, k, v, mask)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    torch.testing.assert_close(out[:1], layer(q[:1], k[:1], v[:1]), rtol=1e-5, atol=1e-5)
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert grad.isfinite().all()


# -- precision and gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize(("method", "causal"), CASES)
def test_half_precision_is_float32_within_its_rounding(
    method: str, causal: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Four units in the last place of values up to about one (2^-8, 2^-11), relative to the output's norm."""
    layer = build(method, 90, causal=causal)
    # powers of two as scale, and the same rounded inputs: so hashing and clustering see the same keys in both
    q, k, v = (x.to(dtype) for x in draw(layer))
    found = layer(q, k, v, scale=0.25)
    wanted = layer(q.float(), k.float(), v.float(), scale=0.25)
    assert found.dtype == dtype
    assert (found.float() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("method", "causal"), CASES)
def test_gradients_are_the_definitions(method: str, causal: bool, masked: bool) -> None:
    layer = build(method, 75, causal=causal)
    inputs = [x.requires_grad_() for x in draw(layer)]
    mask = padding(2, layer.site.tokens) if masked else None
    upstream = torch.randn_like(inputs[2])
    found = torch.autograd.grad((layer(*inputs, mask, 0.35) * upstream).sum(), inputs)
    wanted = torch.autograd.grad((attention_by_definition(layer, *inputs, mask, 0.35) * upstream).sum(), inputs)
    for name, a, b in zip("qkv", found, wanted, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm().clamp(min=1e-6), name


# -- edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "causal"), CASES)
def test_logits_of_200_give_no_nan(method: str, causal: bool) -> None:
    """All of q.k = +-200 and what lies between; outputs stay within the values' range and gradients finite."""
    layer = build(method, 90, causal=causal)
    q, k, v = draw(layer)
    q = q / q.norm(dim=-1, keepdim=True) * 200**0.5
    k = k / k.norm(dim=-1, keepdim=True) * 200**0.5
    k[:, :, ::3] = q[:, :, ::3]  # +200 with their own query
    k[:, :, 1::3] = -q[:, :, 1::3]  # and -200
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = layer(*inputs, scale=1.0)
    assert out.isfinite().all()
    assert (out <= v.amax(-2, keepdim=True) + 1e-3).all()
    assert (out >= v.amin(-2, keepdim=True) - 1e-3).all()
    for grad in torch.autograd.grad(out.square().sum(), inputs):
        assert grad.isfinite().all()
    row = probe(layer, q, k).sum(-1)
    torch.testing.assert_close(row[row != 0], torch.ones_like(row[row != 0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["window+favor", "window+clusters"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_pair_of_200_on_the_support_wins_or_vanishes(method: str, sign: int) -> None:
    layer = build(method, 40, window=3)
    q, k, v = draw(layer, batch=1)
    q, k = q / q.norm(dim=-1, keepdim=True), 0.05 * k
    k[:, :, 20] = sign * 200 * q[:, :, 20]
    out = layer(q, k, v, scale=1.0)
    if sign > 0:
        close(out[:, :, 20], v[:, :, 20])
    else:
        rows = probe(layer, q, k)
        assert rows[:, :, 20, 20].abs().max() < 1e-30
        assert out.isfinite().all()


def test_a_causal_row_does_not_drown_in_a_later_key() -> None:
    """Logits of -100 with long past keys, and short future keys whose features are larger by e^300: still exact."""
    layer = build("window+favor", 40, causal=True, window=4)
    q, k, v = draw(layer, batch=1)
    q, k = 4 * torch.eye(8)[0] + 0.1 * q, -25 * torch.eye(8)[0] + 0.1 * k
    k[:, :, 30:] = 0
    out = layer(q, k, v, scale=1.0)[:, :, :30]
    close(out, layer(q[:, :, :30], k[:, :, :30], v[:, :, :30], scale=1.0), 1e-4)
    close(out[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize(("method", "causal"), CASES)
def test_keys_of_norm_zero_attend_evenly(method: str, causal: bool) -> None:
    """exp(q.0) = 1 for every key, and clusters know it; features only estimate it, all keys alike."""
    layer = build(method, 75, causal=causal)
    q, k, v = draw(layer)
    out = layer(q, torch.zeros_like(k), v)
    assert out.isfinite().all()
    rows = probe(layer, q, torch.zeros_like(k))
    if "favor" not in method:
        used = rows > 0
        torch.testing.assert_close(rows, used / used.sum(-1, keepdim=True).clamp(min=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "causal"), CASES)
def test_identical_tokens_give_their_value(method: str, causal: bool) -> None:
    layer = build(method, 75, causal=causal)
    q, k, v = (x[:, :, :1].expand_as(x) for x in draw(layer))
    out = layer(q, k, v)
    rows = (out != 0).any(-1)  # a causal hashed row may be left without a key
    assert rows.double().mean() > 0.3
    torch.testing.assert_close(out[rows], v[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "causal"), [(m, c) for m, c in CASES if m in ANY_LENGTH])
def test_a_single_token_answers_its_value(method: str, causal: bool) -> None:
    layer = build(method, 1, causal=causal)
    q, k, v = draw(layer)
    torch.testing.assert_close(layer(q, k, v), v)


# -- the same bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "causal"), CASES)
def test_same_seed_same_bits(method: str, causal: bool) -> None:
    layer = build(method, 90, causal=causal, seed=7)
    q, k, v = draw(layer)
    first = layer(q, k, v)
    torch.manual_seed(999)  # whatever the global generator does
    state = torch.random.get_rng_state()
    again = build(method, 90, causal=causal, seed=7)
    for twin in (layer, again, copy.deepcopy(layer)):
        assert torch.equal(twin(q, k, v), first)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing random outside the seed
    differs = not torch.equal(build(method, 90, causal=causal, seed=8)(q, k, v), first)
    assert differs == ("favor" in method or "lsh" in method)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_adds_nothing_to_the_models_state(method: str) -> None:
    layer = build(method, 90)
    assert not layer.state_dict()
    assert not list(layer.parameters())
    random = {name for name, _ in layer.named_buffers() if name.endswith("projection")}
    assert len(random) == ("favor" in method) + ("lsh" in method)  # what is random lies in buffers and follows .to()


@pytest.mark.parametrize("method", ["window+favor", "lsh+clusters", "lsh+favor"])
def test_inputs_are_left_alone_and_need_not_be_contiguous(method: str) -> None:
    layer = build(method, 50)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(layer))
    kept = [x.clone() for x in (q, k, v)]
    out = layer(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), kept, strict=True))
    torch.testing.assert_close(layer(*kept), out, rtol=1e-5, atol=1e-5)


def test_heads_and_samples_do_not_mix() -> None:
    layer = Scatterbrain("lsh+favor", Geometry(40, 3, 8), 0, bucket=6, rank=10)
    q, k, v = draw(layer, batch=3)
    before = layer(q, k, v)
    q[1], k[1], v[1] = 0.3, torch.randn(3, 40, 8), 7.0
    q[:, 2] *= 2
    after = layer(q, k, v)
    torch.testing.assert_close(after[::2, :2], before[::2, :2], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after[1, 0], before[1, 0])
