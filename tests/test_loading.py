"""Sets that are not held whole, read by this process or by workers: the same samples in the same order, whatever reads them."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import refused

from sbpatch.data.images import ImageSet, Item
from sbpatch.data.loading import AT_A_TIME, batches, worker_count
from sbpatch.data.preprocessing import Preprocessing
from sbpatch.data.samples import strided
from sbpatch.data.sources import open_images, sample_images
from sbpatch.data.texts import open_text
from sbpatch.errors import SbpatchError

SMALL = Preprocessing(input_size=(3, 16, 16), crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
COUNT = 30  # more than workers take at a time


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(8 * i) for i in range(COUNT)]
LABELS = [i % 3 for i in range(COUNT)]
BAD = {4: b"no image", 17: b"", 29: PICTURES[29][:40]}


def pictures(bad: bool) -> list[bytes]:
    return [BAD.get(i, data) if bad else data for i, data in enumerate(PICTURES)]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def as_folders(root: Path, data: list[bytes]) -> Path:
    for i, picture in enumerate(data):
        (root / str(LABELS[i])).mkdir(parents=True, exist_ok=True)
        (root / str(LABELS[i]) / f"{i:03d}.png").write_bytes(picture)
    return root


def as_tar(root: Path, data: list[bytes]) -> Path:
    with tarfile.open(root.with_suffix(".tar"), "w") as archive:
        for i, picture in enumerate(data):
            add(archive, f"set/{LABELS[i]}/{i:03d}.png", picture)
    return root.with_suffix(".tar")


def as_shards(root: Path, data: list[bytes]) -> Path:
    root.mkdir()
    for shard in range(3):
        with tarfile.open(root / f"test-{shard:04d}.tar", "w") as archive:
            for i in range(10 * shard, 10 * shard + 10):
                add(archive, f"{i:03d}.png", data[i])
                add(archive, f"{i:03d}.json", json.dumps({"width": 16}).encode())
                add(archive, f"{i:03d}.cls", f"{LABELS[i]}\n".encode())
    return root


def as_parquet(root: Path, data: list[bytes]) -> Path:
    table = pa.table({"image": [{"bytes": x, "path": None} for x in data], "label": LABELS})
    pq.write_table(table, root.with_suffix(".parquet"), row_group_size=7)
    return root.with_suffix(".parquet")


def as_parquet_files(root: Path, data: list[bytes]) -> Path:
    (root / "data").mkdir(parents=True)
    for part, rows in enumerate((slice(0, 20), slice(20, 30))):
        table = pa.table({"image": data[rows], "label": LABELS[rows]})
        pq.write_table(table, root / "data" / f"test-{part:05d}-of-00002.parquet")
    pq.write_table(pa.table({"image": data[:1], "label": [7]}), root / "data" / "train-00000-of-00001.parquet")
    return root


def as_saved(root: Path, data: list[bytes]) -> Path:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [{"bytes": x, "path": None} for x in data], "label": LABELS}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root))
    return root


FORMS = {
    "folders": as_folders, "tar": as_tar, "shards": as_shards, "parquet": as_parquet,
    "parquet files": as_parquet_files, "saved": as_saved,
}  # fmt: skip


def read(images: ImageSet, size: int = 4, **options: object) -> tuple[list[int], list[int]]:
    """The levels of grey and the labels of all samples, after a look at the sizes of the batches."""
    found = list(batches(images, size, **options))  # type: ignore[arg-type]
    assert all(len(x) == size for x, _ in found[:-1])
    x, y = torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])
    assert x.dtype == torch.float32
    return [round(v) for v in ((x.mean((1, 2, 3)) * 0.5 + 0.5) * 255).tolist()], y.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_its_samples_in_order_with_and_without_workers(tmp_path, form):
    images = open_images(str(FORMS[form](tmp_path / "set", pictures(bad=False))), SMALL)
    assert len(images) == COUNT
    assert images.classes == 3
    order = sorted(range(COUNT), key=lambda i: (LABELS[i], i)) if form == "folders" else range(COUNT)
    expected = [8 * i for i in order], [LABELS[i] for i in order]
    assert read(images) == expected
    assert read(images, workers=2) == expected
    assert read(images, size=7, workers=2, beside=True) == expected
    limited = open_images(str(next(tmp_path.glob("set*"))), SMALL, limit=7)
    assert read(limited, workers=2)[0] == [8 * i for i in strided(list(order), 7)]


@pytest.mark.parametrize("form", FORMS)
def test_bad_samples_are_an_error_or_skipped_and_named(tmp_path, form):
    images = open_images(str(FORMS[form](tmp_path / "set", pictures(bad=True))), SMALL)
    order = sorted(range(COUNT), key=lambda i: (LABELS[i], i)) if form == "folders" else range(COUNT)
    lines = set()
    for options in ({}, {"workers": 2}, {"workers": 2, "beside": True}):
        lines.add(refused(list, batches(images, 4, **options)))
        skipped: list[str] = []
        levels, labels = read(images, skipped=skipped, **options)
        assert levels == [8 * i for i in order if i not in BAD]
        assert labels == [LABELS[i] for i in order if i not in BAD]
        assert len(skipped) == 3
        assert all("cannot be read as an image" in line for line in skipped)
    assert lines == {skipped[0]}


@settings(max_examples=25)
@given(bad=st.sets(st.integers(0, 19)), size=st.integers(1, 9))
def test_skipping_is_reading_the_others(bad, size):
    def item(i: int) -> Item:
        return Item(str(i), str(i), i, lambda: Image.open(io.BytesIO(b"x" if i in bad else PICTURES[i])))

    skipped: list[str] = []
    found = list(batches(ImageSet("all", [item(i) for i in range(20)], SMALL, 20), size, skipped=skipped))
    others = list(batches(ImageSet("good", [item(i) for i in range(20) if i not in bad], SMALL, 20), size))
    assert [int(line.split()[0]) for line in skipped] == sorted(bad)
    assert len(found) == len(others)
    for (x, y), (other_x, other_y) in zip(found, others, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


# ---- labels


@pytest.mark.parametrize("label", ["3", "-2", "x", "", "1e3", "9" * 40, "\x1b[31m", "٣"])
def test_labels_of_shards_that_are_no_classes(tmp_path, label):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(4):
            add(archive, f"a/{i}.png", PICTURES[i])
            add(archive, f"a/{i}.cls", label.encode() if i == 2 else b"1")
    images = open_images(str(path), SMALL, skip_bad=True)
    images.fit(2)
    skipped: list[str] = []
    assert read(images, skipped=skipped) == ([0, 8, 24], [1, 1, 1])
    assert "is no class" in skipped[0]
    assert "\x1b" not in skipped[0]
    assert images.classes == 2
    if label != "3":
        assert "is no class" in refused(open_images, str(path), SMALL)


def test_an_image_without_its_label(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "0.png", PICTURES[0])
        add(archive, "0.cls", b"0")
        add(archive, "1.png", PICTURES[1])
    assert "no .cls file" in refused(open_images, str(tmp_path / "x.tar"), SMALL)
    assert len(open_images(str(tmp_path / "x.tar"), SMALL, skip_bad=True)) == 2


@pytest.mark.parametrize("labels", [[0, 57, 2], [0, None, 2], [0, -5, 2], [0, 2**40, 2]])
def test_labels_of_a_parquet_file_that_do_not_fit_the_model(tmp_path, labels):
    pq.write_table(pa.table({"image": PICTURES[:3], "label": labels}), tmp_path / "x.parquet")
    images = open_images(str(tmp_path / "x.parquet"), SMALL, skip_bad=True)
    images.fit(3)
    assert images.classes == 3  # one wrong label does not make it another set
    skipped: list[str] = []
    assert read(images, skipped=skipped) == ([0, 16], [0, 2])
    assert "row 1: label" in skipped[0]


def test_names_of_shards(tmp_path):
    root = as_shards(tmp_path / "set", pictures(bad=False))
    for name in ("test-{0000..0002}.tar", "*.tar", "test-000?.tar"):
        assert len(open_images(str(root / name), SMALL)) == COUNT
    assert len(open_images(str(root / "test-{0000..0001}.tar"), SMALL)) == 20
    assert "test-0003.tar" in refused(open_images, str(root / "test-{0000..0003}.tar"), SMALL)
    assert "no such file" in refused(open_images, str(root / "other*.tar"), SMALL)
    assert "no range" in refused(open_images, str(root / "test-{0003..0000}.tar"), SMALL)


def test_compressed_and_flat_archives_are_refused(tmp_path):
    path = as_tar(tmp_path / "set", PICTURES)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(path, "x.png")
    assert "not a tar file" in refused(open_images, str(tmp_path / "packed.tar"), SMALL)
    with tarfile.open(tmp_path / "flat.tar", "w") as archive:
        add(archive, "0.png", PICTURES[0])
    assert "one folder of images per class" in refused(open_images, str(tmp_path / "flat.tar"), SMALL)


# ---- not held whole


def test_a_large_row_group_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("sbpatch.data.tables.PIECE", 20_000)
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)
    data = []
    for pixels in noise:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        data.append(file.getvalue())  # 12 kB each
    pq.write_table(pa.table({"image": data, "label": [i % 2 for i in range(40)]}), tmp_path / "x.parquet")
    images = open_images(str(tmp_path / "x.parquet"), SMALL)
    read_rows = []
    real = pq.ParquetFile.iter_batches

    def counted(self, size, **options):
        for piece in real(self, size, **options):
            read_rows.append(len(piece))
            yield piece

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    for i in (0, 1, 2, 30, 31, 5, 39):
        expected = SMALL.transform()(Image.fromarray(noise[i]))
        assert torch.equal(images[i][0], expected)
    assert max(read_rows) <= 2


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """`owner/name` is a folder of parquet files here, which `datasets` reads as it reads those of the hub."""
    import datasets

    root, real = tmp_path / "hub", datasets.load_dataset
    as_parquet_files(root, pictures(bad=False))
    pq.write_table(
        pa.table({"image": PICTURES, "label": LABELS}), root / "data" / "train-00000-of-00001.parquet", row_group_size=5
    )
    monkeypatch.setattr("sbpatch.data.hub.answers", lambda url: False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # Of what reads several files for a shuffle.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
    names = datasets.get_dataset_split_names
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: names(str(root)))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: real(str(root), **options))
    monkeypatch.chdir(tmp_path)
    return root


def test_a_set_on_the_hub_is_read_as_it_comes(on_the_hub, tmp_path):
    images = open_images("owner/name", SMALL)
    for options in ({}, {"workers": 2}, {"workers": 2, "beside": True}):
        assert read(images, **options) == ([8 * i for i in range(COUNT)], LABELS)
    assert read(open_images("owner/name", SMALL, limit=7), workers=2)[0] == [8 * i for i in strided(range(COUNT), 7)]
    assert not list((tmp_path / "cache").rglob("*.arrow"))  # nothing was stored


def test_samples_of_a_set_on_the_hub_follow_the_seed(on_the_hub):
    first, again, other = (sample_images("owner/name", SMALL, 6, seed) for seed in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert len(set(read(first)[0])) == 6
    assert "ask for 30 or fewer" in refused(sample_images, "owner/name", SMALL, 31, 0)


def test_a_set_of_the_hub_to_train_on_is_stored(on_the_hub, tmp_path):
    images = open_images("owner/name", SMALL, split="train", stored=True)
    assert [images[i][1] for i in (29, 0, 4)] == [LABELS[i] for i in (29, 0, 4)]
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_a_stream_that_ends_early_is_no_smaller_set(on_the_hub):
    images = open_images("owner/name", SMALL)
    images.items.total = images.items.count = 40
    assert "ended after 30 of 40 samples" in refused(list, batches(images, 4))


# ---- workers


def slow(seconds: float) -> Image.Image:
    time.sleep(seconds)
    return Image.new("RGB", (16, 16))


def children() -> set[str]:
    """Processes of this one that have not ended."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= set((task / "children").read_text().split())
    return found


