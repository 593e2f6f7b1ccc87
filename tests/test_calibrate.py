"""Calibration on small models: what is measured against dense definitions, and that the decisions keep their promises."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import refused, t2t
from torch import Tensor, nn

import sbpatch
from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.attention.per_head import Exact
from sbpatch.attention.reference import exact_matrix, scatterbrain_matrix
from sbpatch.calibration.allocate import Curve, allocate
from sbpatch.calibration.candidates import Candidate, closer
from sbpatch.calibration.choose import layer_of_heads
from sbpatch.calibration.stages import SCREENED
from sbpatch.data.batch import after_samples, first_samples
from sbpatch.plan.patch import patch
from sbpatch.plan.plan import SitePlan
from sbpatch.plan.recipe import SiteSetting
from sbpatch.sites.calls import Call
from sbpatch.sites.fidelity import head_profile, matrix_error, output_error
from sbpatch.sites.find import find_sites
from sbpatch.sites.swap import swapped

# by quality alone: nothing is faster than exact attention on models this small (see test_costs)
calibrate = partial(sbpatch.calibrate, keep_slow=True)

STAGE1, STAGE2 = "tokens_to_token.attention1.attn", "tokens_to_token.attention2.attn"  # 256 and 64 tokens at 64 px
BLOCK = "blocks.0.attn"  # 17 tokens
BATCHES = list(torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(3)).split([3, 2]))


def calls_of(model: nn.Module, name: str, batches: list[Tensor]) -> Call:
    """What the model asks of one site over all samples, as one call."""
    seen: list[Call] = []
    with torch.inference_mode(), swapped(model, {name: lambda call: seen.append(call) or call.exact()}):
        for batch in batches:
            model(batch)
    q, k, v = (torch.cat([getattr(call, part) for call in seen]) for part in ("query", "key", "value"))
    return Call(q, k, v, scale=seen[0].scale)


# ---- measures


@pytest.mark.parametrize("n", [2, 100, 700])
def test_entropy_of_uniform_and_of_one_key(n):
    zero, one_hot = torch.zeros(2, 3, n, n), 50 * torch.eye(n).expand(2, 3, n, n)
    values = torch.randn(2, 3, n, 4)
    torch.testing.assert_close(head_profile(Call(zero, one_hot, values))["entropy"], torch.full((2, 3), math.log(n)))
    torch.testing.assert_close(head_profile(Call(one_hot, one_hot, values, scale=1.0))["entropy"], torch.zeros(2, 3))


def test_entropy_is_the_mean_over_rows():
    q, k = torch.randn(2, 2, 3, 50, 8)
    p = exact_matrix(q, k, 0.7)
    expected = -(p * p.log()).sum(-1).mean(-1)
    torch.testing.assert_close(head_profile(Call(q, k, k, scale=0.7), rows=50)["entropy"].double(), expected)
    some = -(p * p.log()).sum(-1)[..., ::10].mean(-1)  # 5 rows, evenly spaced
    torch.testing.assert_close(head_profile(Call(q, k, k, scale=0.7), rows=5)["entropy"].double(), some)


def test_output_error_by_hand():
    exact = torch.tensor([[[[3.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]]]])
    found = torch.tensor([[[[3.0, 3.0], [4.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    torch.testing.assert_close(output_error(found, exact), torch.tensor([[1.0, 1.0]]))
    assert output_error(exact, exact).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("method", ["window", "lsh", "clusters", "favor", "window2d+clusters", "lsh+favor"])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_matrix_error_is_that_of_the_dense_matrices(method, scale):
    site = Geometry(70, 2, 8, grid=(7, 10))
    sizes = {"window": 3, "bucket": 9, "rounds": 2, "rank": 6}
    takes = {
        "window": ["window"],
        "window2d": ["window"],
        "lsh": ["bucket", "rounds"],
        "clusters": ["rank"],
        "favor": ["rank"],
    }
    layer = Scatterbrain(method, site, 0, **{p: sizes[p] for part in method.split("+") for p in takes[part]})
    q, k, v = torch.randn(3, 2, 2, 70, 8)
    call = Call(q, k, v, scale=scale)
    exact = exact_matrix(q, k, call.softmax_scale)
    found = scatterbrain_matrix(layer, q, k, call.softmax_scale)
    expected = (found - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
    torch.testing.assert_close(matrix_error(layer, call, columns=32).double(), expected, atol=1e-4, rtol=1e-3)


def test_of_long_calls_the_matrix_error_is_estimated_by_some_columns(monkeypatch):
    layer = Scatterbrain("local+clusters", Geometry(1500, 2, 8), 0, side=16, tile=16, rank=20)
    call = Call(*(torch.randn(1, 2, 1500, 8) for _ in range(3)))
    estimate = matrix_error(layer, call)
    monkeypatch.setattr("sbpatch.sites.fidelity.COLUMNS", 1500)
    torch.testing.assert_close(estimate, matrix_error(layer, call), atol=0, rtol=0.05)


@given(sizes=st.lists(st.integers(1, 5), max_size=5), first=st.integers(1, 4), count=st.integers(1, 12))
def test_screening_takes_every_sample_once(sizes, first, count):
    numbers = torch.arange(sum(sizes)).split(sizes)
    screen = first_samples(numbers, count)
    look, rest = first_samples(numbers, first), after_samples(screen, first)
    assert [len(x) for x in screen] == [len(x) for x in screen if len(x)]
    assert [int(i) for x in screen for i in x] == list(range(min(count, sum(sizes))))
    if first <= count:
        assert [int(i) for x in look + rest for i in x] == [int(i) for x in screen for i in x]


# ---- allocation: greedy against all combinations


def best_of_all(curves: list[Curve], limit: float) -> float:
    """The least damage that any combination within the limit leaves."""
    combinations = itertools.product(*curves)
    return min(sum(d for _, d in c) for c in combinations if sum(s for s, _ in c) <= limit * (1 + 1e-9))


def left_and_spent(curves: list[Curve], limit: float) -> tuple[float, float]:
    chosen = allocate(curves, limit)
    assert chosen is not None
    picked = [curve[j] for curve, j in zip(curves, chosen, strict=True)]
    return sum(damage for _, damage in picked), sum(cost for cost, _ in picked)


choices = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=5)


@settings(max_examples=200)
@given(curves=st.lists(choices, min_size=1, max_size=4), limit=st.floats(1, 160))
def test_allocation_keeps_the_budget_and_comes_near_the_best(curves, limit):
    """Steps by gain per cost follow each curve's convex hull, the relaxed optimum, up to the first step that does not
    fit; so what is lost is at most that one step, which is no larger than one head's whole gain.
    """
    if sum(min(s for s, _ in curve) for curve in curves) > limit:
        assert allocate(curves, limit) is None
        return
    left, spent = left_and_spent(curves, limit)
    assert spent <= limit * (1 + 1e-9)
    one_head = max(max(d for _, d in curve) - min(d for _, d in curve) for curve in curves)
    assert left <= best_of_all(curves, limit) + one_head + 1e-12


@settings(max_examples=100)
@given(
    gains=st.lists(st.lists(st.floats(0.001, 1), min_size=1, max_size=4), min_size=1, max_size=4),
    limit=st.floats(4, 60),
)
def test_allocation_is_the_best_where_returns_diminish(gains, limit):
    """Equal steps, each worth less than the one before: then greedy is optimal."""
    curves = []
    for steps in gains:
        left = [sum(sorted(steps)[:i]) for i in range(len(steps), -1, -1)]  # the largest gain goes first
        curves.append([(4 * (i + 1), x) for i, x in enumerate(left)])
    if allocate(curves, limit) is None:
        assert 4 * len(curves) > limit
        return
    assert left_and_spent(curves, limit)[0] == pytest.approx(best_of_all(curves, limit), abs=1e-9)


# ---- the whole


@pytest.mark.slow
@settings(max_examples=6)
@given(budget=st.floats(0.04, 0.6), min_tokens=st.sampled_from([17, 64, 256]))
def test_budget_is_kept(budget, min_tokens):
    plan = calibrate(t2t(), BATCHES, budget=budget, min_tokens=min_tokens)
    decided = [site for site in plan.sites if site.method is not None]
    assert [site.tokens >= min_tokens for site in plan.sites] == [site in decided for site in plan.sites]
    stored = sum(site.layer().stored * site.tokens * site.heads for site in decided)
    assert plan.budget.requested == budget
    assert plan.budget.used == pytest.approx(stored / sum(site.entries for site in decided))
    assert plan.budget.used <= budget * (1 + 1e-6)
    assert plan.budget.used > budget / 3


def test_figures_of_a_plan_are_those_of_the_model():
    """Entropy, errors and agreement, computed a second time from what the model really asks of its sites."""
    model = t2t()
    plan = calibrate(model, BATCHES, budget=0.2, min_tokens=64)
    layers = plan.layers()
    with torch.inference_mode():
        images = torch.cat(BATCHES)
        for site in plan.sites:
            call = calls_of(model, site.name, BATCHES)
            p = exact_matrix(call.query, call.key, call.softmax_scale)
            entropy = -torch.special.xlogy(p, p).sum(-1).mean((0, 2))
            assert site.entropy == pytest.approx(entropy.tolist(), abs=1e-4)
            assert site.entropy_ratio == pytest.approx(float(entropy.mean()) / math.log(site.tokens), abs=1e-4)
            if site.decision != "patch":
                assert not site.output_error
                continue
            found = layers[site.name](call.query, call.key, call.value, scale=call.scale)
            wrong = (found.double() - p @ call.value.double()).norm(dim=(-2, -1))
            expected = (wrong / (p @ call.value.double()).norm(dim=(-2, -1))).mean()
            assert site.output_error == pytest.approx(float(expected), rel=1e-3)
            dense = scatterbrain_matrix(layers[site.name], call.query[:4], call.key[:4], call.softmax_scale)
            expected = ((dense - p[:4]).norm(dim=(-2, -1)) / p[:4].norm(dim=(-2, -1))).mean()
            assert site.matrix_error == pytest.approx(float(expected), rel=1e-3)
        exact = model(images).argmax(1)
        agreement = 100 * float((patch(model, plan)(images).argmax(1) == exact).double().mean())
    assert plan.check["agreement"] == pytest.approx(agreement)


def test_more_budget_is_less_error():
    errors = [calibrate(t2t(), BATCHES, budget=b).sites[0].output_error for b in (0.03, 0.1, 0.4)]
    assert errors[0] > errors[1] > errors[2]


def test_measured_choice_beats_its_parts_at_the_same_budget():
    """What --method auto keeps is no worse than each of the methods alone, on the samples that it chose by."""
    auto = calibrate(t2t(), BATCHES, budget=0.1).sites[0].output_error
    for method in ("window2d", "clusters", "lsh", "favor"):
        assert auto <= 1.12 * calibrate(t2t(), BATCHES, budget=0.1, method=method).sites[0].output_error


@pytest.mark.parametrize("method", ["window2d", "clusters", "lsh+favor"])
def test_method_is_the_one_asked_for_or_a_part_of_it(method):
    (site,) = calibrate(t2t(), BATCHES, budget=0.2, method=method).patched
    assert set(site.method.split("+")) <= set(method.split("+"))


def test_two_runs_give_one_plan():
    plans = [calibrate(t2t(), BATCHES, budget=0.1, min_tokens=64, method="lsh+favor", seed=5) for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()
    assert plans[0].tensors.keys() == plans[1].tensors.keys()
    assert all(torch.equal(plans[0].tensors[name], plans[1].tensors[name]) for name in plans[0].tensors)
    other = calibrate(t2t(), BATCHES, budget=0.1, min_tokens=64, method="lsh+favor", seed=6)
    assert other.to_json() != plans[0].to_json()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batching_of_the_samples_changes_no_decision(size):
    plans = [calibrate(t2t(), list(torch.cat(BATCHES).split(s)), budget=0.1) for s in (size, 5)]
    first, second = ([(s.decision, s.method, s.rank, s.nnz) for s in plan.sites] for plan in plans)
    assert first == second


def test_model_is_left_as_it_was():
    model = t2t()
    before = model(BATCHES[0])
    calibrate(model, BATCHES, budget=0.2)
    assert torch.equal(model(BATCHES[0]), before)

    def interrupted(items, description):
        yield items[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, BATCHES, budget=0.2, progress=interrupted)
    assert torch.equal(model(BATCHES[0]), before)


# ---- which sites


@pytest.mark.parametrize(
    ("options", "patched"),
    [
        ({}, [STAGE1]),
        ({"min_tokens": 64}, [STAGE1, STAGE2]),
        ({"min_tokens": 2}, [STAGE1, STAGE2, BLOCK]),
        ({"min_tokens": 2, "include": ["blocks.*"]}, [BLOCK]),
        ({"min_tokens": 2, "include": ["*attention2*", "blocks.*"]}, [STAGE2, BLOCK]),
        ({"min_tokens": 2, "exclude": ["*attention1*"]}, [STAGE2, BLOCK]),
        ({"min_tokens": 2, "include": ["token*"], "exclude": ["*2.attn"]}, [STAGE1]),
    ],
)
def test_include_exclude_and_min_tokens(options, patched):
    plan = calibrate(t2t(), BATCHES, budget=0.3, method="clusters", allocation="measured", **options)
    assert [site.name for site in plan.patched] == patched
    for site in plan.sites:
        assert site.reason
        assert (site.method is None) == (site.decision == "exact") == (site.budget is None)
        assert all(len(figures) == site.heads for figures in (site.logit_spread, site.sink_mass, site.locality))


@pytest.mark.parametrize("options", [{"exclude": ["*"]}, {"min_tokens": 257}])
def test_nothing_to_patch(options):
    text = refused(calibrate, t2t(), BATCHES, **options)
    assert "nothing to patch among 3 attention sites" in text
    assert STAGE1 in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"include": ["*attention1*", "typo*"]}, "'typo*' of --include"),
        ({"exclude": ["block.*"]}, "'block.*' of --exclude"),
        ({"fixed": {"*3*": SiteSetting(method="window", window=9)}}, "'*3*' of the recipe's sites"),
    ],
)
def test_patterns_that_match_no_site(options, said):
    text = refused(calibrate, t2t(), BATCHES, **options)
    assert f"no attention site matches {said}" in text
    assert STAGE1 in text


def test_model_without_attention():
    plain = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    assert "no attention found" in refused(calibrate, plain, BATCHES)


class Causal(nn.Module):
    """One causal attention over (B, n, 32) sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 3 * 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).mean((1, 2))


