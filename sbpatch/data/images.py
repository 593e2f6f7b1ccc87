"""Images and their labels behind one preprocessing, decoded when they are asked for.

Every image is converted to RGB as it is stored; an EXIF rotation is not applied, as in the evaluation of the models it is
meant for.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import SbpatchError, one_line
from ..reading import check_regular
from .preprocessing import Preprocessing
from .samples import pool, strided

MOST_PIXELS = 1 << 27  # of an image, as it is stored and as it is resized: 400 MB in memory
CHECKED = 5000  # images that `check` decodes at most: about ten seconds
# What Pillow raises for a file that is not an image, a broken one, or one far too large: its readers check little.
IMAGE_ERRORS = (Exception,)


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
        self._scale = preprocessing.scale

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.items[index]
        try:
            image = _opened(item, self._scale).convert("RGB")
        except IMAGE_ERRORS as error:
            raise SbpatchError(
                f"{item.where} cannot be read as an image ({one_line(error)}): remove or replace it"
            ) from None
        return self._transform(image), item.label

    def fingerprint(self) -> str:
        """SHA-256 over the names, sizes and labels of the images in their order; their folder does not count."""
        lines = (f"{item.identity} {item.label}\n" for item in self.items)
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()

    def check(self) -> None:
        """Decode the images, at most 5,000 spread evenly, so that a bad file stops a run before it has begun.

        Raises:
            SbpatchError: some cannot be read; the line names the first one and says how many.
        """
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
                "remove or replace them"
            )


def _opened(item: Item, scale: Callable[[int, int], float]) -> Image.Image:
    """The image, not decoded yet, if it and what it is resized to are of a size to hold in memory.

    Raises:
        ValueError: it is not.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of half the size that is refused here
        image = item.open()
    width, height = image.size
    if max(width * height, width * height * scale(width, height) ** 2) > MOST_PIXELS:
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


def file_item(path: Path, root: Path, label: int) -> Item:
    check_regular(path)
    return Item(
        str(path), f"{path.relative_to(root).as_posix()} {path.stat().st_size}", label, partial(Image.open, path)
    )
