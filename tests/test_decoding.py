"""Decoding beside the exact model: what eval's --generate computes, shows and refuses."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import command
from tiny_text import bert, llama, preprocessing, prose, words
from transformers import DynamicCache
from transformers_coverage import plan_on

from sbpatch.cli.decoding import decoding_figures
from sbpatch.data.texts import Text
from sbpatch.data.tokens import windows
from sbpatch.evaluation.decoding import Variant, decoding
from sbpatch.evaluation.evaluate import Subject
from sbpatch.generation.cache import CompressedCache
from sbpatch.generation.settings import Settings
from sbpatch.models.load import load_checkpoint
from sbpatch.plan import artifact
from sbpatch.plan.report import decoded_table

LENGTH, TOKENS = 160, 20
FEW = Settings(budget=0.5, block=4, recent=8, run=16, least=0)


def both(model, other=None, how: Settings = FEW) -> dict[str, Variant]:
    other = other or model
    return {
        "sdpa": Variant(model, lambda: DynamicCache(config=model.config)),
        "patched": Variant(other, lambda: CompressedCache(other.config, how)),
    }


def test_figures_against_one_forward_and_generate():
    """The exact variant: token by token is what one forward over the window says, and the continuation is `generate`'s."""
    model, data = llama(), windows(Text("t", prose()), preprocessing(LENGTH))
    found = decoding(both(model), data, TOKENS, windows=2)
    scores, likeliest = [], []
    for index in (0, len(data) // 2):
        inputs, labels = data[index]
        logits = model(inputs["input_ids"][None]).logits[0, -TOKENS:].log_softmax(-1)
        scores += logits.gather(1, labels[-TOKENS:, None]).flatten().tolist()
        likeliest += logits.argmax(-1).tolist()
    assert found["sdpa"]["decoded_perplexity"] == pytest.approx(math.exp(-sum(scores) / len(scores)), rel=1e-4)
    assert found["sdpa"]["decoded_agreement"] == found["sdpa"]["continuation_agreement"] == 100
    assert "cache_read" not in found["sdpa"]
    patched = found["patched"]
    assert 0.2 < patched["cache_read"] <= 0.5
    assert patched["decoded_perplexity"] != found["sdpa"]["decoded_perplexity"]
    assert patched["tokens_per_second"] > 0


def test_the_continuation_is_what_generate_gives():
    model, data = llama(), windows(Text("t", prose()), preprocessing(LENGTH), limit=1)
    prompt = data[0][0]["input_ids"][: LENGTH - TOKENS + 1]  # and the first decoded token
    wanted = model.generate(prompt[None], max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, -TOKENS:]
    other = llama(seed=1)
    theirs = other.generate(prompt[None], max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, -TOKENS:]
    found = decoding(both(model, other, Settings(budget=1.0)), data, TOKENS)
    assert found["patched"]["continuation_agreement"] == pytest.approx(100 * (wanted == theirs).float().mean())
    assert "cache_read" in found["patched"]


def saved(tmp_path: Path, model: torch.nn.Module) -> Path:
    model.save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    Path(tmp_path / "text.txt").write_text(prose(), encoding="utf-8")
    return tmp_path / "model"


@pytest.mark.parametrize("patched", [False, True])
def test_a_model_is_decoded_beside_its_patch_or_its_compressed_cache(patched, tmp_path):
    """A directory's own plan, or, where there is none, the exact prompt with the compressed cache."""
    folder = saved(tmp_path, llama())
    loaded = load_checkpoint(str(folder), input_size=LENGTH)
    if patched:
        artifact.save(tmp_path / "out", loaded, plan_on(loaded))
        folder = tmp_path / "out"
    data = windows(Text("t", prose()), loaded.preprocessing, limit=2)
    result = {"variants": {"sdpa": {"latency_ms": 1.0}}, "length": LENGTH}
    decoding_figures(Subject(str(folder), answer="next-token"), loaded, data, TOKENS, result, quiet=True)
    assert result["decoded"] == {"windows": 2, "prompt": 140, "tokens": 20}
    second = "patched" if patched else "compressed"
    assert set(result["variants"]) == {"sdpa", second}
    assert result["variants"][second]["cache_read"] == 1  # so short a past is read whole
    ratio = result["variants"][second]["decoded_perplexity"] / result["variants"]["sdpa"]["decoded_perplexity"]
    assert (ratio == pytest.approx(1, rel=1e-3)) == (not patched)
    console = Console(width=80, record=True, file=StringIO())
    console.print(decoded_table(result))
    shown = console.export_text()
    assert f"{ratio:.4f}x" in shown
    assert all(any(line.strip().startswith(name) for line in shown.splitlines()) for name in ("sdpa", second))


@pytest.mark.slow
def test_eval_shows_decoding_beside_the_rest(tmp_path, capsys):
    folder = saved(tmp_path, llama())
    place = tmp_path / "eval.json"
    asked = ["eval", str(folder), "--dataset", str(tmp_path / "text.txt"), "--length", str(LENGTH), "--limit", "2"]
    assert command(*asked, "--generate", str(TOKENS), "--device", "cpu", "--json", str(place)) == 0
    assert "decoding 20 tokens after a prompt of 140, 2 windows" in capsys.readouterr().out
    variants = json.loads(place.read_text())["variants"]
    assert {"tokens_per_second", "latency_ms"} <= set(variants["sdpa"])
    assert {"tokens_per_second", "cache_read"} <= set(variants["compressed"])
    assert "decoded_perplexity" not in variants["eager"]


def test_what_cannot_be_decoded_is_refused(tmp_path, capsys):
    folder, text = saved(tmp_path, llama()), str(tmp_path / "text.txt")
    encoder = saved(tmp_path / "encoder", bert())
    for flags, said in (
        (["eval", str(folder), "--dataset", text, "--length", "20", "--generate", "20"], "leaves no prompt"),
        (["eval", str(encoder), "--dataset", text, "--generate", "20"], "for causal language models"),
        (["eval", str(folder), "--dataset", "needle", "--generate", "20"], "--generate with --dataset needle"),
        (["eval", str(folder), "--dataset", text, "--lengths", "20,30"], "--lengths with --dataset"),
        (["eval", str(folder), "--dataset", text, "--plot", "x.png"], "--plot with --dataset"),
    ):
        assert command(*flags) == 1
        assert said in capsys.readouterr().err