def test_causal_sequences():
    model, batches = Causal(), [torch.randn(2, 512, 32)]
    plan = calibrate(model, batches, budget=0.3)
    (site,) = plan.patched
    assert site.causal
    assert site.grid is None
    assert plan.budget.used <= 0.3
    with torch.inference_mode():
        other = torch.cat([batches[0][:, :300], torch.randn(2, 212, 32)], dim=1)
        q, k, v = torch.randn(3, 1, 2, 512, 16)
        layer = plan.layers()[site.name]
        k2, v2 = k.clone(), v.clone()
        k2[:, :, 300:], v2[:, :, 300:] = 9, -9
        torch.testing.assert_close(layer(q, k, v)[:, :, :300], layer(q, k2, v2)[:, :, :300])  # the future is not read
        assert torch.isfinite(patch(model, plan)(other)).all()


# ---- recipes


def test_fixed_settings_are_taken_as_they_are():
    fixed = {"*attention1*": SiteSetting(method="window+clusters", window=9, rank=11, steps=1)}
    plan = calibrate(t2t(), BATCHES, budget=0.2, min_tokens=64, fixed=fixed)
    first, second, _ = plan.sites
    assert (first.method, first.rank, first.parameters) == ("window+clusters", 11, {"window": 9, "steps": 1})
    assert first.reason == "one setting, taken as it is"
    assert first.budget == pytest.approx((first.nnz + 12) / 256)
    assert second.reason != "one setting, taken as it is"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"method": "windo", "window": 3}, "did you mean window"),
        ({"method": "window", "window": 3, "windw": 3}, "windw"),
        ({"method": "window"}, "window"),
        ({"method": "window", "window": 0}, "at least 1"),
        ({"method": "window+clusters", "window": 3}, "rank"),
        ({"method": "clusters", "rank": 60}, "cannot be met"),
        ({"method": "clusters", "rank": 200}, "from 0 to 64"),  # tokens of the second stage
    ],
)
def test_fixed_settings_that_cannot_be(setting, said):
    def settled() -> None:
        calibrate(t2t(), BATCHES, budget=0.2, fixed={"*attention*": SiteSetting(**setting)})

    assert said in refused(settled)


