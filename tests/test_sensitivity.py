"""Gradients of the answer against autograd by hand, and damage against what a small change really does."""

from __future__ import annotations

import pytest
import torch
from tiny import t2t
from torch import Tensor, nn

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.attention.per_head import Exact
from sbpatch.calibration import weigh
from sbpatch.calibration.candidates import Candidate
from sbpatch.calibration.sensitivity import DIRECTIONS, answer_gradients, damage, damages
from sbpatch.sites.calls import Call
from sbpatch.sites.find import find_sites
from sbpatch.sites.swap import swapped

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


class Values(nn.Module):
    """Attention over one token puts out its value."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


class OneToken(nn.Module):
    """(B, 8) -> logits (B, 1, 6) of a vocabulary, or (B, 6) of classes."""

    def __init__(self, classes: bool) -> None:
        super().__init__()
        self.classes, self.inner, self.head = classes, Values(), nn.Linear(8, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.head(self.inner(input_ids.float().view(-1, 1, 1, 8)).flatten(1))
        return logits if self.classes else logits[:, None]


def changed(model: nn.Module, inputs: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Answers without and with a change of the site's output."""
    with torch.inference_mode():
        before = model(inputs)
        with swapped(model, {"inner": lambda call: call.exact() + change}):
            return before, model(inputs)


def test_a_classifier_s_damage_is_the_squared_change_of_its_logits_on_average():
    model = OneToken(classes=True)
    x, change = torch.randn(1, 8), torch.randn(1, 1, 1, 8)
    before, after = changed(model, x, change)
    moved = (after - before) - (after - before).mean(-1, keepdim=True)
    draws = [
        damage(change, torch.zeros_like(change), answer_gradients(model, ["inner"], x, "classes", seed)["inner"])
        for seed in range(2000)
    ]
    assert float(torch.stack(draws).mean()) == pytest.approx(float(moved.square().sum()), rel=0.12)


@pytest.mark.parametrize("sure", [1.0, 30.0], ids=["in doubt", "sure"])
def test_a_language_model_s_damage_is_the_variance_of_its_logits_changes_however_sure_it_is(sure):
    model, change = OneToken(classes=False), torch.randn(1, 1, 1, 8)
    with torch.no_grad():
        model.head.bias[0] += sure
    x = torch.randn(1, 8)
    before, after = changed(model, x, change)
    draws = [
        damage(
            change,
            torch.zeros_like(change),
            answer_gradients(model, ["inner"], {"input_ids": x}, "next-token", s)["inner"],
        )
        for s in range(2000)
    ]
    wanted = float((after - before).var(-1, correction=0))
    assert float(torch.stack(draws).mean()) == pytest.approx(wanted, rel=0.12)


def test_padding_asks_nothing_of_a_language_model():
    model = OneToken(classes=False)
    inputs = {"input_ids": torch.randn(2, 8), "attention_mask": torch.tensor([[1], [0]])}
    plain = {"input_ids": inputs["input_ids"]}
    model.forward = lambda input_ids, attention_mask=None: OneToken.forward(model, input_ids)
    found, without = (answer_gradients(model, ["inner"], x, "next-token", 3)["inner"] for x in (inputs, plain))
    assert torch.equal(found[:, 0], without[:, 0])
    assert not found[:, 1].any()
    assert without[:, 1].any()


def test_gradients_of_all_sites_at_once():
    """Against a finite difference: the answer moves along each drawn direction by g . D."""
    model = t2t()
    names = [site.name for site in find_sites(model, IMAGES[:1])]
    found = answer_gradients(model, names, IMAGES, "classes", 7)
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(2, 5, generator=generator) for _ in range(DIRECTIONS["classes"])]
    with torch.inference_mode():
        before = model(IMAGES)
        for name in names:
            change = 1e-3 * torch.randn(found[name].shape[1:])

            def moved(call: Call, change: Tensor = change) -> Tensor:
                return call.exact() + change

            with swapped(model, {name: moved}):
                after = model(IMAGES)
            logits = (after - before) - (after - before).mean(-1, keepdim=True)
            for gradient, direction in zip(found[name], directions, strict=True):
                expected = float((logits * direction).sum())
                assert float((gradient * change).sum()) == pytest.approx(expected, rel=0.05, abs=2e-4)


def test_weights_keep_their_flags_and_get_no_gradients():
    model = t2t()
    model.head.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.inference_mode():  # calibration runs in it
        answer_gradients(model, ["blocks.0.attn"], IMAGES, "features", 0)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(hasattr(m, "sbpatch") for m in model.modules())


def test_errors_that_add_up_do_more_damage_than_errors_that_cancel():
    """Errors that are alike at all n tokens move the answer n^2 times as far, squared, independent ones n times."""
    gradient, n = torch.ones(3, 1, 2, 50, 4), 50
    alike, exact = torch.full((1, 2, n, 4), 0.1), torch.zeros(1, 2, n, 4)
    apart, together = damages(alike, exact, gradient)
    torch.testing.assert_close(together, n * apart)
    assert torch.equal(apart, damage(alike, exact, gradient))
    signs = torch.tensor([1.0, -1.0]).repeat(n // 2)[:, None]
    assert float(damages(alike * signs, exact, gradient)[1].max()) < 1e-9
    site = Geometry(n, 2, 4)
    tried = [Candidate(Scatterbrain("clusters", site, 0, rank=rank)) for rank in (2, 8)]
    tried.append(Candidate(Exact(site)))
    for candidate, size in zip(tried, (1.0, 0.01, 0.0), strict=True):
        candidate.damage_sum += size * apart.double()
        candidate.together_sum += size * together.double()
        candidate.seen = 1
    weigh.coherence(tried)
    assert [candidate.coherence for candidate in tried] == pytest.approx([n, n, 1.0])
    torch.testing.assert_close(tried[0].damages, together[0].double())
