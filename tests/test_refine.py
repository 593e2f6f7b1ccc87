"""What is learned of a patch: only what helps on other samples, and what it is then is saved."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import PARAMETERS, plan_for, t2t
from torch import Tensor, nn

import sbpatch
from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.attention.per_head import Exact, PerHead
from sbpatch.attention.reference import scatterbrain_matrix
from sbpatch.calibration.refine import REFINED, factors_of, learn, set_factors
from sbpatch.progress import no_progress

# by quality alone: nothing is faster than exact attention on models this small (see test_costs)
calibrate = partial(sbpatch.calibrate, keep_slow=True)
BATCHES = list(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(3)).split(3))


@pytest.mark.parametrize("method", ["window+clusters", "clusters"])
def test_learned_numbers_are_those_of_the_dense_definition(method):
    """exp(sharpness q.c + gain) off the support, exp(q.k) on it."""
    layer = Scatterbrain(method, Geometry(60, 2, 8), 0, **PARAMETERS[method])
    layer.low_rank.sharpness.copy_(torch.tensor([1.1, 0.9]))
    if layer.gain is not None:
        layer.gain.copy_(torch.tensor([0.7, -0.3]))
    q, k, v = torch.randn(3, 1, 2, 60, 8)
    torch.testing.assert_close(
        layer(q, k, v).double(), scatterbrain_matrix(layer, q, k, 8**-0.5) @ v.double(), rtol=1e-4, atol=1e-5
    )
    other = Scatterbrain(method, Geometry(60, 2, 8), 0, **PARAMETERS[method])
    assert not torch.allclose(layer(q, k, v), other(q, k, v), atol=1e-3)


def test_factors_of_a_site_whose_heads_differ():
    site, one = Geometry(80, 4, 8), Geometry(80, 1, 8)
    parts = [
        Exact(one),
        Scatterbrain("window+clusters", Geometry(80, 2, 8), 0, window=5, rank=4),
        Scatterbrain("window", one, 0, window=5),
    ]
    layer = PerHead(site, [[2], [3, 0], [1]], parts)
    assert {name: len(values) for name, values in factors_of(layer).items()} == {"gain": 4, "sharpness": 4}
    set_factors(layer, {"gain": torch.tensor([1.0, 2, 3, 4]), "sharpness": torch.tensor([0.1, 0.2, 0.3, 0.4])})
    assert parts[1].gain.tolist() == [4.0, 1.0]
    torch.testing.assert_close(parts[1].low_rank.sharpness, torch.tensor([0.4, 0.1]).exp())
    torch.testing.assert_close(factors_of(layer)["sharpness"], torch.tensor([0.1, 0, 0, 0.4]))
    assert factors_of(Exact(site)) == factors_of(Scatterbrain("window", site, 0, window=5)) == {}


class Alike(nn.Module):
    """96 keys that are twelve vectors, eight times each: twelve clusters with a sharpness of 1 are exact."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("keys", torch.randn(12, 8, generator=generator).repeat_interleave(8, 0))
        self.register_buffer("values", torch.randn(96, 8, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        k, v = (t.expand(len(x), 1, -1, -1) for t in (self.keys, self.values))
        return nn.functional.scaled_dot_product_attention(x[:, None], k, v).mean((1, 2))


@pytest.mark.parametrize("start", [1.35, 0.75])
def test_from_either_side_it_comes_to_what_is_exact(start):
    model, batches = nn.Sequential(Alike()), list(torch.randn(6, 96, 8).split(2))
    plan = calibrate(model, batches, budget=0.14, min_tokens=2, method="clusters", allocation="measured")
    (name,) = plan.tensors
    plan.tensors[name] = torch.full((1,), start)
    plan = learn(model, plan, batches, "classes", (0.12, *REFINED), no_progress)
    assert float(plan.tensors[name]) == pytest.approx(1.0, abs=0.02)


def test_one_sample_teaches_nothing():
    """There would be none left to confirm it on."""
    plan = plan_for(t2t(), "clusters")
    before = {name: t.clone() for name, t in plan.tensors.items()}
    plan = learn(t2t(), plan, [BATCHES[0][:1]], "classes", REFINED, no_progress)
    assert all(torch.equal(t, before[name]) for name, t in plan.tensors.items())


def test_what_was_learned_is_in_the_plan_and_comes_back():
    model = t2t()
    plans = [
        calibrate(model, BATCHES, budget=0.1, min_tokens=64, method="clusters", refine=refine)
        for refine in (False, True)
    ]
    assert all(name.endswith("sharpness") for name in plans[0].tensors)
    for plan in plans:
        for name, layer in plan.layers().items():
            assert torch.equal(layer.low_rank.sharpness, plan.tensors[f"{name}.low_rank.sharpness"])
    again = calibrate(model, BATCHES, budget=0.1, min_tokens=64, method="clusters", refine=True)
    assert all(torch.equal(plans[1].tensors[name], again.tensors[name]) for name in again.tensors)
