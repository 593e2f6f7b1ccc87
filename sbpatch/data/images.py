"""Images and their labels behind one preprocessing, decoded when they are asked for.

Every image is converted to RGB as it is stored; an EXIF rotation is not applied, as in the evaluation of the models it is
meant for.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from ..bounds import shown
from ..errors import SbpatchError, one_line
from ..reading import check_regular, kind
from .preprocessing import Preprocessing
from .samples import pool, strided

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of torchvision too
MOST_PIXELS = 1 << 27  # of an image, as it is stored and as it is resized: 400 MB in memory
MOST_LABEL = (1 << 24) - 1
CHECKED = 5000  # images that `check` decodes at most: about ten seconds
AT_ONCE = 64
# What Pillow raises for a file that is not an image, a broken one, or one far too large: its readers check little.
IMAGE_ERRORS = (Exception,)


@dataclass(frozen=True)
class Item:
    """One image: where it is (for error lines), what it is (for the fingerprint), its label (-1: none), how to open it."""

    where: str
    identity: str
    label: int
    open: Callable[[], Image.Image]
    problem: str = ""  # why it is no sample, where that is known before it is opened

    def labelled(self, label: Any, classes: int = MOST_LABEL + 1) -> Item:
        """The same with a label from a file, which may be no class."""
        if isinstance(label, int) and -1 <= label < classes:
            return replace(self, label=int(label))
        return replace(self, label=-1, problem=f"label {shown(label)} is no class: {classes_meant(classes)}")


def classes_meant(classes: int) -> str:
    return "labels count from 0, -1 is none" if classes > MOST_LABEL else f"they are 0 to {classes - 1}"


class Stream(Protocol):
    """Images that come in one order only, and how many they are."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images and labels behind one preprocessing; `images[i]` is (a float32 tensor (3, H, W), the label).

    `classes` is how many classes the labels count over, None where there are no labels, or a stream does not say. Where its
    source names none (`named` None) it is counted from the labels. Indexing raises SbpatchError for an image that cannot be
    read or a label that is no class. Of a stream, its items themselves are the indices.
    """

    def __init__(
        self,
        name: str,
        items: Sequence[Item] | Stream,
        preprocessing: Preprocessing,
        classes: int | None,
        named: bool = True,
    ) -> None:
        self.name, self.items, self.named = name, items, named
        self._classes, self._most = classes, classes if named and classes else MOST_LABEL + 1
        self._transform = preprocessing.transform()
        self._scale = preprocessing.scale
        self.sample_bytes = 4 * prod(preprocessing.input_size)

    @property
    def classes(self) -> int | None:
        if self.named or not isinstance(self.items, Sequence):
            return self._classes
        labels = [item.label for item in self.items if not item.problem and item.label < self._most]
        return 1 + max(labels, default=-1)

    def __len__(self) -> int:
        return len(self.items)

    def keys(self) -> Sequence[int] | Iterator[Item]:
        """What to index with, in order."""
        return range(len(self.items)) if isinstance(self.items, Sequence) else iter(self.items)

    def __getitem__(self, key: int | Item) -> tuple[Tensor, int]:
        item = key if isinstance(key, Item) else self.items[key]  # type: ignore[index]
        if problem := self._label_problem(item):
            raise SbpatchError(f"{item.where}: {problem}")
        try:
            image = _opened(item, self._scale).convert("RGB")
        except IMAGE_ERRORS as error:
            raise SbpatchError(_unread(item, one_line(error))) from None
        return self._transform(image), item.label

    def without_bad(
        self, skipped: list[str], count: int | None = None, among: Iterable[Item] | None = None
    ) -> ImageSet:
        """The same set without the samples that cannot be read, of which `skipped` takes a line each.

        Every image is read for that, to its end, but at a smaller size where its format allows it.

        Args:
            count: so many of them, the first; None: all.
            among: samples to take in place of the set's own.

        Raises:
            SbpatchError: nothing is left, or fewer than `count`.
        """
        good: list[Item] = []
        left = iter(self.items if among is None else among)
        with pool() as workers:
            while some := list(islice(left, min(AT_ONCE, AT_ONCE if count is None else count - len(good)))):
                for item, line in zip(some, workers.map(self._why_bad, some), strict=True):
                    if line:
                        skipped.append(line)
                    else:
                        good.append(item)
        if not good or len(good) < (count or 0):
            wanted = "" if count is None else f", {count} were asked for"
            first = f"; the first that cannot: {skipped[0]}" if skipped else ""
            raise SbpatchError(f"{self.name}: {len(good)} samples can be read{wanted}{first}")
        found = copy(self)
        found.items = good
        return found

    def _why_bad(self, item: Item) -> str:
        """The line that reading it would end in, or ""."""
        if problem := self._label_problem(item):
            return str(SbpatchError(f"{item.where}: {problem}"))
        problem = _problem(item, self._scale) or ""
        return str(SbpatchError(_unread(item, problem))) if problem else ""

    def fit(self, classes: int | None) -> None:
        """From here on a label that is none of a model's classes is a bad sample, where the source does not name its own."""
        if classes is not None and not (self.named and self._classes):
            self._most = classes

    def _label_problem(self, item: Item) -> str:
        if item.problem or item.label < self._most:
            return item.problem
        return item.labelled(item.label, self._most).problem

    def fingerprint(self) -> str:
        """SHA-256 over the names, sizes and labels of the images in their order; their folder does not count."""
        lines = (f"{item.identity} {item.label}\n" for item in self.items)
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()

    def check(self) -> None:
        """Look at all labels and decode the images, at most 5,000 spread evenly, so that a bad file stops a run before it
        has begun. What comes as a stream is not read ahead.

        Raises:
            SbpatchError: some cannot be read; the line names the first one and says how many.
        """
        if not isinstance(self.items, Sequence):
            return
        for item in self.items:
            if problem := self._label_problem(item):
                raise SbpatchError(f"{item.where}: {problem}")
        items = strided(self.items, CHECKED)
        with pool() as workers:
            bad = [
                (item, problem)
                for item, problem in zip(items, workers.map(partial(_problem, scale=self._scale), items), strict=True)
                if problem
            ]
        if bad:
            item, problem = bad[0]
            raise SbpatchError(
                f"{self.name}: {len(bad)} of {len(items)} images cannot be read, the first is {item.where} ({problem}): "
                "remove or replace them, or see --skip-bad"
            )


