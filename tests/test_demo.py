"""The embedded model, all its test images, budget 0.03, three seeds: the figures that README claims hold on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sbpatch
from sbpatch.data.sources import batches, open_images, sample_images
from sbpatch.models.checkpoint import Checkpoint
from sbpatch.models.load import load_checkpoint
from sbpatch.plan.recipe import read_recipe

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return load_checkpoint("t2t-vit-demo")


@pytest.fixture(scope="module")
def test_set(demo: Checkpoint) -> tuple[list[torch.Tensor], torch.Tensor]:
    pairs = list(batches(open_images("demo", demo.preprocessing), 24))
    return [x for x, _ in pairs], torch.cat([y for _, y in pairs])


@pytest.fixture(scope="module")
def exact(demo: Checkpoint, test_set: tuple[list[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([demo.model(x) for x in test_set[0]]).argmax(1)


def sample(demo: Checkpoint, seed: int, count: int = 32) -> list[torch.Tensor]:
    return [x for x, _ in batches(sample_images("demo", demo.preprocessing, count, seed), 8)]


def test_exact_accuracy(test_set: tuple[list[torch.Tensor], torch.Tensor], exact: torch.Tensor) -> None:
    assert len(exact) == 360
    assert (exact == test_set[1]).float().mean() >= 0.97


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_patched_accuracy_and_agreement(
    demo: Checkpoint, test_set: tuple[list[torch.Tensor], torch.Tensor], exact: torch.Tensor, seed: int
) -> None:
    plan = sbpatch.calibrate(demo.model, sample(demo, seed), budget=0.03, seed=seed, keep_slow=True)
    assert [s.tokens for s in plan.patched] == [3136, 784]
    assert 0.02 < plan.budget.used <= 0.03
    sbpatch.patch(demo.model, plan)
    try:
        with torch.inference_mode():
            logits = torch.cat([demo.model(x) for x in test_set[0]])
            again = demo.model(test_set[0][0])
    finally:
        sbpatch.unpatch(demo.model)
    patched, labels = logits.argmax(1), test_set[1]
    assert torch.equal(again, logits[: len(again)])
    assert abs((patched == labels).sum() - (exact == labels).sum()) <= 0.005 * len(labels)
    assert (patched == exact).float().mean() >= 0.99


def test_half_the_error_of_the_reference_setting_at_equal_budget(demo: Checkpoint) -> None:
    """In each of the two stages, each at the reference's own budget there; and for `auto` with both stages together."""
    images = sample(demo, 0, 8)
    reference, clusters = (
        sbpatch.calibrate(
            demo.model, images, budget=0.031, include=["tokens_to_token.*"], fixed=read_recipe(RECIPES / name).sites
        )
        for name in ("reference-setting.yaml", "equal-budget.yaml")
    )
    auto = sbpatch.calibrate(demo.model, images, budget=0.03, keep_slow=True)
    for theirs, ours, free in zip(reference.patched, clusters.patched, auto.patched, strict=True):
        assert theirs.budget is not None
        assert theirs.output_error is not None
        assert theirs.budget == pytest.approx(0.031, abs=0.001)
        assert ours.budget == pytest.approx(theirs.budget, abs=2e-4)
        assert ours.output_error is not None
        assert ours.output_error <= 0.5 * theirs.output_error
        assert free.output_error is not None
        assert free.output_error <= 0.5 * theirs.output_error
    assert auto.budget.used <= reference.budget.used
