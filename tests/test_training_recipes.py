"""The recipes that train on sequences run: their tasks are what they say, their tables are written, stopped runs go on."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT

from sbpatch.attention import Geometry
from sbpatch.errors import SbpatchError

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


WORDS = ("a", "lobster", "is", "red", "when", "cooked", "and", "blue", "in", "the", "sea", "naïve")


def prose(words: int, seed: int) -> str:
    drawn = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return "\n".join(" " + " ".join(WORDS[i] for i in drawn[at : at + 20]) + " ." for at in range(0, words, 20)) + "\n"


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    folder = tmp_path / "wikitext"
    folder.mkdir()
    for part, words in (("train", 3000), ("valid", 800)):
        (folder / f"{part}.txt").write_text(prose(words, words), encoding="utf-8")
    return folder


REVIEWS = ["good", "bad" * 30, "naïve", "so bad it is good"]  # of 4, 90, 6 and 17 bytes


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sorted by class, as IMDb's are."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    for part, count in (("train", 12), ("test", 20)):
        rows = {
            "text": [f"{REVIEWS[i % 4]} {part}" for i in range(count)],
            "label": [2 * i // count for i in range(count)],
        }
        datasets.Dataset.from_dict(rows, kinds).to_parquet(tmp_path / "reviews" / f"{part}.parquet")
    return tmp_path / "reviews"


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Noise of 32 x 32 in ten classes, under the names of CIFAR-10's files."""
    (tmp_path / "cifar").mkdir()
    random = np.random.default_rng(0)
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    for part in ("train", "test"):
        images = [Image.fromarray(random.integers(256, size=(32, 32, 3), dtype=np.uint8)) for _ in range(20)]
        rows = {"image": images, "label": [i // 2 for i in range(20)]}
        datasets.Dataset.from_dict(rows, kinds).to_parquet(tmp_path / "cifar" / f"cifar10-{part}.parquet")
    return tmp_path / "cifar"


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


def test_text_asks_for_the_next_token_of_text_that_is_not_trained_on(wikitext: Path) -> None:
    recipe = importlib.import_module("train_text")
    args = SimpleNamespace(data="wikitext-2", data_dir=wikitext, vocabulary=270, tokens=64, test=5)
    task = recipe.task(args)
    assert (task.vocabulary, task.classes, task.causal) == (270, 270, True)
    train, valid = ((wikitext / f"{part}.txt").read_text(encoding="utf-8") for part in ("train", "valid"))
    assert recipe.parts("wikitext-2", wikitext)[0].content == train
    words = recipe.tokenizer(train, 270)
    assert words.to_str() == recipe.tokenizer(train, 270).to_str()
    assert words.decode(recipe.encoded(words, "red ☃ \n\n = naïve").tolist()) == "red ☃ \n\n = naïve"

    drawn = task.draw(3, torch.Generator().manual_seed(0))
    assert drawn.tokens.shape == (3, 64)
    for batch, text in ((drawn, train), *((batch, valid) for batch in task.test)):
        assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
        for tokens, target in zip(batch.tokens, batch.targets, strict=True):
            assert words.decode([*tokens.tolist(), int(target[-1])]).strip("\ufffd") in text
    assert sum(len(batch.tokens) for batch in task.test) == 5
    again = recipe.task(args).draw(3, torch.Generator().manual_seed(0))
    assert torch.equal(again.tokens, drawn.tokens)

    asked = torch.cat([batch.targets.flatten() for batch in task.test])
    frequency = recipe.encoded(words, train).bincount(minlength=270).double() + 1
    guess = torch.nn.functional.cross_entropy(frequency.log().expand(len(asked), -1), asked).exp()
    assert task.notes["perplexity of token frequencies"] == pytest.approx(float(guess))
    assert 1 < float(guess) < 270


def test_one_text_is_parted_and_the_longer_part_trained_on(wikitext: Path) -> None:
    recipe = importlib.import_module("train_text")
    (wikitext / "train.txt").unlink()
    train, held_out = recipe.parts("wikitext-2", wikitext)
    assert held_out.content + train.content == (wikitext / "valid.txt").read_text(encoding="utf-8")
    assert len(train.content) > 2 * len(held_out.content)
    with pytest.raises(SbpatchError, match=r"valid.txt, last 3/4 has \d+ tokens, too few for a window of 4000"):
        recipe.task(SimpleNamespace(data="wikitext-2", data_dir=wikitext, vocabulary=270, tokens=4000, test=5))


def test_bytes_are_those_of_the_texts_padded(reviews: Path) -> None:
    recipe = importlib.import_module("train_bytes")
    task = recipe.task(str(reviews), 16, 4)
    assert (task.vocabulary, task.classes, task.causal) == (257, 2, False)
    tested = [
        (bytes(tokens[real].tolist()), int(target), tokens[~real].tolist())
        for batch in task.test
        for tokens, target, real in zip(*batch, strict=True)
    ]
    assert [label for _, label, _ in tested] == [0, 0, 1, 1]  # spread over the part
    whole = [f"{REVIEWS[i % 4]} test".encode() for i in (0, 5, 10, 15)]
    assert [content for content, _, _ in tested] == [text[:16] for text in whole]
    assert [len(padding) for _, _, padding in tested] == [7, 0, 5, 0]
    assert all(token == recipe.PADDING for _, _, padding in tested for token in padding)
    drawn = task.draw(50, torch.Generator().manual_seed(0))
    texts = {bytes(tokens[real].tolist()) for tokens, real in zip(drawn.tokens, drawn.real, strict=True)}
    assert texts == {f"{text} train".encode()[:16] for text in REVIEWS}
    assert torch.equal(drawn.tokens, task.draw(50, torch.Generator().manual_seed(0)).tokens)
    assert task.notes == {"chance": 50.0, "most frequent class": 50.0}


def test_texts_of_another_form_are_refused(reviews: Path, tmp_path: Path) -> None:
    recipe = importlib.import_module("train_bytes")
    with pytest.raises(SbpatchError, match="train: text 1 is empty"):
        recipe.sequences("train", ["a", ""], [0, 1], 4)
    for part in ("train", "test"):
        table = datasets.Dataset.from_dict({"text": ["a"], "stars": [1]})
        table.to_parquet(tmp_path / "other" / f"{part}.parquet")
    with pytest.raises(SbpatchError, match=r"train: expected a 'text' of strings .*, found text \(string\), stars"):
        recipe.task(str(tmp_path / "other"), 16, 4)
    (reviews / "test.parquet").unlink()
    with pytest.raises(SbpatchError, match="expected the parts 'train' and 'test', found train"):
        recipe.task(str(reviews), 16, 4)


def test_pixels_are_the_grey_ones_row_by_row(cifar: Path) -> None:
    recipe = importlib.import_module("train_pixels")
    task = recipe.task(SimpleNamespace(data="cifar10", data_dir=cifar, tokens=1024, test=10))
    assert (task.vocabulary, task.classes, task.causal) == (256, 10, False)
    tokens, labels = (torch.cat([getattr(batch, name) for batch in task.test]) for name in ("tokens", "targets"))
    stored = datasets.Dataset.from_parquet(str(cifar / "cifar10-test.parquet"))[::2]
    grey = np.stack([np.asarray(image.convert("L"), dtype=np.int64).reshape(-1) for image in stored["image"]])
    assert (tokens - torch.from_numpy(grey)).abs().max() <= 1  # Pillow's weights are rounded
    assert labels.tolist() == stored["label"] == list(range(10))
    drawn = [task.draw(5, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    assert not (drawn[0].tokens[:, None] == tokens).all(-1).any()
    assert task.notes == {"chance": 10.0, "most frequent class": 10.0}
    with pytest.raises(SbpatchError, match="--tokens 1000: images are square"):
        recipe.task(SimpleNamespace(data="cifar10", data_dir=cifar, tokens=1000, test=10))


def test_the_mean_that_answers_is_of_real_tokens_alone() -> None:
    """What stands in the padding changes nothing, and the last real token something."""
    training, transformer = importlib.import_module("training"), importlib.import_module("small_transformer")
    tokens = torch.randint(9, (2, 64))
    real = torch.arange(64) < torch.tensor([[20], [64]])
    for method in ("full", "scatterbrain", "performer", "local"):
        layers = [training.attention(method, Geometry(64, 2, 4), 24, 0)]
        model = transformer.Transformer(9, 3, 8, layers, "mean", 1e4).eval()
        answer = model(tokens, real)
        assert answer.shape == (2, 3)
        torch.testing.assert_close(model(tokens.where(real, 8 - tokens), real), answer)
        assert not torch.allclose(model(tokens.where(torch.arange(64) != 19, 8 - tokens[:, 19:20]), real)[0], answer[0])


def met(method: str, base: float, back: int = 511, tokens: int = 1024) -> float:
    """The share of tokens whose query reads the key `back` before, though the two are equal by their rotary positions."""
    turned = importlib.import_module("small_transformer").Rotary(tokens + back, 16, base)
    content = torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(0)).expand(-1, -1, tokens + back, -1)
    x = turned(content)
    layer = importlib.import_module("training").attention(method, Geometry(tokens, 4, 16, causal=True), 128, 0)
    reads = layer.support.dense(x[:, :, :tokens], x[:, :, back:], None)  # (1, 4, n, n)
    return float(reads.diagonal(-back, -2, -1).float().mean())


@pytest.mark.parametrize("method", ["reformer", "scatterbrain", "lsh"])
def test_hashing_finds_equal_keys_where_every_rotary_pair_turns_once(method: str) -> None:
    """Slower pairs sort the queries of a sequence unlike its keys, so that equal ones come to lie in unlike chunks."""
    assert met(method, importlib.import_module("train_copy").BASE) > 0.85
    assert met(method, 1e4) < 0.7


# -- the runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "figure", "data"),
    [
        ("train_copy", "perplexity", ""),
        ("train_listops", "accuracy", ""),
        ("train_text", "perplexity", "wikitext"),
        ("train_bytes", "accuracy", "reviews"),
        ("train_pixels", "accuracy", "cifar"),
    ],
)
def test_one_command_writes_figures_and_a_table(
    name: str,
    figure: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    out = tmp_path / "folder" / "run.json"
    few = "" if name == "train_copy" else "--test 20"
    if data:
        flag = "--data" if name == "train_bytes" else "--data-dir"
        few += f" {flag} {request.getfixturevalue(data)}"
    if name == "train_text":
        few += " --vocabulary 270"
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


@pytest.mark.slow
def test_hashing_learns_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A perplexity of 64 is that of a guess."""
    small = (
        "--tokens 256 --entries 32 --width 64 --heads 4 --batch 8 --steps 200 --lr 2e-3 --base 41 --methods reformer"
    )
    (reformer,) = run("train_copy", tmp_path / "run.json", monkeypatch, small)["rows"]
    assert reformer["perplexity"] < 16


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


@pytest.mark.parametrize("flag", ["--test", "--steps", "--batch", "--seeds"])
def test_a_count_of_none_is_refused(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("train_listops", tmp_path / "run.json", monkeypatch, f"{flag} 0")
    assert f"argument {flag}: 0 is not 1 or more" in capsys.readouterr().err
