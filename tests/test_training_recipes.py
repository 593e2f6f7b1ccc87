"""The recipes that train on sequences run: their tasks are what they say, their tables are written, stopped runs go on."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import ROOT

TINY = "--tokens 64 --entries 24 --width 8 --heads 2 --batch 2 --steps 2 --methods full scatterbrain local"


@pytest.fixture(autouse=True)
def _where_recipes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))


def run(name: str, out: Path, monkeypatch: pytest.MonkeyPatch, args: str = "") -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, "--json", str(out), *f"{TINY} {args}".split()])
    importlib.import_module(name).main()
    return json.loads(out.read_text(encoding="utf-8"))


def listops() -> ModuleType:
    return importlib.import_module("train_listops")


# -- the tasks -------------------------------------------------------------------------------------------------------


def test_copy_asks_for_the_second_word_alone() -> None:
    copy = importlib.import_module("train_copy")
    batch = copy.sequences(16, 3, torch.Generator().manual_seed(0))
    assert torch.equal(batch.tokens[:, :8], batch.tokens[:, 8:])
    assert not batch.tokens[:, [0, 8]].any()
    assert batch.tokens[:, 1:8].min() >= 1
    assert batch.tokens.max() <= copy.SYMBOLS
    assert torch.equal(batch.targets[:, 8:-1], batch.tokens[:, 9:])
    assert (batch.targets[:, [*range(8), 15]] < 0).all()
    assert not torch.equal(batch.tokens[0], batch.tokens[1])


def value(symbols: list[str]) -> int:
    """Of an expression, by a stack."""
    open_ones: list[list[Any]] = []
    for symbol in symbols:
        if symbol.startswith("["):
            open_ones.append([symbol])
        elif symbol != "]":
            open_ones[-1].append(int(symbol))
        else:
            operator, *values = open_ones.pop()
            ordered = sorted(values)
            middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2
            found = {"[MIN": ordered[0], "[MAX": ordered[-1], "[MED": middle, "[SM": sum(values) % 10}[operator]
            if not open_ones:
                return found
            open_ones[-1].append(found)
    raise AssertionError("not closed")


def test_listops_are_worth_what_they_say() -> None:
    recipe = listops()
    batch = recipe.expressions(128, 40, torch.Generator().manual_seed(1))
    assert batch.real is not None
    for tokens, real, target in zip(batch.tokens, batch.real, batch.targets, strict=True):
        count = int(real.sum())
        assert 32 <= count <= 128
        assert real[:count].all()
        assert (tokens[count:] == recipe.PADDING).all()
        symbols = [recipe.SYMBOLS[i] for i in tokens[:count].tolist()]
        assert value(symbols) == int(target)
    assert len(batch.tokens[:, 0].unique()) == 4
    again = recipe.expressions(128, 40, torch.Generator().manual_seed(1))
    assert torch.equal(batch.tokens, again.tokens)


def test_guesses_count_the_most_frequent() -> None:
    recipe = listops()
    first = torch.tensor([[10, 1], [10, 1], [11, 1], [11, 1], [11, 1]])  # two [MIN, three [MAX
    batch = recipe.Batch(first, torch.tensor([0, 0, 9, 9, 0]))
    assert recipe.guesses([batch]) == {
        "chance": 10.0,
        "most frequent digit": 60.0,
        "most frequent digit of the first operator": 80.0,
    }


# -- the runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "figure"), [("train_copy", "perplexity"), ("train_listops", "accuracy")])
def test_one_command_writes_figures_and_a_table(
    name: str, figure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "folder" / "run.json"
    few = "--test 20" if name == "train_listops" else ""
    found = run(name, out, monkeypatch, few)
    full, scatterbrain, local = found["rows"]
    assert [row["method"] for row in found["rows"]] == ["full", "scatterbrain", "local"]
    assert all(row["perplexity"] >= 1 and 0 <= row["accuracy"] <= 100 for row in found["rows"])
    assert full["stored"] == 64
    assert max(scatterbrain["stored"], local["stored"]) <= 24
    assert [at["step"] for at in full["course"]] == [1, 2]
    end = full["course"][-1]
    assert all(0 < x < 4.2 for x in end["entropy"])  # of ln 64 nats at most
    assert all(0 < x < 3 for x in [*end["scatterbrain"], *end["local"]])
    assert scatterbrain["course"][-1].keys() == {"step", "loss", "entropy", "scatterbrain"}
    table = out.with_suffix(".md").read_text(encoding="utf-8")
    assert f"| attention | entries a row | {figure} |" in table
    assert f"| full | 64 | {full[figure]:.2f} |" in table

    before = out.read_bytes()
    run(name, out, monkeypatch, few)
    assert out.read_bytes() == before  # nothing is trained again
    two = run(name, out, monkeypatch, f"{few} --seeds 2")["rows"]
    assert two[:3] == found["rows"]
    assert [(row["method"], row["seed"]) for row in two[3:]] == [("full", 1), ("scatterbrain", 1), ("local", 1)]
    assert two[3]["perplexity"] != full["perplexity"]


def test_the_same_seed_gives_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [run("train_copy", tmp_path / f"{i}.json", monkeypatch)["rows"] for i in range(2)]
    for row in [*rows[0], *rows[1]]:
        del row["cpu_seconds"]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_full_attention_learns_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And attention to the 15 to 16 tokens around, of which none is the one to copy, does not."""
    small = "--tokens 64 --entries 16 --width 32 --batch 16 --steps 250 --lr 4e-3 --methods full local"
    full, local = run("train_copy", tmp_path / "run.json", monkeypatch, small)["rows"]
    assert full["perplexity"] < 2
    assert local["perplexity"] > 32


def test_what_cannot_be_is_refused_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run.json"
    with pytest.raises(SystemExit, match="unknown attention method 'perfomer'"):
        run("train_copy", out, monkeypatch, "--methods full perfomer")
    with pytest.raises(SystemExit, match="cannot work with 4 entries a row at a causal site of 64 keys"):
        run("train_copy", out, monkeypatch, "--entries 4")
    assert not out.exists()
    run("train_copy", out, monkeypatch)
    with pytest.raises(SystemExit, match="holds runs of other settings; name another file with --json"):
        run("train_copy", out, monkeypatch, "--lr 0.1")