# ---- refusals


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.1, 3.0, math.nan, math.inf])
def test_budget_that_is_no_share(budget):
    assert "budget" in refused(calibrate, t2t(), BATCHES, budget=budget)


@pytest.mark.parametrize("budget", [1e-9, 1e-4, 0.003])
def test_impossible_budget(budget):
    text = refused(calibrate, t2t(), BATCHES, budget=budget)
    assert f"budget {budget:g}" in text
    assert "raise --budget" in text or "cannot be met" in text


def test_no_samples():
    for batches in ([], [torch.zeros(0, 3, 64, 64)]):
        assert "no samples" in refused(calibrate, t2t(), batches)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("clusers", "did you mean clusters"),
        ("window+lsh", "two sparse parts"),
        ("", "unknown attention method"),
        ("window+", "unknown attention method"),
    ],
)
def test_unknown_method(method, said):
    assert said in refused(calibrate, t2t(), BATCHES, method=method)


def test_the_closer_look_lies_around_the_choice():
    """The same method, from a fifth less to a quarter more, split otherwise; exact attention has nothing around it."""
    site = SitePlan.of(find_sites(t2t(), BATCHES[0][:1])[0], "patch", "")
    layer = Scatterbrain("top-clusters+clusters", site.geometry, 0, probes=8, rank=32)
    found = closer(Candidate(layer), site, 0, None, torch.device("cpu"), None)
    assert len({c.name for c in found}) >= 10
    assert {c.layer.method for c in found} == {"top-clusters+clusters"}
    assert all(0.7 * layer.stored <= c.layer.stored <= 1.27 * layer.stored for c in found)
    assert closer(Candidate(Exact(site.geometry)), site, 0, None, torch.device("cpu"), None) == []