def many(count: int = 64, seconds: float = 0.0) -> ImageSet:
    return ImageSet("many", [Item(str(i), str(i), i, lambda: slow(seconds)) for i in range(count)], SMALL, count)


def test_few_images_and_texts_start_no_workers():
    assert worker_count(many(64)) == 0
    assert worker_count(many(65)) > 0


def test_workers_are_gone_when_a_batch_is_given_and_when_reading_is_given_up(monkeypatch):
    before = children()
    for x, _ in batches(many(), 8, workers=2):
        assert len(x) == 8
        assert children() == before  # nothing runs beside a timed model
    reading = batches(many(200), 8, workers=2, beside=True)
    next(reading)
    assert len(children() - before) == 2
    reading.close()
    assert children() == before


def test_a_worker_that_dies_is_one_line():
    def dies() -> Image.Image:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    items = [Item(str(i), str(i), 0, dies if i == 30 else lambda: Image.new("RGB", (9, 9))) for i in range(64)]
    before = children()
    assert "has ended early" in refused(list, batches(ImageSet("x", items, SMALL, 1), 8, workers=2))
    assert children() == before


@pytest.mark.parametrize("beside", [False, True])
def test_a_signal_while_workers_read_leaves_none(beside):
    from sbpatch.interrupts import Stopped, raising

    before = children()
    with raising():
        for delay in (0.0, 0.02, 0.1, 0.4):
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
            with pytest.raises(Stopped):  # noqa: PT012 - it may come anywhere in here
                timer.start()
                list(batches(many(100, 0.05), AT_A_TIME, workers=2, beside=beside))
    assert children() == before


