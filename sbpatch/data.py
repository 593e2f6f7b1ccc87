"""Sample batches and evaluation sets: a name or path -> images and labels.

Decoding is lazy: an ImageSet knows its files, labels and order, and reads an image when it is asked for. Every image is
converted to RGB as it is stored; an EXIF rotation is not applied, as in the evaluation of the models it is meant for.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from scipy.io.matlab import MatReadError, loadmat  # scipy comes with scikit-learn
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

from .errors import SbpatchError
from .models import Preprocessing, hub_or_cache, one_line

NAMES = ("demo", "imagenet-val", "cifar10", "sklearn-photos")
CIFAR10 = "uoft-cs/cifar10"
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
VAL_TAR, DEVKIT = "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
CHECKED = 5000  # images that `check` decodes at most: about ten seconds
# What Pillow raises for a file that is not an image, a broken one, or one far too large.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Item:
    """One image: where it is (for error lines), what it is (for the fingerprint), its label (-1: none), how to open it."""

    where: str
    identity: str
    label: int
    open: Callable[[], Image.Image]


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images and labels behind one preprocessing; `images[i]` is (a float32 tensor (3, H, W), the label).

    `classes` is how many classes the labels count over, None where there are no labels. Indexing raises SbpatchError for
    a file that cannot be read.
    """

    def __init__(self, name: str, items: Sequence[Item], preprocessing: Preprocessing, classes: int | None) -> None:
        self.name, self.items, self.classes = name, items, classes
        self._transform = preprocessing.transform()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.items[index]
        try:
            image = item.open().convert("RGB")
        except IMAGE_ERRORS as error:
            raise SbpatchError(
                f"{item.where} cannot be read as an image ({one_line(error)}): remove or replace it"
            ) from None
        return self._transform(image), item.label

    def fingerprint(self) -> str:
        """SHA-256 over the names, sizes and labels of the images in their order; their folder does not count."""
        lines = (f"{item.identity} {item.label}\n" for item in self.items)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def check(self) -> None:
        """Decode the images, at most 5,000 spread evenly, so that a bad file stops a run before it has begun.

        Raises:
            SbpatchError: some cannot be read; the line names the first one and says how many.
        """
        items = _strided(self.items, CHECKED)
        with _pool() as pool:
            bad = [(item, problem) for item, problem in zip(items, pool.map(_problem, items), strict=True) if problem]
        if bad:
            item, problem = bad[0]
            raise SbpatchError(
                f"{self.name}: {len(bad)} of {len(items)} images cannot be read, the first is {item.where} ({problem}): "
                "remove or replace them"
            )


def open_images(
    source: str,
    preprocessing: Preprocessing,
    *,
    data_dir: Path | None = None,
    split: str = "test",
    limit: int | None = None,
) -> ImageSet:
    """Open a set of labelled images.

    Args:
        source: one of
            - `demo`: scikit-learn's digits, embedded; `split` train or test.
            - `imagenet-val`: ImageNet's validation images, in `data_dir` or $IMAGENET_DIR, there or under `val/`, as class
              folders `n01440764/*.JPEG` (any number of the 1,000), or as the official flat files
              `ILSVRC2012_val_*.JPEG` or `ILSVRC2012_img_val.tar`. Flat files need their labels beside them: `val.txt`
              (lines `ILSVRC2012_val_00000001.JPEG 65`, classes from 0 in the order of the WordNet ids), or the devkit,
              packed (`ILSVRC2012_devkit_t12.tar.gz`), unpacked, or its two files ILSVRC2012_validation_ground_truth.txt
              and meta.mat. The ground truth alone counts classes in an order that only meta.mat gives.
            - `cifar10`: `cifar10-test.parquet` or `test-*.parquet` in `data_dir`; without one, uoft-cs/cifar10 on the hub.
            - a folder of at least two class folders, or with such under `train/`, `val/`, `validation/` or `test/`
              (labels count the class folders in sorted order), or a parquet file with columns `image`
              (encoded bytes, alone or as `datasets` stores them) and `label`.
            - a Hugging Face data set `owner/name`; its test images are `validation` where it has that, else `test`.
        data_dir: where `imagenet-val` and `cifar10` are.
        split: `train` or `test`, where the source has both.
        limit: take that many images, spread evenly over the set.

    Raises:
        SbpatchError: the source is unknown, missing, empty or not understood; the line says what was looked for where.
    """
    if split not in ("train", "test"):
        raise SbpatchError(f"no split '{split}': it is train or test")
    if limit is not None and limit < 1:
        raise SbpatchError(f"a limit of {limit} images: it must be positive")
    path = Path(source).expanduser()
    if source == "demo":
        items, classes = _digits(split), 10
    elif source == "imagenet-val":
        items, classes = _imagenet([data_dir, os.environ.get("IMAGENET_DIR")]), 1000
    elif source == "cifar10" and data_dir is not None:
        items, classes = _parquet(_cifar10_files(Path(data_dir), split))
    elif source == "sklearn-photos":
        raise SbpatchError("sklearn-photos has no labels: it is a calibration sample, not a set to evaluate on")
    elif path.is_dir():
        items, classes = _class_folders(path, split)
    elif path.is_file():
        items, classes = _parquet([path])
    elif source == "cifar10" or (source.count("/") == 1 and not source.startswith((".", "~", "/")) and not path.suffix):
        items, classes = _hub(CIFAR10 if source == "cifar10" else source, split)
    elif "/" in source or path.suffix:
        raise SbpatchError(f"no such file or directory: {source}")
    else:
        near = difflib.get_close_matches(source, NAMES, n=2)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(NAMES[:3])}, owner/name and paths"
        )
        raise SbpatchError(f"unknown image data '{source}': {hint}")
    if not items:
        raise SbpatchError(f"{source}: no images in it")
    return ImageSet(source, _strided(items, limit or len(items)), preprocessing, classes)


