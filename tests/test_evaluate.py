"""The sums behind eval's figures, each against a computation by hand."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import plan_for, refused, t2t
from tiny_text import bert, llama, preprocessing, prose
from torch import Tensor
from transformers import BertForMaskedLM

from sbpatch.data.batch import Inputs, run
from sbpatch.data.loading import batches
from sbpatch.data.preprocessing import Preprocessing
from sbpatch.data.texts import Text
from sbpatch.data.tokens import passages, windows
from sbpatch.errors import SbpatchError
from sbpatch.evaluation.accounting import affordable, attention_memory_bytes, exact_sites
from sbpatch.evaluation.evaluate import Totals, check_classes
from sbpatch.evaluation.variants import VARIANTS, Subject, as_generation_starts, eager_attention
from sbpatch.evaluation.workers import Workers
from sbpatch.models.answers import Scores, kept
from sbpatch.sites.calls import Call


@pytest.mark.parametrize(("mask", "causal"), [("none", False), ("none", True), ("bool", False), ("float", False)])
def test_eager_attention_is_sdpa(mask: str, causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 17, 8)
    allowed = torch.rand(2, 1, 17, 17) > 0.3
    allowed[..., 0] = True
    chosen = {"none": None, "bool": allowed, "float": torch.randn(2, 1, 17, 17)}[mask]
    call = Call(q, k, v, attn_mask=chosen, is_causal=causal, scale=0.3)
    torch.testing.assert_close(eager_attention(call), call.exact())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_eager_attention_on_grouped_heads(causal: bool, padded: bool) -> None:
    """Padded on the left, so that the first causal queries see no key."""
    q, (k, v) = torch.randn(2, 6, 17, 8), torch.randn(2, 2, 3, 17, 8)
    real = torch.arange(17) >= torch.tensor([[0], [5]])
    call = Call(q, k, v, is_causal=causal, enable_gqa=True, key_mask=real if padded else None)
    torch.testing.assert_close(eager_attention(call), call.exact())


# ---- what is kept of an answer, and what it comes to


def figures(answer: str, output: Tensor, exact: Tensor, inputs: Inputs, labels: Tensor) -> dict[str, float]:
    scores = Scores()
    for i in range(0, len(output), 2):  # in batches of two
        part = slice(i, i + 2)
        x = inputs[part] if isinstance(inputs, Tensor) else {name: t[part] for name, t in inputs.items()}
        found, true = (kept(answer, logits[part], x, labels[part]) for logits in (output, exact))
        scores.add(found, true)
    return scores.figures()


def test_classes_by_hand() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [9, 0, 0, 0, 0, 0]])
    exact = torch.tensor([[3.0, 2, 1, 0, -1, -2], [9, 1, 2, 3, 4, 5], [9, 0, 0, 0, 0, 0]])
    labels = torch.tensor([0, 0, -1])  # right; not even among five; no label
    found = figures("classes", logits, exact, torch.zeros(3, 1), labels)
    assert found == {"top1": 50, "top5": 50, "agreement": pytest.approx(200 / 3)}
    assert figures("classes", logits, exact, torch.zeros(3, 1), torch.full((3,), -1)).keys() == {"agreement"}


@pytest.mark.parametrize("stride", [None, 7, 300])
@torch.inference_mode()
def test_perplexity_against_a_plain_loop(stride: int | None) -> None:
    """Windows longer than what is looked at together, one at a time and in batches."""
    model, text = llama(), Text("t", prose(12))
    data = windows(text, preprocessing(300), stride=stride, limit=5)
    other = llama(seed=1)
    nll, same = [], []
    for inputs, labels in data:
        logits = model(input_ids=inputs["input_ids"][None]).logits[0].double()
        top = other(input_ids=inputs["input_ids"][None]).logits[0].argmax(-1)
        for position, label in enumerate(labels.tolist()):
            if label >= 0:
                nll.append(-math.log(float(logits[position].softmax(-1)[label])))
                same.append(bool(logits[position].argmax() == top[position]))
    scores = Scores()
    for inputs, labels in batches(data, 2):
        scores.add(*(kept("next-token", run(m, inputs), inputs, labels) for m in (model, other)))
    found = scores.figures()
    assert found.keys() == {"perplexity", "agreement"}
    assert found["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    assert found["agreement"] == pytest.approx(100 * sum(same) / len(same))
    assert 0 < found["agreement"] < 100


def test_perplexity_by_the_number_of_tokens_seen_before() -> None:
    """One window of 1,500 positions, the first 100 not scored: even odds up to the 1,024th token, one in four after it."""
    logits = torch.zeros(1, 1500, 4)
    logits[:, :1023, 2:] = -1e4  # what position i is asked for is token i + 1, before which i + 1 were seen
    labels = torch.ones(1, 1500, dtype=torch.long)
    labels[:, :100] = -1
    found = figures("next-token", logits, logits, {"input_ids": labels}, labels)
    assert found["perplexity_to_1k"] == pytest.approx(2)
    assert found["perplexity_1k_to_4k"] == pytest.approx(4)
    assert found["perplexity"] == pytest.approx(math.exp((923 * math.log(2) + 477 * math.log(4)) / 1400))
    assert "perplexity_from_4k" not in found
    short = figures("next-token", logits[:, :900], logits[:, :900], {"input_ids": labels[:, :900]}, labels[:, :900])
    assert short.keys() == {"perplexity", "agreement"}  # one range says nothing more


def test_eager_is_left_out_where_its_matrix_would_fill_the_memory() -> None:
    sites = plan_for(t2t(), "window").sites
    assert affordable(sites, None, 8, "float32") == [*VARIANTS]
    tokens = math.isqrt((4 << 30) // (4 * max(site.heads for site in sites)))
    assert "eager" in affordable(sites, tokens, 1, "float32")
    assert affordable(sites, tokens + 1, 1, "float32") == [*VARIANTS[1:]]
    assert "eager" in affordable(sites, tokens + 1, 1, "bfloat16")
    assert affordable(sites, tokens + 1, 2, "bfloat16") == [*VARIANTS[1:]]


@torch.inference_mode()
def test_cosine_is_over_real_tokens() -> None:
    model, other = bert(), bert(seed=1)
    data = passages(Text("t", prose(6, 75)), preprocessing(96))
    expected = []
    for inputs, _ in data:
        ids = inputs["input_ids"][inputs["attention_mask"].bool()][None]  # without padding
        a, b = (m(input_ids=ids).last_hidden_state[0].mean(0) for m in (model, other))
        expected.append(float(torch.cosine_similarity(a, b, dim=0)))
    scores = Scores()
    for inputs, labels in batches(data, 4):
        scores.add(*(kept("features", run(m, inputs), inputs, labels) for m in (model, other)))
    assert scores.figures() == {"cosine": pytest.approx(sum(expected) / 6, abs=1e-5)}
    assert abs(scores.figures()["cosine"]) < 0.9


@torch.inference_mode()
def test_masked_language_models_agree_on_real_tokens() -> None:
    model, other = bert(cls=BertForMaskedLM), bert(seed=1, cls=BertForMaskedLM)
    data = passages(Text("t", prose(4, 75)), preprocessing(96))
    inputs, labels = next(batches(data, 4))
    a, b = (run(m, inputs) for m in (model, other))
    assert a.shape == (4, 96, 64)
    found = figures("tokens", a, b, inputs, labels)
    assert found == {"agreement": pytest.approx(100 * float((a.argmax(-1) == b.argmax(-1))[:, :75].float().mean()))}
    assert figures("tokens", a, a, inputs, labels) == {"agreement": 100}


def test_features_of_images() -> None:
    """(B, n, C) over tokens, (B, C, H, W) over pixels, (B, C) as they are."""
    tokens, labels, images = torch.randn(3, 20, 8), torch.full((3,), -1), torch.randn(3, 3, 9, 9)
    expected = torch.nn.functional.normalize(tokens.double().mean(1), dim=-1).numpy()
    for output in (tokens, tokens.mT.reshape(3, 8, 4, 5), tokens.mean(1)):
        np.testing.assert_allclose(kept("features", output, images, labels)["embedding"], expected, atol=1e-6)
    assert figures("features", tokens, 3 * tokens, images, labels) == {"cosine": pytest.approx(1)}
    assert figures("features", tokens, -tokens, images, labels) == {"cosine": pytest.approx(-1)}


@pytest.mark.parametrize("answer", ["classes", "next-token", "tokens", "features"])
def test_values_that_are_not_finite_are_refused(answer: str) -> None:
    shape = (2, 7) if answer == "classes" else (2, 300, 7)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    output = torch.randn(shape)
    kept(answer, output, torch.zeros(2, 1), labels)
    output.view(-1)[-1] = torch.nan
    assert "not finite" in refused(kept, answer, output, torch.zeros(2, 1), labels)


def test_answers_of_another_shape_are_refused() -> None:
    labels = torch.zeros(2, 9, dtype=torch.int64)
    assert "(2, 5)" in refused(kept, "next-token", torch.randn(2, 5), torch.zeros(2, 9), labels)
    assert "(2, 9, 5)" in refused(kept, "classes", torch.randn(2, 9, 5), torch.zeros(2, 9), labels[:, 0])


# ---- time, memory, and what is refused


@torch.inference_mode()
def test_memory_is_that_of_a_prefill() -> None:
    inputs, _ = windows(Text("t", prose()), preprocessing(64))[0]
    batch = {name: tensor[None] for name, tensor in inputs.items()}
    model = llama()
    last = run(model, as_generation_starts(model, batch))
    assert last.shape[:2] == (1, 1)
    torch.testing.assert_close(last, run(model, batch)[:, -1:])
    assert as_generation_starts(bert(), batch) is batch
    assert as_generation_starts(t2t(), torch.zeros(1)).shape == (1,)


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
    model = SimpleNamespace(name="m", classes=10)
    check_classes(model, SimpleNamespace(name="d", classes=10))
    check_classes(model, SimpleNamespace(name="d", classes=None))
    with pytest.raises(SbpatchError, match="d has 1000 classes and m 10"):
        check_classes(model, SimpleNamespace(name="d", classes=1000))


def asked(workers: Workers, variant: str) -> np.ndarray:
    """What a variant of the embedded model says of the same two images: its logits, of length 1."""
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    found: np.ndarray = workers.ask(variant, "batch", images.numpy(), np.zeros(2, dtype=np.int64))[0]["embedding"]
    return found


DEMO = Subject("t2t-vit-demo", answer="features")


def running(process: int) -> bool:
    """Whether it has not ended; one that has may wait to be reaped by whoever inherits it."""
    place = Path(f"/proc/{process}/stat")
    return place.exists() and place.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture
def workers() -> Iterator[Workers]:
    found = Workers()
    yield found
    found.end()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not fork a process that has loaded a model")
def test_forked_variants_answer_as_spawned_ones_do(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    workers.start(DEMO, ["eager", "sdpa"])
    eager, sdpa = asked(workers, "eager"), asked(workers, "sdpa")
    monkeypatch.setattr("sbpatch.evaluation.workers.FORKS", False)
    spawned = Workers()
    try:
        spawned.start(DEMO, ["sdpa"])
        expected = asked(spawned, "sdpa")
    finally:
        spawned.end()
    assert np.array_equal(sdpa, expected)
    assert np.allclose(eager, expected, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not fork a process that has loaded a model")
def test_a_variant_that_was_killed_says_so_and_the_others_go_on(workers: Workers) -> None:
    workers.start(DEMO, ["eager", "sdpa"])
    asked(workers, "sdpa")
    (first,) = (process.pid for process in workers.started)
    eager, sdpa = map(int, Path(f"/proc/{first}/task/{first}/children").read_text().split())
    os.kill(eager, signal.SIGKILL)
    assert "the process of variant 'eager' ended early" in refused(asked, workers, "eager")
    asked(workers, "sdpa")
    workers.end()
    for _ in range(100):  # until the system has taken it away
        if not running(sdpa):
            break
        time.sleep(0.05)
    assert not running(sdpa)


def test_a_model_that_cannot_be_loaded_is_refused_by_the_first_question(workers: Workers) -> None:
    workers.start(Subject("nowhere.pth"), ["sdpa"])
    assert "nowhere.pth" in refused(asked, workers, "sdpa")
