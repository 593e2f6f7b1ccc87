"""The sums behind eval's figures, each against a computation by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import t2t

from sbpatch.errors import SbpatchError
from sbpatch.evaluate import Subject, Totals, attention_memory_bytes, check_classes, eager_attention, exact_sites
from sbpatch.preprocessing import Preprocessing
from sbpatch.sites import Call


@pytest.mark.parametrize(("mask", "causal"), [("none", False), ("none", True), ("bool", False), ("float", False)])
def test_eager_attention_is_sdpa(mask: str, causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 17, 8)
    allowed = torch.rand(2, 1, 17, 17) > 0.3
    allowed[..., 0] = True
    chosen = {"none": None, "bool": allowed, "float": torch.randn(2, 1, 17, 17)}[mask]
    call = Call(q, k, v, attn_mask=chosen, is_causal=causal, scale=0.3)
    torch.testing.assert_close(eager_attention(call), call.exact())


def test_totals_by_hand() -> None:
    totals = Totals()
    logits = np.array([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [9, 0, 0, 0, 0, 0]])
    exact = np.array([[3.0, 2, 1, 0, -1, -2], [9, 1, 2, 3, 4, 5], [9, 0, 0, 0, 0, 0]])
    totals.add(logits, exact, np.array([0, 0, -1]))  # right; not even among five; no label
    totals.ms = [10.0]
    figures = totals.figures(batch_size=3)
    assert figures["top1"] == 50
    assert figures["top5"] == 50
    assert figures["agreement"] == pytest.approx(200 / 3)
    assert figures["samples_per_second"] == 300
    unlabelled = Totals()
    unlabelled.add(logits, exact, np.array([-1, -1, -1]))
    unlabelled.ms = [10.0]
    assert "top1" not in unlabelled.figures(3)


def test_a_short_last_batch_is_no_latency() -> None:
    totals = Totals(seen=20, ms=[10.0, 12.0, 1.0])  # 8 + 8 + 4
    assert totals.figures(8)["latency_ms"] == 11


def test_attention_memory_by_the_budgets_accounting() -> None:
    checkpoint = SimpleNamespace(model=t2t(), preprocessing=Preprocessing(input_size=(3, 96, 96)))
    sites = exact_sites(checkpoint)
    tokens = [(s.tokens, s.heads) for s in sites]
    assert tokens[:2] == [(576, 1), (144, 1)]
    assert attention_memory_bytes(sites, "eager", Subject("m")) == 4 * sum(h * n * n for n, h in tokens)
    assert attention_memory_bytes(sites, "sdpa", Subject("m", dtype="float16")) == 2 * sum(h * n for n, h in tokens)
    sites[0].decision, sites[0].budget = "patch", 0.25
    expected = 4 * (576 * 576 // 4 + sum(h * n for n, h in tokens[1:]))
    assert attention_memory_bytes(sites, "patched", Subject("m")) == expected


def test_other_classes_are_refused() -> None:
    model = SimpleNamespace(name="m", config={"classes": 10})
    check_classes(model, SimpleNamespace(name="d", classes=10))
    check_classes(model, SimpleNamespace(name="d", classes=None))
    with pytest.raises(SbpatchError, match="d has 1000 classes and m 10"):
        check_classes(model, SimpleNamespace(name="d", classes=1000))
