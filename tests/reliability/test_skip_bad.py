"""`--skip-bad`: bad samples are counted, named and left out; without it the first is an error in one line."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import command, refused_line
from conftest import QUICK, jpeg

from sbpatch.study import analyze

pytestmark = pytest.mark.usefixtures("forked_variants")
EVAL = ["eval", "tiny.pth", "--batch-size", "2", "--json", "x.json", "--dataset"]
QUALITY = ("top1", "agreement")


def figures() -> dict[str, object]:
    found = json.loads(Path("x.json").read_text())
    Path("x.json").unlink()
    return found


def test_bad_images_of_a_folder(place, capfd):
    assert command(*EVAL, "images", "--quiet") == 0
    good = figures()
    assert "skipped" not in good
    for name, data in {"a/0a.jpg": b"", "b/z.png": b"\x89PNG\r\n\x1a\n", "a/\x1b[31m.jpg": b"no image"}.items():
        Path("images", name).write_bytes(data)
    assert "3 of 9 images cannot be read" in refused_line(capfd, *EVAL, "images", "--quiet")
    assert command(*EVAL, "images", "--skip-bad") == 0
    said = " ".join(capfd.readouterr().out.split())
    found = figures()
    assert (found["samples"], found["skipped"]) == (6, 3)
    assert {line.split(" cannot")[0] for line in found["skipped_samples"]} == {
        "images/a/0a.jpg", "images/b/z.png", "images/a/\\x1b[31m.jpg"
    }  # fmt: skip
    assert "skipped: 3" in said
    assert "images/b/z.png" in said
    assert "\x1b[31m.jpg" not in said
    for variant in ("sdpa", "eager"):  # as without the bad ones
        for key in QUALITY:
            assert found["variants"][variant][key] == good["variants"][variant][key]


def test_nothing_to_skip_and_nothing_left(place, capfd):
    assert command(*EVAL, "images", "--skip-bad", "--quiet") == 0
    assert figures()["skipped"] == 0
    for path in Path("images").rglob("*.jpg"):
        path.write_bytes(b"no image")
    assert "none of 6 samples can be read" in refused_line(capfd, *EVAL, "images", "--skip-bad", "--quiet")


def test_labels_that_do_not_fit_the_model(place, capfd):
    rows = {"image": [jpeg(9 * i) for i in range(6)], "label": [0, 1, 2, None, 1, 0]}
    pq.write_table(pa.table(rows), "x.parquet")
    assert "label None is no class" in refused_line(capfd, *EVAL, "x.parquet", "--quiet")
    assert command(*EVAL, "x.parquet", "--skip-bad", "--quiet") == 0
    found = figures()
    assert found["samples"] == 4
    assert [line.split(":")[0] for line in found["skipped_samples"]] == ["x.parquet row 2", "x.parquet row 3"]


def test_shards_with_a_damaged_image_and_label(place, capfd):
    with tarfile.open("x.tar", "w") as archive:
        for i, (data, label) in enumerate(
            [(jpeg(0), b"0"), (jpeg(9), b"one"), (jpeg(18)[:-200], b"1"), (jpeg(27), b"1")]
        ):
            for name, content in ((f"{i}.jpg", data), (f"{i}.cls", label)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, BytesIO(content))
    assert "x.tar:1.jpg: label 'one' is no class" in refused_line(capfd, *EVAL, "x.tar", "--quiet")
    assert command(*EVAL, "x.tar", "--skip-bad", "--quiet") == 0
    found = figures()
    assert (found["samples"], found["skipped"]) == (2, 2)


def test_files_that_are_no_text(place, capfd):
    Path("texts").mkdir()
    text = Path("text.txt").read_bytes()
    for name, content in {"a.txt": text, "b.txt": b"\xff\xfe" + text, "c.txt": text}.items():
        Path("texts", name).write_bytes(content)
    bert = ["eval", "bert", "--length", "64", "--limit", "3", "--dataset", "texts", "--json", "x.json", "--quiet"]
    assert "texts/b.txt is no UTF-8 text" in refused_line(capfd, *bert)
    assert command(*bert, "--skip-bad") == 0
    found = figures()
    assert (found["samples"], found["skipped"]) == (3, 1)
    assert "texts/b.txt" in found["skipped_samples"][0]


# ---- the other commands, whose samples are drawn from the set or taken in any order

BAD = {"images/a/0a.jpg", "images/b/z.png"}
FLAGS = {
    "calibrate": ["calibrate", "tiny.pth", "-o", "new", *QUICK, "--samples", "6"],
    "compare": ["compare", "tiny.pth", "--dataset", "images", "--data", "images", "--samples", "2", "--methods", "window",
                "--budgets", "0.2", "--quiet"],
    "analyze": ["analyze", "tiny.pth", "-o", "new", "--data", "images", "--samples", "6", "--quiet"],
    "finetune": ["finetune", "out", "--dataset", "images", "-o", "new", "--steps", "1", "--validation", "2",
                 "--batch-size", "2", "--quiet", "--device", "cpu"],
    "bench": ["bench", "tiny.pth", "--data", "images", "--batch", "3", "--methods", "window", "--budget", "0.2", "--quiet"],
}  # fmt: skip


@pytest.mark.parametrize("verb", FLAGS)
def test_every_command_that_reads_samples(place, capfd, monkeypatch, verb):
    """Six images are good, and as many are needed: a bad one that is drawn is an error, or another takes its place."""
    monkeypatch.setattr(analyze, "analyze", lambda loaded, batches, **options: {"read": sum(map(len, batches))})
    monkeypatch.setattr(analyze, "write", lambda result, directory: None)  # it has tests of its own
    for name in BAD:
        Path(name).write_bytes(b"no image")
    assert "cannot be read" in refused_line(capfd, *FLAGS[verb], "--json", "x.json")
    assert command(*FLAGS[verb], "--json", "x.json", "--skip-bad") == 0
    found = figures()
    assert found["skipped"] == len(found["skipped_samples"])
    named = {line.split(" cannot")[0] for line in found["skipped_samples"]}
    if verb in ("compare", "finetune"):  # which look at the whole set
        assert named == BAD
        assert found["samples"] == {"compare": 6, "finetune": 4}[verb]  # two are for validation
    else:
        assert named
        assert named <= BAD
    if verb == "calibrate":
        assert found["data"]["samples"] == 6
    if verb == "analyze":
        assert found["read"] == 6


def test_more_samples_than_can_be_read(place, capfd):
    for name in BAD:
        Path(name).write_bytes(b"no image")
    args = ["calibrate", "tiny.pth", "-o", "new", *QUICK, "--samples", "7", "--skip-bad"]
    assert "6 samples can be read, 7 were asked for; the first that cannot: images/" in refused_line(capfd, *args)


def test_texts_of_the_training_part(place, capfd):
    Path("texts").mkdir()
    for name, start in {"a.txt": b"", "b.txt": b"\xff\xfe"}.items():
        Path("texts", name).write_bytes(start + Path("text.txt").read_bytes())
    args = ["bench", "bert", "--data", "texts", "--lengths", "24,32", "--methods", "clusters", "--budget", "0.5"]
    args += ["--json", "x.json"]
    assert "texts/b.txt is no UTF-8 text" in refused_line(capfd, *args)
    assert command(*args, "--skip-bad") == 0
    assert figures()["skipped"] == 1  # though it was read once a length
    said = " ".join(capfd.readouterr().out.split())
    assert "skipped: 1 texts/b.txt is no UTF-8 text" in said