def sample_images(
    source: str | None, preprocessing: Preprocessing, count: int, seed: int, *, data_dir: Path | None = None
) -> ImageSet:
    """Draw `count` different images for calibration; the same seed draws the same ones.

    They come from the training split where the source has one (see `open_images`). `sklearn-photos`, also meant by None,
    are random square crops, mirrored or not, of the two photographs that scikit-learn ships; they have no labels (-1).

    Raises:
        SbpatchError: as `open_images`, or the source has fewer than `count` images.
    """
    if count < 1:
        raise SbpatchError(f"a sample of {count} images: it must be positive")
    if source is None or source == "sklearn-photos":
        return ImageSet("sklearn-photos", _photo_crops(count, seed), preprocessing, None)
    images = open_images(source, preprocessing, data_dir=data_dir, split="train")
    if len(images) < count:
        raise SbpatchError(f"{source} has {len(images)} images, {count} were asked for: ask for {len(images)} or fewer")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return ImageSet(source, [images.items[i] for i in order.tolist()], preprocessing, images.classes)


def batches(images: ImageSet, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order, as (B, 3, H, W) float32 and labels (B,) int64; the last batch may be smaller.

    A batch is decoded by several threads, but only when it is asked for, so that nothing runs beside a timed model.
    """
    with _pool() as pool:
        for start in range(0, len(images), batch_size):
            pairs = list(pool.map(images.__getitem__, range(start, min(start + batch_size, len(images)))))
            yield torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def digits_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's handwritten digits, 8 x 8 values from 0 to 16, in a fixed split: 1,437 'train' and 360 'test'.

    Returns images (N, 8, 8) float64 and labels (N,) int64.
    """
    digits = load_digits()
    train, test = train_test_split(np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)
    index = np.sort(train if split == "train" else test)
    return digits.images[index], digits.target[index]


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))


