"""Sample and evaluation images: a name or path -> images and labels."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch

from ..errors import SbpatchError, one_line
from .archives import archived_images, shards
from .embedded import digits, digits_split, photo_crops
from .imagenet import imagenet_val
from .images import ImageSet, Item, file_item
from .loading import batches
from .preprocessing import Preprocessing
from .samples import strided
from .tables import HubStream, parquet_images, saved_images, stored_images
from .texts import is_text

__all__ = ["ImageSet", "batches", "digits_split", "open_images", "sample_images"]

NAMES = ("demo", "imagenet-val", "cifar10", "sklearn-photos")
CIFAR10 = "uoft-cs/cifar10"
SPLIT_FOLDERS = {"train": ("train",), "test": ("val", "validation", "test")}
SAVED = "state.json"  # in a folder that `datasets` saved
# The images of a source, how many classes their labels count over, and whether these are named, or counted from the labels.
Found = tuple[list[Item], int, bool]


def open_images(
    source: str,
    preprocessing: Preprocessing,
    *,
    data_dir: Path | None = None,
    split: str = "test",
    limit: int | None = None,
    skip_bad: bool = False,
    stored: bool = False,
) -> ImageSet:
    """Open a set of labelled images. Its index is held, and no image.

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
            - a folder of at least two class folders, of tar archives, of parquet files (of a split, where their names
              begin with it), or one that `datasets` saved; or with such under `train/`, `val/`, `validation/` or `test/`.
              Labels count class folders in sorted order.
            - a tar archive of class folders or of WebDataset samples (`000.jpg`, `000.cls`), or several shards of it, as in
              `'shards/*.tar'` or `'shards/{000..127}.tar'`.
            - a parquet file with columns `image` (encoded bytes, alone or as `datasets` stores them) and `label`.
            - a Hugging Face data set `owner/name`, read as it comes; its test images are `validation` where it has that,
              else `test`.
        data_dir: where `imagenet-val` and `cifar10` are.
        split: `train` or `test`, where the source has both.
        limit: take that many images, spread evenly over the set.
        skip_bad: leave samples whose label is no class in the set, for `batches` to skip; else the first is an error.
        stored: read a set of the hub from Hugging Face's cache, in any order, and not as it comes.

    Raises:
        SbpatchError: the source is unknown, missing, empty or not understood; the line says what was looked for where.
    """
    if split not in ("train", "test"):
        raise SbpatchError(f"no split '{split}': it is train or test")
    if limit is not None and limit < 1:
        raise SbpatchError(f"a limit of {limit} images: it must be positive")
    hub = _hub_name(source, data_dir)
    if hub and not stored:
        stream = HubStream(hub, split, limit)
        if not len(stream):
            raise SbpatchError(f"{source}: no images in it")
        return ImageSet(source, stream, preprocessing, stream.classes)
    items, classes, named = stored_images(hub, split) if hub else _found(source, data_dir, split)
    if not items:
        raise SbpatchError(f"{source}: no images in it")
    bad = next((item for item in items if item.problem), None)
    if bad and not skip_bad:
        raise SbpatchError(f"{bad.where}: {bad.problem}")
    return ImageSet(source, strided(items, limit or len(items)), preprocessing, classes, named)


def sample_images(
    source: str | None,
    preprocessing: Preprocessing,
    count: int,
    seed: int,
    *,
    data_dir: Path | None = None,
    skipped: list[str] | None = None,
) -> ImageSet:
    """Draw `count` different images for calibration; the same seed draws the same ones.

    They come from the training split where the source has one (see `open_images`), of a set on the hub from the beginnings of
    its files. `sklearn-photos`, also meant by None, are random square crops, mirrored or not, of the two photographs that
    scikit-learn ships; they have no labels (-1). `skipped` takes a line for each drawn image that cannot be read, and the next
    one is drawn in its place; None: they are drawn like others.

    Raises:
        SbpatchError: as `open_images`, or the source has fewer than `count` images.
    """
    if count < 1:
        raise SbpatchError(f"a sample of {count} images: it must be positive")
    if source is None or source == "sklearn-photos":
        return ImageSet("sklearn-photos", photo_crops(count, seed), preprocessing, None)
    images = open_images(source, preprocessing, data_dir=data_dir, split="train", skip_bad=skipped is not None)
    if len(images) < count:
        raise SbpatchError(f"{source} has {len(images)} images, {count} were asked for: ask for {len(images)} or fewer")
    if isinstance(images.items, HubStream):
        drawn: Iterable[Item] = images.items.shuffled(count, seed)
    else:
        assert isinstance(images.items, Sequence)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        drawn = map(images.items.__getitem__, order.tolist())
    if skipped is not None:
        return images.without_bad(skipped, count, drawn)
    return ImageSet(source, list(islice(drawn, count)), preprocessing, images.classes)


def _hub_name(source: str, data_dir: Path | None) -> str:
    """What a source is called on the hub; "" where it is something here, or nothing."""
    if source == "cifar10":
        return "" if data_dir else CIFAR10
    path = Path(os.path.expanduser(source))
    plain = source.count("/") == 1 and not source.startswith((".", "~", "/")) and not path.suffix
    return source if plain and not is_text(source) and not path.exists() else ""


def _found(source: str, data_dir: Path | None, split: str) -> Found:
    path = Path(os.path.expanduser(source))
    if source == "demo":
        return digits(split), 10, True
    if source == "imagenet-val":
        return imagenet_val([data_dir, os.environ.get("IMAGENET_DIR")]), 1000, True
    if source == "cifar10" and data_dir is not None:
        return parquet_images(_cifar10_files(Path(data_dir), split))
    if is_text(source):
        raise SbpatchError(f"{source} is text, and this model takes images: known are {', '.join(NAMES[:3])} and paths")
    if source == "sklearn-photos":
        raise SbpatchError("sklearn-photos has no labels: it is a calibration sample, not a set to evaluate on")
    if path.is_dir():
        return _folder(path, split)
    if path.suffix == ".tar":
        files = shards(str(path))
        if not files or not all(os.path.lexists(file) for file in files):
            missing = next((file for file in files if not os.path.lexists(file)), source)
            raise SbpatchError(f"no such file or directory: {missing}")
        return archived_images(files)
    if path.exists():
        return parquet_images([path])
    if "/" in source or path.suffix:
        raise SbpatchError(f"no such file or directory: {source}")
    near = difflib.get_close_matches(source, NAMES, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(NAMES[:3])}, owner/name and paths"
    raise SbpatchError(f"unknown image data '{source}': {hint}")


def _folder(root: Path, split: str) -> Found:
    """What lies in a folder, or in that of the split under it."""
    root = next((root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()), root)
    entries = sorted(root.iterdir())
    if any(path.name == SAVED for path in entries):
        return saved_images(root)
    if tars := [path for path in entries if path.suffix == ".tar"]:
        return archived_images(tars)
    if tables := _of_split([path for path in entries if path.suffix == ".parquet"], split):
        return parquet_images(tables)
    if (root / "data").is_dir() and (tables := _of_split(sorted((root / "data").glob("*.parquet")), split)):
        return parquet_images(tables)
    return _class_folders(root)


def _of_split(files: list[Path], split: str) -> list[Path]:
    """Those whose names begin with the split, as the hub has them; all where none does."""
    own = next((found for name in SPLIT_FOLDERS[split] if (found := [f for f in files if f.name.startswith(name)])), [])
    return own or files


def _class_folders(root: Path) -> Found:
    from torchvision.datasets.folder import ImageFolder  # slow to import, and only such data need it

    try:
        folder = ImageFolder(root)
    except (OSError, RuntimeError) as error:
        raise SbpatchError(f"{root}: expected one folder of images per class in it ({one_line(error)})") from None
    if len(folder.classes) == 1:  # mostly a folder too high up: every label would be 0
        raise SbpatchError(
            f"{root}: only one class folder, '{folder.classes[0]}': give the folder that holds the classes"
        )
    return [file_item(Path(file), root, label) for file, label in folder.samples], len(folder.classes), True


def _cifar10_files(folder: Path, split: str) -> list[Path]:
    whole = folder / f"cifar10-{split}.parquet"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise SbpatchError(f"cifar10: neither {whole.name} nor {split}-*.parquet in {folder}")
    return files
