"""The training recipes run: a few steps on a few images, their tables written, stopped runs taken up alike."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import tiny_text
import torch
from PIL import Image
from tiny import ROOT
from torch import Tensor, nn


def recipe(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        return importlib.import_module(name)


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
    for other in (("--batch", "4"), ("--batch", "5", "--stem", "convolutions"), ("--batch", "5", "--seed", "1")):
        with pytest.raises(SystemExit, match=r"all-197-keys\.pt is of a run with other settings; name another folder"):
            run(lev, monkeypatch, "--data", str(images), "-o", str(out), "--steps", "3", "--limit", "10", *other)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


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


@pytest.mark.parametrize("stem", ["patches", "convolutions"])
def test_restricted_heads_read_the_keys_of_largest_score_alone(lev: ModuleType, stem: str) -> None:
    """With gradients: keys that are not in the set get none from the attention."""
    model = lev.fresh_model(0, stem).eval()
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


# -- GLUE ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glue() -> ModuleType:
    return recipe("glue")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    tiny_text.bert().save_pretrained(tmp_path / "bert")
    tiny_text.words().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


SINGLE = [(f'w{i} w{i + 1} "w3 NA', i % 2) for i in range(16)]  # a lone quotation mark is a character like others
FILES = {  # lines as GLUE publishes them
    "sst2": ["sentence\tlabel", *(f"{text}\t{label}" for text, label in SINGLE)],
    "cola": [f"gj04\t{label}\t\t{text}" for text, label in SINGLE],
    "mrpc": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *(f"{y}\t1\t2\t{x}\t{x}" for x, y in SINGLE)],
    "stsb": [
        "index\tsentence1\tsentence2\tscore",
        *(f"{y}\t{x}\tw1\t{y + 0.5 * i}" for i, (x, y) in enumerate(SINGLE)),
    ],
    "rte": [
        "index\tsentence1\tsentence2\tlabel",
        *(f"{y}\t{x}\tw2\t{('entailment', 'not_entailment')[y]}" for x, y in SINGLE),
    ],
}


def tables(folder: Path, task: str) -> Path:
    folder.mkdir()
    for part in ("train", "dev"):
        (folder / f"{part}.tsv").write_text("\n".join(FILES[task]) + "\n")
    return folder


@pytest.mark.parametrize("task", sorted(FILES))
def test_glue_reads_the_files_as_they_are_published(glue: ModuleType, task: str, tmp_path: Path) -> None:
    for part in glue.examples(task, tables(tmp_path / "data", task), tmp_path / "cache"):
        assert len(part) == 16
        assert part[3][glue.TASKS[task].texts[0]] == SINGLE[3][0]
        assert part["label"][:] == (
            [0.5 * i + i % 2 for i in range(16)] if task == "stsb" else [i % 2 for i in range(16)]
        )


def test_glue_trains_patched_classifiers_and_writes_their_table(
    glue: ModuleType, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        f"glue.py --model {bert} --task mrpc --data {tables(tmp_path / 'data', 'mrpc')} --steps 2 --batch 4 "
        f"--methods exact,lsh+favor -o {tmp_path / 'out'}".split(),
    )
    glue.main()
    found = json.loads((tmp_path / "out.json").read_text())
    exact, patched = found["rows"]
    assert (exact["method"], exact["stored"], patched["method"]) == ("exact", 1.0, "lsh+favor")
    assert 0.4 < patched["stored"] <= 0.5
    assert all(0 <= row[name] <= 1 for row in found["rows"] for name in ("accuracy", "F1"))
    assert (tmp_path / "out.md").read_text().count("\n") == 4


def test_glue_patches_every_attention_and_passes_gradients_through(glue: ModuleType, bert: Path) -> None:
    example = {"input_ids": torch.randint(3, 60, (2, 128)), "attention_mask": torch.ones(2, 128, dtype=torch.int64)}
    example["attention_mask"][1, 40:] = 0
    networks = {m: glue.classifier(str(bert), 3, m, 0.5, example, 0)[0].train() for m in ("exact", "window+clusters")}
    assert sum(hasattr(m, "sbpatch") for m in networks["window+clusters"].modules()) == 2
    answers = {}
    for method, network in networks.items():
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        network.load_state_dict(networks["exact"].state_dict())  # the heads were drawn apart
        answers[method] = network(**example, labels=torch.tensor([0, 2]))
        answers[method].loss.backward()
    assert not torch.allclose(answers["exact"].logits, answers["window+clusters"].logits, atol=1e-4)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in networks["window+clusters"].parameters())


def test_glue_reports_what_the_task_asks_for(glue: ModuleType) -> None:
    logits, labels = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), np.array([0, 1, 0, 0])
    assert glue.figures(glue.TASKS["mrpc"], logits, labels) == {"accuracy": 0.75, "F1": pytest.approx(2 / 3)}
    assert glue.figures(glue.TASKS["cola"], logits, labels)["Matthews"] == pytest.approx(0.57735, abs=1e-4)
    assert glue.figures(glue.TASKS["stsb"], labels[:, None] * 2.0 + 1, labels)["Pearson"] == pytest.approx(1)


# -- Selection -------------------------------------------------------------------------------------------------------


def test_selections_are_timed_beside_what_they_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = f"time_leverage.py --tokens 300 2000 --heads 2 --width 16 --keys 40 --repeats 1 -o {tmp_path / 'times'}"
    monkeypatch.setattr(sys, "argv", asked.split())
    recipe("time_leverage").main()
    rows = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [300] * 4 + [2000] * 4
    assert all(row["ms"] > 0 and row["scores"] <= 1 + 1e-6 for row in rows)
    exact, one_pass, sketched, _ = rows[4:]
    assert (exact["keys"], exact["scores"]) == (pytest.approx(1), pytest.approx(1))
    assert one_pass["scores"] > 0.95
    assert sketched["scores"] > 0.9
    assert (tmp_path / "times.md").read_text().count("\n") == 10


# -- BigGAN ----------------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """BigGAN's self-attention: all pixels read those of a pooled image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.theta, self.phi = (nn.Conv2d(width, width // 8, 1, bias=False) for _ in range(2))
        self.g, self.out = nn.Conv2d(width, width // 2, 1, bias=False), nn.Conv2d(width // 2, width, 1, bias=False)
        self.maxpool, self.softmax = nn.MaxPool2d(2, stride=2), nn.Softmax(dim=-1)
        for layer in (self.theta, self.phi):
            nn.init.normal_(layer.weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (y.flatten(2) for y in (self.theta(x), self.maxpool(self.phi(x)), self.maxpool(self.g(x))))
        attn = self.softmax(torch.bmm(theta.permute(0, 2, 1), phi))
        return x + self.out(torch.bmm(g, attn.permute(0, 2, 1)).view(len(x), -1, *x.shape[-2:]))


class TinyGAN(nn.Module):
    """Called as the package's generator is, with its configuration's names: 1,024 queries against 256 keys."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(z_dim=6, num_classes=4, output_dim=32)
        self.start, self.attention, self.rgb = nn.Linear(10, 256), Pooled(16), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, z: Tensor, class_label: Tensor, truncation: float) -> Tensor:
        assert 0 < truncation <= 1
        x = self.start(torch.cat((z, class_label), dim=1)).unflatten(1, (16, 4, 4))
        return self.rgb(self.attention(nn.functional.interpolate(x, scale_factor=8, mode="bicubic"))).tanh()


class Means(nn.Module):
    """Images -> the means of each quarter, in place of the metric's network."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, 32, 32)
        if images.dtype == torch.uint8:  # as the score gives them to a network
            images = images / 255
        assert images.min() >= 0
        assert 0.1 < images.max() <= 1
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def test_biggan_scores_the_patched_beside_the_exact(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchmetrics", reason="pip install torchmetrics for this one")
    torch.manual_seed(0)
    asked = f"biggan.py --images {images} --budgets 0.02 0.3 --samples 20 --device cpu -o {tmp_path / 'gan'}"
    monkeypatch.setattr(sys, "argv", asked.split())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module, gan = recipe("biggan"), TinyGAN()
    module.main(gan, (Means(), Means()))
    exact, small, large = json.loads((tmp_path / "gan.json").read_text())["rows"]
    assert (exact["attention"], exact["stored"]) == ("exact", 1.0)
    assert small["stored"] <= 0.02 < large["stored"] <= 0.3
    assert all(row["inception"] >= 1 and row["fid"] > 0 for row in (exact, small, large))
    assert abs(large["fid"] - exact["fid"]) < abs(small["fid"] - exact["fid"])
    assert small["fid"] != exact["fid"]
    assert (tmp_path / "gan.md").read_text().count("\n") == 5
    latents = module.Latents(6, 4, 0.5).draw(50, 3)
    assert latents[:, :6].abs().max() <= 1  # cut at two, times the truncation
    assert torch.equal(latents[:, 6:].sum(1), torch.ones(50))
    assert torch.equal(latents, module.Latents(6, 4, 0.5).draw(50, 3))
