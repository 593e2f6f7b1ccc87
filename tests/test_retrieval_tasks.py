"""Retrieval tasks, and what eval makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import refused
from tiny_text import llama, preprocessing, prose, words
from transformers import DynamicCache
from transformers_coverage import plan_on
from typer.testing import CliRunner

from sbpatch.cli import commands as cli
from sbpatch.data.retrieval import DEPTHS, NAMES, Task, tasks
from sbpatch.data.texts import Text
from sbpatch.evaluation.retrieval import retrieval
from sbpatch.evaluation.retrieval_report import Chance
from sbpatch.generation.cache import CompressedCache
from sbpatch.models.load import load_checkpoint
from sbpatch.plan import artifact

TEXT = Text("prose", prose())


@pytest.mark.parametrize("name", NAMES)
def test_tasks_have_the_length_asked_for_and_are_drawn_by_the_seed(name: str) -> None:
    found, again = (tasks(name, TEXT, preprocessing(200), each=2, seed=3) for _ in range(2))
    assert [task.depth for task in found] == [depth for depth in DEPTHS for _ in range(2)]
    for one, other in zip(found, again, strict=True):
        assert len(one.context) + len(one.question) + len(one.answer) == 200
        assert torch.equal(one.context, other.context)
    other = tasks(name, TEXT, preprocessing(200), each=2, seed=4)
    assert not all(torch.equal(a.context, b.context) for a, b in zip(found, other, strict=True))


def test_the_fact_stands_at_its_depth() -> None:
    """The tokenizer knows none of the fact's words, so that all of it is [UNK], and nothing else is."""
    text = Text("words", " ".join(f"w{i % 61}" for i in range(900)))
    for task in tasks("passkey", text, preprocessing(400), each=3):
        places = (task.context == 1).nonzero().flatten()
        before = places[0] / (len(task.context) - len(places))
        assert abs(float(before) - task.depth) < 0.01


def test_what_cannot_be_made_is_refused() -> None:
    assert "known are passkey, needle" in refused(tasks, "haystack", TEXT, preprocessing(200))
    assert "--length" in refused(tasks, "passkey", TEXT, preprocessing(20))
    assert "--length" in refused(tasks, "passkey", Text("short", "w1 w2"), preprocessing(200))


def test_an_answer_is_right_where_the_model_says_it() -> None:
    """Tasks whose answer is what the model generates anyway, and tasks with another one."""
    model, make = llama(), torch.Generator().manual_seed(1)
    context, question = (torch.randint(3, 60, (n,), generator=make) for n in (90, 6))
    said = model.generate(torch.cat([context, question])[None], max_new_tokens=3, do_sample=False)[0, 96:]
    right, wrong = Task(context, question, said, 0.05), Task(context, question, (said + 1) % 60, 0.5)
    for cache in (DynamicCache, CompressedCache):
        found = retrieval(model, [right, wrong, right], make_cache=lambda cache=cache: cache(config=model.config))
        assert found["by_depth"] == {"0.05": 100.0, "0.5": 0.0}
        assert found["accuracy"] == pytest.approx(200 / 3)
        assert ("cache_read" in found) == (cache is CompressedCache)


@pytest.mark.parametrize("patched", [False, True])
def test_eval_shows_the_exact_cache_beside_the_compressed_one(patched: bool, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    if patched:
        loaded = load_checkpoint(str(tmp_path / "model"), input_size=200)
        artifact.save(tmp_path / "model-out", loaded, plan_on(loaded))
    folder = tmp_path / ("model-out" if patched else "model")
    command = ["eval", str(folder), "--dataset", "needle", "--length", "200", "--limit", "5", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, [*command, "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    assert "cache read" in done.output
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["samples"] == 5
    assert result["length"] == 200
    second = "patched" if patched else "compressed"
    assert set(result["variants"]) == {"sdpa", second}
    assert set(result["variants"][second]["by_depth"]) == {f"{depth:g}" for depth in DEPTHS}


def test_eval_over_several_lengths_and_its_heat_map(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    asked = ["eval", str(tmp_path / "model"), "--dataset", "needle", "--limit", "10", "--device", "cpu"]
    places = [tmp_path / "out.json", tmp_path / "out.png"]
    asked += ["--json", str(places[0]), "--plot", str(places[1])]
    done = CliRunner().invoke(cli.app, [*asked, "--lengths", "120,200"])
    assert done.exit_code == 0, done.output
    assert "too near to chance" in " ".join(done.output.split())  # the model knows nothing
    result = json.loads(places[0].read_text())
    assert (result["lengths"], result["near_chance"], result["samples"]) == ([120, 200], [120, 200], 20)
    for figures in result["variants"].values():
        parts = figures["by_length"]
        assert set(parts) == {"120", "200"}
        assert figures["accuracy"] == sum(part["accuracy"] for part in parts.values()) / 2
    with Image.open(places[1]) as picture:
        assert picture.format == "PNG"
    both = CliRunner().invoke(cli.app, [*asked, "--lengths", "120,200", "--length", "120"])
    assert both.exit_code == 2
    assert "--length / --lengths" in both.output


@pytest.mark.parametrize(
    ("percent", "tasks", "found", "near"),
    [(0, 20, 0, True), (0, 20, 15, False), (25, 5, 60, True), (25, 20, 50, False)],
)
def test_what_is_not_told_from_chance(percent: float, tasks: int, found: float, near: bool) -> None:
    assert Chance(percent, tasks).lengths({100: {"sdpa": {"accuracy": found}}}) == [100] * near
