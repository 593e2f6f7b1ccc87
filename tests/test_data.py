"""Data sources: real photographs and CIFAR-10 where they are, small generated files elsewhere, and every refusal."""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants as hub
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits
from timm.data.imagenet_info import ImageNetInfo

from sbpatch.data import loading
from sbpatch.data.preprocessing import Preprocessing
from sbpatch.data.samples import Part
from sbpatch.data.sources import batches, digits_split, open_images, sample_images
from sbpatch.errors import SbpatchError

SHARED = Path(os.environ.get("SBPATCH_SHARED", Path(__file__).parents[2] / "shared")) / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"no {SHARED}: set SBPATCH_SHARED")
SMALL = Preprocessing(input_size=(3, 32, 32), crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
WNIDS = ImageNetInfo().label_names()


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("sbpatch.data.hub.answers", lambda url: False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("IMAGENET_DIR", raising=False)


def jpeg(level: int = 128, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    """A plain image whose red value (or grey, or ink) is `level`."""
    color = {"RGB": (level, 0, 0), "L": level, "CMYK": (level, 0, 0, 0), "P": level, "RGBA": (level, 0, 0, 9)}[mode]
    file = io.BytesIO()
    Image.new(mode, (40, 30), color).save(file, kind)
    return file.getvalue()


def folders(root: Path, names: list[str], each: int = 2) -> Path:
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(each):
            (root / name / f"{name}_{j}.JPEG").write_bytes(jpeg(10 * i + j))
    return root


def flat(root: Path, count: int = 4) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(1, count + 1):
        (root / f"ILSVRC2012_val_{i:08d}.JPEG").write_bytes(jpeg(i))
    return root


def labels(images) -> list[int]:
    return [images[i][1] for i in range(len(images))]


def refused(*args, **kwargs) -> str:
    start = time.monotonic()
    with pytest.raises(SbpatchError) as excinfo:
        open_images(*args, **kwargs)
    assert time.monotonic() - start < 10
    text = str(excinfo.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


# ---- demo


def test_demo_digits():
    images = open_images("demo", SMALL)
    assert (len(images), images.classes) == (360, 10)
    assert labels(images) == digits_split("test")[1].tolist()
    tensor, _ = images[0]
    assert tensor.shape == (3, 32, 32)
    assert torch.equal(tensor[0], tensor[2])  # grey
    # The corners of bicubic interpolation keep the values of the 8 x 8 original: 0 is black, 16 white.
    assert tensor.min() == pytest.approx(-1, abs=0.02)
    assert tensor.max() == pytest.approx(1, abs=0.02)
    images.check()
    assert len(open_images("demo", SMALL, split="train")) == 1437


def test_digits_split_is_a_partition():
    whole = sorted(image.tobytes() for image in load_digits().images)
    halves = np.concatenate([digits_split("train")[0], digits_split("test")[0]])
    assert sorted(image.tobytes() for image in halves) == whole


# ---- ImageNet


@needs_shared
def test_real_photographs_carry_the_labels_of_their_wnids():
    images = open_images("imagenet-val", Preprocessing(), data_dir=SHARED / "imagenet-sample")
    assert (len(images), images.classes) == (200, 1000)
    for item in images.items:
        assert WNIDS[item.label] == Path(item.where).parent.name
    assert len({item.label for item in images.items}) == 200
    images.check()
    taken = [batch for batch, _ in batches(images, 64)]
    assert [len(batch) for batch in taken] == [64, 64, 64, 8]
    assert taken[0].shape[1:] == (3, 224, 224)
    assert torch.isfinite(torch.cat(taken)).all()


def test_class_folders_of_a_few_wnids_keep_their_place_among_1000(tmp_path, monkeypatch):
    folders(tmp_path / "val", [WNIDS[999], WNIDS[7], WNIDS[400]])
    (tmp_path / "val" / WNIDS[7] / ".DS_Store").write_bytes(b"junk")
    for images in (
        open_images("imagenet-val", SMALL, data_dir=tmp_path),
        open_images("imagenet-val", SMALL, data_dir=tmp_path / "val"),
    ):
        assert labels(images) == [7, 7, 400, 400, 999, 999]
    monkeypatch.setenv("IMAGENET_DIR", str(tmp_path))
    assert len(open_images("imagenet-val", SMALL)) == 6
    assert len(open_images("imagenet-val", SMALL, data_dir=tmp_path / "elsewhere")) == 6


def tar_of(folder: Path, path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.glob("*.JPEG"), reverse=True):  # the order inside must not matter
            archive.add(file, file.name)


def devkit(folder: Path) -> None:
    """As the official one: ids from 1 in an order of their own, and high-level synsets behind the 1,000."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(1000)
    synsets = np.zeros(1002, dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)])
    for i in range(1002):
        synsets[i] = (i + 1, WNIDS[order[i]] if i < 1000 else f"n9999999{i - 1000}", 0)
    savemat(folder / "meta.mat", {"synsets": synsets[:, None]})
    ids = [int(np.flatnonzero(order == label)[0]) + 1 for label in (65, 970, 230, 809)]
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(map(str, ids)) + "\n")


@pytest.mark.parametrize("truth", ["val.txt", "devkit", "devkit/data", "devkit.tar.gz"])
@pytest.mark.parametrize("form", ["flat", "flat in val", "tar"])
def test_official_flat_files_with_each_kind_of_labels(tmp_path, form, truth):
    root = tmp_path / "imagenet"
    pictures = flat(root / "val" if form == "flat in val" else tmp_path / "files" if form == "tar" else root)
    root.mkdir(exist_ok=True)
    if form == "tar":
        tar_of(pictures, root / "ILSVRC2012_img_val.tar")
    if truth == "val.txt":
        rows = zip(range(1, 5), (65, 970, 230, 809), strict=True)
        (root / "val.txt").write_text("".join(f"ILSVRC2012_val_{i:08d}.JPEG {label}\n" for i, label in rows))
    elif truth == "devkit":
        devkit(root)
    else:
        devkit(root / "ILSVRC2012_devkit_t12" / "data")
    if truth == "devkit.tar.gz":
        with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
            archive.add(root / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
        for file in (root / "ILSVRC2012_devkit_t12" / "data").iterdir():
            file.unlink()
    images = open_images("imagenet-val", SMALL, data_dir=root)
    assert labels(images) == [65, 970, 230, 809]
    reds = [round(float(images[i][0][0].mean() * 0.5 + 0.5) * 255) for i in range(4)]
    assert reds == pytest.approx([1, 2, 3, 4], abs=1)
    assert sorted(reds) == reds


def test_flat_files_whose_labels_cannot_be_known(tmp_path):
    flat(tmp_path)
    assert "no labels" in refused("imagenet-val", SMALL, data_dir=tmp_path)
    devkit(tmp_path)
    (tmp_path / "meta.mat").rename(tmp_path / "gone")
    assert "meta.mat" in refused("imagenet-val", SMALL, data_dir=tmp_path)
    (tmp_path / "meta.mat").write_bytes(b"not a mat file")
    assert "not in the official form" in refused("imagenet-val", SMALL, data_dir=tmp_path)
    (tmp_path / "gone").rename(tmp_path / "meta.mat")
    flat(tmp_path, 5)
    assert "do not cover ILSVRC2012_val_00000005.JPEG" in refused("imagenet-val", SMALL, data_dir=tmp_path)
    (tmp_path / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG n01440764\n")
    assert "not in the official form" in refused("imagenet-val", SMALL, data_dir=tmp_path)


def test_imagenet_that_is_not_there(tmp_path):
    assert "--data-dir DIR or $IMAGENET_DIR" in refused("imagenet-val", SMALL)
    text = refused("imagenet-val", SMALL, data_dir=tmp_path)
    assert str(tmp_path) in text
    assert "ILSVRC2012_img_val.tar" in text
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"\x1f\x8b broken" * 99)
    (tmp_path / "val.txt").write_text("")
    assert "not a tar file" in refused("imagenet-val", SMALL, data_dir=tmp_path)
    (tmp_path / WNIDS[0]).mkdir()
    assert "no images" in refused("imagenet-val", SMALL, data_dir=tmp_path)


# ---- CIFAR-10 and parquet


@needs_shared
def test_cifar10():
    images = open_images("cifar10", SMALL, data_dir=SHARED)
    assert (len(images), images.classes) == (8000, 10)
    table = pq.read_table(SHARED / "cifar10-test.parquet")
    raw = table["image"][4321].as_py()["bytes"]
    assert torch.equal(images[4321][0], SMALL.transform()(Image.open(io.BytesIO(raw)).convert("RGB")))
    assert images[4321][1] == table["label"][4321].as_py()
    assert len(open_images(str(SHARED / "cifar10-test.parquet"), SMALL)) == 8000


def test_parquet_shards_and_plain_bytes(tmp_path):
    rows = [[{"bytes": jpeg(50 * i), "path": None} for i in range(j, j + 2)] for j in (0, 2)]
    for j, part in enumerate(rows):
        pq.write_table(pa.table({"img": part, "label": [j, 3]}), tmp_path / f"test-0000{j}-of-00002.parquet")
    images = open_images("cifar10", SMALL, data_dir=tmp_path)
    assert labels(images) == [0, 3, 1, 3]
    assert images.classes == 4
    pq.write_table(pa.table({"image": [jpeg(), jpeg()], "label": [1, 0], "more": ["x", "y"]}), tmp_path / "own.parquet")
    assert labels(open_images(str(tmp_path / "own.parquet"), SMALL)) == [1, 0]


def test_parquet_that_is_not_image_data(tmp_path):
    assert "neither cifar10-test.parquet nor test-*.parquet" in refused("cifar10", SMALL, data_dir=tmp_path)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), path)
    assert "found text, label" in refused(str(path), SMALL)
    pq.write_table(pa.table({"image": ["a"], "label": [0]}), path)
    assert "holds string, not encoded images" in refused(str(path), SMALL)
    pq.write_table(pa.table({"image": [jpeg()], "label": [None]}), path)
    assert "'label' (integers)" in refused(str(path), SMALL)
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), path)
    assert "no images" in refused(str(path), SMALL)
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a parquet file" in refused(str(path), SMALL)


def test_rows_without_an_image_are_named(tmp_path):
    pq.write_table(pa.table({"image": [jpeg(), None, b""], "label": [0, 1, 2]}), tmp_path / "x.parquet")
    images = open_images(str(tmp_path / "x.parquet"), SMALL)
    for i in (1, 2):
        with pytest.raises(SbpatchError, match=f"row {i} cannot be read"):
            images[i]


# ---- folders, odd images, damage


def test_class_folders(tmp_path):
    folders(tmp_path / "pets", ["dog", "cat", "bird"])
    images = open_images(str(tmp_path / "pets"), SMALL)
    assert labels(images) == [0, 0, 1, 1, 2, 2]
    assert images.classes == 3
    (tmp_path / "pets").rename(tmp_path / "val")
    assert labels(open_images(str(tmp_path), SMALL)) == [0, 0, 1, 1, 2, 2]  # as under imagefolder's usual val/
    assert "only one class folder, 'val'" in refused(str(tmp_path), SMALL, split="train")


@pytest.mark.parametrize(("mode", "kind"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")])
def test_odd_images_become_rgb(tmp_path, mode, kind):
    folders(tmp_path, ["a", "b"], each=1)
    (tmp_path / "a" / f"odd.{kind}").write_bytes(jpeg(200, mode, kind))
    images = open_images(str(tmp_path), SMALL)
    images.check()
    assert all(images[i][0].shape == (3, 32, 32) for i in range(3))


DAMAGE = {
    "truncated": jpeg()[:-300],
    "empty": b"",
    "text": b"<html>not found</html>",
    "header alone": jpeg()[:20],
    "broken png": jpeg(kind="PNG")[:60] + b"\0" * 40,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_unreadable_files_are_named(tmp_path, kind):
    folders(tmp_path, ["a", "b"])
    bad = tmp_path / "b" / "b_0.JPEG"
    bad.write_bytes(DAMAGE[kind])
    images = open_images(str(tmp_path), SMALL)
    images[0]
    with pytest.raises(SbpatchError) as excinfo:
        list(batches(images, 2))
    assert str(excinfo.value).startswith(f"{bad} cannot be read as an image")
    assert "\n" not in str(excinfo.value)


def test_check_names_the_first_bad_file_and_counts(tmp_path):
    folders(tmp_path, ["a", "b"], each=3)
    for i, data in enumerate(DAMAGE.values()):
        ((tmp_path / "ab"[i % 2]) / f"z{i}.JPEG").write_bytes(data)
    with pytest.raises(SbpatchError, match=r"5 of 11 images cannot be read, the first is .*a/z0.JPEG") as excinfo:
        open_images(str(tmp_path), SMALL).check()
    assert "\n" not in str(excinfo.value)


def test_a_file_that_has_gone(tmp_path):
    images = open_images(str(folders(tmp_path, ["a", "b"])), SMALL)
    (tmp_path / "a" / "a_1.JPEG").unlink()
    with pytest.raises(SbpatchError, match=r"a_1.JPEG cannot be read"):
        images[1]


# ---- names, limits, samples


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("cifar01", "did you mean cifar10"),
        ("imagenet", "did you mean imagenet-val"),
        ("qqq", "known are demo, imagenet-val, cifar10"),
        ("./here/not", "no such file or directory"),
        ("a/b.parquet", "no such file or directory"),
        ("someone/some-set", "neither a path here nor a data set that Hugging Face"),
        ("cifar10", "uoft-cs/cifar10"),
        ("sklearn-photos", "no labels"),
        ("", "unknown|one folder of images"),
    ],
)
def test_sources_that_are_not_there(source, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert any(part in refused(source, SMALL) for part in said.split("|"))


def test_folders_and_files_of_something_else(tmp_path):
    assert "one folder of images per class" in refused(str(tmp_path), SMALL)
    (tmp_path / "a").mkdir()
    assert "one folder of images per class" in refused(str(tmp_path), SMALL)
    (tmp_path / "a" / "notes.txt").write_text("hello")
    assert "is text, and this model takes images" in refused(str(tmp_path / "a" / "notes.txt"), SMALL)


def test_limit_is_spread_over_the_classes(tmp_path):
    folders(tmp_path, [f"c{i}" for i in range(6)], each=3)
    assert labels(open_images(str(tmp_path), SMALL, limit=6)) == [0, 1, 2, 3, 4, 5]
    assert labels(open_images(str(tmp_path), SMALL, limit=4)) == [0, 1, 3, 4]
    assert len(open_images(str(tmp_path), SMALL, limit=99)) == 18
    assert open_images(str(tmp_path), SMALL, limit=1).classes == 6
    assert "positive" in refused(str(tmp_path), SMALL, limit=0)
    assert "train or test" in refused("demo", SMALL, split="dev")


def test_fingerprint_follows_content_and_not_the_place(tmp_path):
    one = open_images(str(folders(tmp_path / "one", ["a", "b"])), SMALL)
    two = open_images(str(folders(tmp_path / "two", ["a", "b"])), SMALL)
    assert one.fingerprint() == two.fingerprint()
    assert one.fingerprint() != open_images(str(tmp_path / "one"), SMALL, limit=2).fingerprint()
    (tmp_path / "two" / "a" / "a_0.JPEG").write_bytes(jpeg() + b"more")
    assert one.fingerprint() != open_images(str(tmp_path / "two"), SMALL).fingerprint()
    assert open_images("demo", SMALL).fingerprint() != open_images("demo", SMALL, split="train").fingerprint()


@pytest.mark.parametrize("source", [None, "sklearn-photos", "demo"])
def test_samples_follow_the_seed(source):
    first, again, other = (sample_images(source, SMALL, 6, seed) for seed in (0, 0, 1))
    assert len(first) == 6
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    stack, target = next(batches(first, 6))
    assert torch.equal(stack, next(batches(again, 6))[0])
    assert stack.shape == (6, 3, 32, 32)
    assert len({image.numpy().tobytes() for image in stack}) == 6  # no two alike
    if source == "demo":
        assert first.classes == 10
    else:
        assert first.name == "sklearn-photos"
        assert first.classes is None
        assert target.tolist() == [-1] * 6
        assert stack.std(dim=(1, 2, 3)).min() > 0.05


def test_demo_sample_never_touches_the_test_digits():
    sample = sample_images("demo", SMALL, 200, 3)
    tested = {item.identity for item in open_images("demo", SMALL).items}
    trained = {item.identity for item in open_images("demo", SMALL, split="train").items}
    assert {item.identity for item in sample.items} <= trained
    assert not tested & trained


def test_sample_larger_than_the_set(tmp_path):
    folders(tmp_path, ["a", "b"])
    with pytest.raises(SbpatchError, match="has 4 images, 5 were asked for"):
        sample_images(str(tmp_path), SMALL, 5, 0)
    with pytest.raises(SbpatchError, match="positive"):
        sample_images(None, SMALL, 0, 0)


def test_batches_keep_order_and_the_short_last_one(tmp_path):
    folders(tmp_path, ["a", "b", "c"], each=1)
    sizes, targets = zip(*((len(x), y.tolist()) for x, y in batches(open_images(str(tmp_path), SMALL), 2)), strict=True)
    assert sizes == (2, 1)
    assert targets == ([0, 1], [2])


@pytest.mark.parametrize("held", [0, 1 << 30])
def test_a_set_that_is_gone_through_again_is_the_same(tmp_path, monkeypatch, held):
    """Read anew or held; its bad samples are named once."""
    monkeypatch.setattr(loading, "HELD", held)
    root = folders(tmp_path / "images", ["a", "b"], each=3)
    (root / "a" / "bad.JPEG").write_bytes(b"no image")
    skipped: list[str] = []
    again = loading.Again(open_images(str(root), SMALL), 4, "cpu", torch.float64, skipped)
    first, second = list(again), list(again)
    assert [y.tolist() for _, y in first] == [[0, 0, 0, 1], [1, 1]]
    assert all(torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in zip(first, second, strict=True))
    assert first[0][0].dtype == torch.float64
    assert (again.count, len(skipped)) == (6, 1)
    if held:
        (root / "a" / "a_0.JPEG").unlink()
        assert len(list(again)) == 2


def test_a_part_is_read_by_workers_as_the_whole_is(tmp_path):
    images = open_images(str(folders(tmp_path / "images", ["a", "b"], each=5)), SMALL)
    part = Part(Part(images, range(9, -1, -1)), [1, 3, 5, 7, 8])
    (alone,) = batches(part, 5)
    for beside in (True, False):
        (found,) = batches(part, 5, workers=2, beside=beside)
        assert torch.equal(found[0], alone[0])
        assert torch.equal(found[1], alone[1])
    assert alone[1].tolist() == [images[i][1] for i in (8, 6, 4, 2, 1)]


@settings(max_examples=30)
@given(bad=st.sets(st.integers(0, 9)), count=st.integers(1, 10), seed=st.integers(0, 99))
def test_good_samples_take_the_place_of_bad_ones(tmp_path_factory, bad, count, seed):
    """Those that are drawn are the first good ones of the order that the seed gives, and bad ones before them are named."""
    root = tmp_path_factory.mktemp("some")
    folders(root, ["a", "b"], each=5)
    files = sorted(root.rglob("*.JPEG"))
    for i in bad:
        files[i].write_bytes(b"no image")
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
    good = [i for i in order if i not in bad]
    skipped: list[str] = []
    if len(good) < count:
        with pytest.raises(SbpatchError, match=f"{len(good)} samples can be read, {count} were asked for"):
            sample_images(str(root), SMALL, count, seed, skipped=skipped)
        return
    found = sample_images(str(root), SMALL, count, seed, skipped=skipped)
    assert [item.where for item in found.items] == [str(files[i]) for i in good[:count]]
    before = order[: order.index(good[count - 1])]
    assert [line.split(" cannot")[0] for line in skipped] == [str(files[i]) for i in before if i in bad]