def test_coordinates_of_landmarks_come_from_the_sample_and_stay_with_their_heads():
    """What a head was measured with is what it gets, also where its site is split into groups of heads."""
    plan = calibrate(t2t(), BATCHES, budget=0.2, method="coreset", min_tokens=200)
    (to_key,) = (t for key, t in plan.tensors.items() if key.endswith("to_key"))
    assert not torch.equal(to_key[0], torch.eye(to_key.shape[1])[:, : to_key.shape[2]])
    geometry = Geometry(64, 3, 8)
    site = SitePlan.model_validate(
        {"name": "x", "class": "X", "tokens": 64, "heads": 3, "head_dim": 8, "decision": "patch", "reason": ""}
    )
    layers = [Scatterbrain("coreset", geometry, 0, rank=rank) for rank in (4, 9)]
    moments = torch.diag_embed(torch.rand(2, 3, 8, dtype=torch.float64) + 0.1).unbind()
    for layer in layers:
        layer.parameters_used |= layer.low_rank.fit(*moments)
    few, many = map(Candidate, layers)
    joined = layer_of_heads([few, many, few], site, 0)
    torch.testing.assert_close(joined.layers[0].low_rank.to_key, layers[0].low_rank.to_key[[0, 2]])
    torch.testing.assert_close(joined.layers[1].low_rank.to_query, layers[1].low_rank.to_query[[1]])


def test_more_samples_shape_the_choice_and_leave_most_to_check_it():
    plan = calibrate(t2t(), [torch.randn(8, 3, 64, 64) for _ in range(5)], budget=0.3, min_tokens=200)
    assert plan.check is not None
    assert plan.check["samples"] == 30  # ten of 40 to choose by
    assert [SCREENED["classes"].of(count) for count in (1, 8, 32, 60, 128, 5000)] == [8, 8, 8, 15, 32, 32]