def _strided(items: Sequence[Item], count: int) -> Sequence[Item]:
    """At most `count` of the items, spread evenly: sets are often sorted by class."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _problem(item: Item) -> str | None:
    try:
        image = item.open()
        image.draft(
            "RGB", (image.width // 8, image.height // 8)
        )  # JPEG: every byte is still read, at a tenth of the time
        image.load()
    except IMAGE_ERRORS as error:
        return one_line(error)
    return None


def _decode(data: bytes | None) -> Image.Image:
    return Image.open(BytesIO(data or b""))


def _digits(split: str) -> list[Item]:
    def image(digit: np.ndarray) -> Image.Image:
        return Image.fromarray((digit * (255 / 16)).round().astype(np.uint8))

    pairs = zip(*digits_split(split), strict=True)
    return [
        Item(f"digit {i} of {split}", digit.astype(np.uint8).tobytes().hex(), int(label), partial(image, digit))
        for i, (digit, label) in enumerate(pairs)
    ]


def _photo_crops(count: int, seed: int) -> list[Item]:
    photos = load_sample_images()
    random = np.random.default_rng(seed)

    def crop(photo: np.ndarray, top: int, left: int, side: int, mirrored: bool) -> Image.Image:
        part = photo[top : top + side, left : left + side]
        return Image.fromarray(part[:, ::-1].copy() if mirrored else part)

    items = []
    for i in range(count):
        photo, name = photos.images[i % 2], Path(photos.filenames[i % 2]).name
        height, width = photo.shape[:2]
        side = round(min(height, width) * random.uniform(0.15, 1) ** 0.5)  # 15 % to all of the largest square's area
        box = (
            int(random.integers(height - side + 1)),
            int(random.integers(width - side + 1)),
            side,
            bool(random.integers(2)),
        )
        where = f"crop {box} of {name}"
        items.append(Item(where, where, -1, partial(crop, photo, *box)))
    return items


def _class_folders(root: Path, split: str) -> tuple[list[Item], int]:
    inner = ("train",) if split == "train" else ("val", "validation", "test")
    root = next((root / name for name in inner if (root / name).is_dir()), root)
    try:
        folder = ImageFolder(root)
    except (OSError, RuntimeError) as error:
        raise SbpatchError(f"{root}: expected one folder of images per class in it ({one_line(error)})") from None
    if len(folder.classes) == 1:  # mostly a folder too high up: every label would be 0
        raise SbpatchError(
            f"{root}: only one class folder, '{folder.classes[0]}': give the folder that holds the classes"
        )
    return [_file_item(Path(file), root, label) for file, label in folder.samples], len(folder.classes)


def _file_item(path: Path, root: Path, label: int) -> Item:
    return Item(
        str(path), f"{path.relative_to(root).as_posix()} {path.stat().st_size}", label, partial(Image.open, path)
    )


def _imagenet(roots: Sequence[Path | str | None]) -> list[Item]:
    """The validation images in the first of the places that has some, whichever of the accepted forms they have."""
    places = [Path(root).expanduser() for root in roots if root]
    index = {wnid: i for i, wnid in enumerate(ImageNetInfo().label_names())}
    for place in places:
        for folder in (place, place / "val", place / "ILSVRC2012_img_val"):
            if not folder.is_dir():
                continue
            wnids = sorted(d.name for d in folder.iterdir() if d.is_dir() and d.name in index)
            if wnids:
                files = (f for w in wnids for f in sorted((folder / w).iterdir()) if f.suffix.lower() in IMG_EXTENSIONS)
                return [_file_item(f, folder, index[f.parent.name]) for f in files]
            flat = sorted(folder.glob("ILSVRC2012_val_*.JPEG"))
            if flat:
                labels = _imagenet_labels(place, index)
                return [_file_item(f, folder, _label(f.name, labels, place)) for f in flat]
        if (place / VAL_TAR).is_file():
            return _imagenet_tar(place / VAL_TAR, _imagenet_labels(place, index))
    if not places:
        raise SbpatchError("imagenet-val: say where it is with --data-dir DIR or $IMAGENET_DIR")
    raise SbpatchError(
        f"imagenet-val: neither class folders n01440764/, ILSVRC2012_val_*.JPEG nor {VAL_TAR} in "
        f"{' or '.join(map(str, places))} or val/ under it"
    )


def _imagenet_tar(path: Path, labels: Mapping[str, int]) -> list[Item]:
    def read(offset: int, size: int) -> Image.Image:
        with path.open("rb") as file:
            file.seek(offset)
            return _decode(file.read(size))

    try:
        with tarfile.open(path) as archive:
            members = sorted((m for m in archive if m.isfile()), key=lambda m: m.name)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SbpatchError(f"{path} is damaged or not a tar file ({one_line(error)}): get it again") from None
    return [
        Item(f"{path}:{m.name}", f"{Path(m.name).name} {m.size}", label, partial(read, m.offset_data, m.size))
        for m in members
        for label in (_label(Path(m.name).name, labels, path.parent),)
    ]


def _label(name: str, labels: Mapping[str, int], place: Path) -> int:
    if name not in labels:
        raise SbpatchError(f"imagenet-val: the labels in {place} do not cover {name}")
    return labels[name]


def _imagenet_labels(place: Path, index: Mapping[str, int]) -> dict[str, int]:
    """File name -> class, from val.txt or the devkit; its ids from 1 follow their own order, which meta.mat translates."""
    try:
        if (place / "val.txt").is_file():
            rows = (line.split() for line in (place / "val.txt").read_text().splitlines() if line.strip())
            return {Path(name).name: int(label) for name, label in rows}
        truth, meta = _devkit_file(place, TRUTH), _devkit_file(place, META)
        if truth is None:
            raise SbpatchError(f"imagenet-val: no labels in {place}: put val.txt or {DEVKIT}.tar.gz beside the images")
        if meta is None:
            raise SbpatchError(
                f"imagenet-val: {TRUTH} in {place} cannot be read without the devkit's {META}: put it beside it"
            )
        synsets = loadmat(BytesIO(meta), squeeze_me=True)["synsets"]
        classes = {int(s["ILSVRC2012_ID"]): index[str(s["WNID"])] for s in synsets if str(s["WNID"]) in index}
        ids = [int(line) for line in truth.split()]
        return {f"ILSVRC2012_val_{i:08d}.JPEG": classes[number] for i, number in enumerate(ids, start=1)}
    except (OSError, EOFError, ValueError, TypeError, LookupError, tarfile.TarError, MatReadError) as error:
        raise SbpatchError(
            f"imagenet-val: the labels in {place} are not in the official form ({one_line(error)})"
        ) from None


def _devkit_file(place: Path, name: str) -> bytes | None:
    for folder in (place, place / "data", place / DEVKIT / "data"):
        if (folder / name).is_file():
            return (folder / name).read_bytes()
    if (place / f"{DEVKIT}.tar.gz").is_file():
        with tarfile.open(place / f"{DEVKIT}.tar.gz") as archive:
            member = archive.extractfile(f"{DEVKIT}/data/{name}")
            return member.read() if member else None
    return None


def _cifar10_files(folder: Path, split: str) -> list[Path]:
    whole = folder / f"cifar10-{split}.parquet"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise SbpatchError(f"cifar10: neither {whole.name} nor {split}-*.parquet in {folder}")
    return files


def _parquet(files: Sequence[Path]) -> tuple[list[Item], int]:
    name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    try:
        columns = [c for c in pq.read_schema(files[0]).names if c in IMAGE_COLUMNS + LABEL_COLUMNS]
        table = pa.concat_tables([pq.read_table(file, columns=columns) for file in files])
    except (pa.ArrowException, OSError) as error:
        raise SbpatchError(f"{name} is damaged or not a parquet file ({one_line(error)})") from None
    return _table(name, table)


def _hub(name: str, split: str) -> tuple[list[Item], int]:
    import datasets  # slow to import, and only this needs it

    try:
        with hub_or_cache():
            splits = datasets.get_dataset_split_names(name)
            wanted = next(
                (s for s in (("train",) if split == "train" else ("validation", "test")) if s in splits), None
            )
            if wanted is None:
                raise SbpatchError(f"{name}: no {split} images, its splits are {', '.join(splits)}")
            table = datasets.load_dataset(name, split=wanted).data.table
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise SbpatchError(
            f"{name} is neither a path here nor a data set that Hugging Face or its cache can give ({one_line(error)})"
        ) from None
    return _table(f"{name} ({wanted})", table)


def _table(name: str, table: pa.Table) -> tuple[list[Item], int]:
    """The rows of an Arrow table with a column of encoded images and one of labels from 0."""
    image = next((c for c in IMAGE_COLUMNS if c in table.column_names), None)
    label = next((c for c in LABEL_COLUMNS if c in table.column_names), None)
    if image is None or label is None or not pa.types.is_integer(table[label].type) or table[label].null_count:
        raise SbpatchError(
            f"{name}: expected columns 'image' (encoded bytes) and 'label' (integers), found {', '.join(table.column_names)}"
        )
    data = table[image]
    if pa.types.is_struct(data.type) and data.type.get_field_index("bytes") >= 0:
        data = pc.struct_field(data, "bytes")
    if not (pa.types.is_binary(data.type) or pa.types.is_large_binary(data.type)):
        raise SbpatchError(f"{name}: column '{image}' holds {data.type}, not encoded images")
    labels, sizes = table[label].to_pylist(), pc.binary_length(data).to_pylist()
    return [
        Item(f"{name} row {i}", f"{i} {size}", int(y), partial(_cell, data, i))
        for i, (y, size) in enumerate(zip(labels, sizes, strict=True))
    ], 1 + max(labels, default=-1)


def _cell(column: Any, row: int) -> Image.Image:
    return _decode(column[row].as_py())