def _unread(item: Item, problem: str) -> str:
    return f"{item.where} cannot be read as an image ({problem}): remove or replace it"


def _opened(item: Item, scale: Callable[[int, int], float]) -> Image.Image:
    """The image, not decoded yet, if it and what it is resized to are of a size to hold in memory.

    Raises:
        ValueError: it is not.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of half the size that is refused here
        try:
            image = item.open()
        except UnidentifiedImageError:  # whose own words name the object in memory
            raise ValueError("in no image format that is known") from None
    width, height = image.size
    if max(width * height, width * height * scale(width, height) ** 2) > MOST_PIXELS:
        image.close()
        raise ValueError(f"{width} x {height} px are too many, or too narrow to resize")
    return image


def _problem(item: Item, scale: Callable[[int, int], float]) -> str | None:
    try:
        image = _opened(item, scale)
        image.draft(
            "RGB", (image.width // 8, image.height // 8)
        )  # JPEG: every byte is still read, at a tenth of the time
        image.load()
    except IMAGE_ERRORS as error:
        return one_line(error)
    return None


def decode(data: bytes | None) -> Image.Image:
    return Image.open(BytesIO(data or b""))


def opened_file(path: Path) -> Image.Image:
    check_regular(path)
    return Image.open(path)


def file_item(path: Path, root: Path, label: int) -> Item:
    """An image in a file of its own; a pipe or a device is none."""
    try:
        found = kind(path)
        problem = f"it is {found}, not a file" if found else ""
    except SbpatchError as error:
        problem = one_line(error)
    identity = f"{path.relative_to(root).as_posix()} {0 if problem else path.stat().st_size}"
    return Item(str(path), identity, label, partial(opened_file, path), problem)
