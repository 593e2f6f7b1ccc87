"""Sample and evaluation images: a name or path -> images and labels."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from torchvision.datasets.folder import ImageFolder

from ..bounds import shown
from ..errors import SbpatchError, one_line
from ..reading import check_regular
from .hub import hub_or_cache
from .imagenet import imagenet_val
from .images import ImageSet, Item, decode, file_item
from .preprocessing import Preprocessing
from .samples import batches, strided
from .texts import is_text

__all__ = ["ImageSet", "batches", "digits_split", "open_images", "sample_images"]

NAMES = ("demo", "imagenet-val", "cifar10", "sklearn-photos")
CIFAR10 = "uoft-cs/cifar10"
MOST_LABEL = (1 << 24) - 1
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")


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
    path = Path(os.path.expanduser(source))
    if source == "demo":
        items, classes = _digits(split), 10
    elif source == "imagenet-val":
        items, classes = imagenet_val([data_dir, os.environ.get("IMAGENET_DIR")]), 1000
    elif source == "cifar10" and data_dir is not None:
        items, classes = _parquet(_cifar10_files(Path(data_dir), split))
    elif is_text(source):
        raise SbpatchError(f"{source} is text, and this model takes images: known are {', '.join(NAMES[:3])} and paths")
    elif source == "sklearn-photos":
        raise SbpatchError("sklearn-photos has no labels: it is a calibration sample, not a set to evaluate on")
    elif path.is_dir():
        items, classes = _class_folders(path, split)
    elif path.exists():
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
    return ImageSet(source, strided(items, limit or len(items)), preprocessing, classes)


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


def digits_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's handwritten digits, 8 x 8 values from 0 to 16, in a fixed split: 1,437 'train' and 360 'test'.

    Returns images (N, 8, 8) float64 and labels (N,) int64.
    """
    digits = load_digits()
    train, test = train_test_split(np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)
    index = np.sort(train if split == "train" else test)
    return digits.images[index], digits.target[index]


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
    return [file_item(Path(file), root, label) for file, label in folder.samples], len(folder.classes)


def _cifar10_files(folder: Path, split: str) -> list[Path]:
    whole = folder / f"cifar10-{split}.parquet"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise SbpatchError(f"cifar10: neither {whole.name} nor {split}-*.parquet in {folder}")
    return files


def _parquet(files: Sequence[Path]) -> tuple[list[Item], int]:
    name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    for file in files:
        check_regular(file)
    try:
        columns = [c for c in pq.read_schema(files[0]).names if c in IMAGE_COLUMNS + LABEL_COLUMNS]
        table = pa.concat_tables([pq.read_table(file, columns=columns) for file in files])
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
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
    if not all(-1 <= y <= MOST_LABEL for y in labels):
        wrong = next(y for y in labels if not -1 <= y <= MOST_LABEL)
        raise SbpatchError(f"{name}: label {shown(wrong)} is no class: labels count from 0, -1 is none")
    return [
        Item(f"{name} row {i}", f"{i} {size}", int(y), partial(_cell, data, i))
        for i, (y, size) in enumerate(zip(labels, sizes, strict=True))
    ], 1 + max(labels, default=-1)


def _cell(column: Any, row: int) -> Image.Image:
    return decode(column[row].as_py())