def test_reading_by_workers_draws_nothing_random():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    list(batches(many(20), 8, workers=2))
    assert torch.equal(torch.rand(4), expected)


# ---- texts


def test_a_folder_of_texts_and_what_is_none(tmp_path):
    for i, data in enumerate((b"first " * 99, b"\xff\xfe no text", b"third " * 99)):
        (tmp_path / f"{i}.txt").write_bytes(data)
    table = pa.table({"text": pa.array([b"row " * 9, b"\xff\xfe", b"last"], pa.binary())})
    schema = pa.schema([("text", pa.string())])
    pq.write_table(
        pa.Table.from_arrays([table["text"].combine_chunks().view(pa.string())], schema=schema), tmp_path / "z.parquet"
    )
    assert "1.txt is no UTF-8 text" in refused(open_text, str(tmp_path))
    skipped: list[str] = []
    text = open_text(str(tmp_path), split="train", skipped=skipped).content
    text += open_text(str(tmp_path), skipped=[]).content
    assert text.count("first") == text.count("third") == 99
    assert text.endswith("last")
    assert [line.split(" is ")[0].rsplit("/", 1)[1] for line in skipped] == ["1.txt", "z.parquet row 1"]
    with pytest.raises(SbpatchError):
        open_text(str(tmp_path / "1.txt"), skipped=[])
