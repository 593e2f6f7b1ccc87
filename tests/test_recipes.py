"""The training recipes run: a few steps on a few images, their tables written, stopped runs taken up alike."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from tiny import ROOT
from torch import nn


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lev() -> ModuleType:
    return recipe("train_lev_attention")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten classes of noise, two training images and a test image each."""
    for split, count in (("train", 2), ("test", 1)):
        for label in range(10):
            folder = tmp_path / "data" / split / f"{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (32 * 32 * 3,), dtype=torch.uint8).numpy().tobytes()
                Image.frombytes("RGB", (32, 32), pixels).save(folder / f"{i}.png")
    return tmp_path / "data"


def run(lev: ModuleType, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train_lev_attention.py", *args])
    lev.main()


def test_lev_attention_writes_its_table(
    lev: ModuleType, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lev, "DEPTH", 1)
    out = tmp_path / "lev"
    run(lev, monkeypatch, "--data", str(images), "-o", str(out), "--steps", "3", "--batch", "5", "--limit", "10")
    found = json.loads(out.with_suffix(".json").read_text())
    assert [(row["trained"], row["evaluated"]) for row in found["rows"]] == [
        ("all 197 keys", "all 197 keys"),
        ("all 197 keys", "64 keys"),
        ("all 197 keys", "32 keys"),
        ("64 keys", "64 keys"),
        ("32 keys", "32 keys"),
    ]
    assert all(0 <= row["top1"] <= 100 for row in found["rows"])
    assert (found["train"], found["test"]) == (20, 10)
    (share,) = found["shares"]
    assert share["step"] == 3
    assert 0 < share["mass_32"] < share["mass_64"] < 1
    assert out.with_suffix(".md").read_text().count("\n") == 7
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    run(lev, monkeypatch, "--data", str(images), "-o", str(out), "--steps", "3", "--batch", "5", "--limit", "10")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first  # nothing is trained again


def test_a_stopped_training_goes_on_alike(
    lev: ModuleType, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lev, "DEPTH", 1)
    monkeypatch.setattr(lev, "KEYS", (32,))
    monkeypatch.setattr(lev, "EVERY", 2)
    saved = torch.save
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    asked = ("--data", str(images), "--steps", "4", "--batch", "5", "--limit", "10")

    def stops(*args: object, **kwargs: object) -> None:
        saved(*args, **kwargs)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    run(lev, monkeypatch, *asked, "-o", str(whole))
    monkeypatch.setattr(torch, "save", stops)
    with pytest.raises(KeyboardInterrupt):
        run(lev, monkeypatch, *asked, "-o", str(stopped))
    (stopped / "all-197-keys.new").replace(stopped / "all-197-keys.pt")
    monkeypatch.setattr(torch, "save", saved)
    run(lev, monkeypatch, *asked, "-o", str(stopped))
    for name in ("all-197-keys.pt", "32-keys.pt"):
        one, other = (torch.load(folder / name, weights_only=True)["model"] for folder in (stopped, whole))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_restricted_heads_read_the_keys_of_largest_score_alone(lev: ModuleType) -> None:
    """With gradients: keys that are not in the set get none from the attention."""
    model = lev.fresh_model(0).eval()
    names, geometry = lev.sites()
    assert [name for name, m in model.named_modules() if type(m).__name__ == "Attention"] == names
    x = torch.randn(2, 3, lev.SIDE, lev.SIDE)
    exact = model(x)
    with lev.reading(model, geometry.tokens):
        torch.testing.assert_close(model(x), exact)
    with lev.reading(model, 32):
        found = model(x)
    assert not torch.allclose(found, exact, atol=1e-3)
    assert torch.equal(model(x), exact)
    with lev.reading(model.train(), 32):
        loss = nn.functional.cross_entropy(model(x), torch.tensor([1, 2]))
    gradients = torch.autograd.grad(loss, [m.qkv.weight for m in model.modules() if type(m).__name__ == "Attention"])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


def test_the_form_that_trains_is_the_layer_that_is_evaluated(lev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the precision of bfloat16, in which it computes."""
    monkeypatch.setattr(lev, "DEPTH", 1)
    model, x = lev.fresh_model(0), torch.randn(2, 3, lev.SIDE, lev.SIDE)
    for keys in (None, 64, 32):
        with lev.reading(model.train(), keys):
            trained = model(x)
        with lev.reading(model.eval(), keys):
            torch.testing.assert_close(model(x), trained.float(), atol=2e-3, rtol=0.02)
