"""Images in tar archives, alone or as WebDataset shards: read once for their index, then each image from its place."""

from __future__ import annotations

import glob
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image

from ..errors import SbpatchError, one_line, printable
from ..reading import check_regular
from .images import SUFFIXES, Item, decode

LABEL = ".cls"  # of a WebDataset sample: its class in digits
MOST_DIGITS = 32  # bytes of such a label
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")  # {000..127} in the name of shards
MOST_SHARDS = 1 << 17


@dataclass(frozen=True)
class Member:
    """A file in an archive: `size` bytes from `offset`."""

    archive: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def image(self) -> Image.Image:
        return decode(self.read())

    def item(self, label: int = -1, problem: str = "") -> Item:
        identity = f"{PurePosixPath(self.name).name} {self.size}"
        return Item(f"{self.archive}:{printable(self.name)}", identity, label, partial(Member.image, self), problem)


def members(path: Path) -> list[Member]:
    """The files in an uncompressed tar archive, in their order.

    Raises:
        SbpatchError: it is none, or it is cut off.
    """
    check_regular(path)
    try:
        with tarfile.open(path, "r:") as archive:  # a compressed one has no places to read from
            found = [Member(path, m.name, m.offset_data, m.size) for m in archive if m.isfile()]
        size = path.stat().st_size
        if wrong := next((m for m in found if not 0 <= m.offset + m.size <= size), None):
            raise EOFError(f"{printable(wrong.name)} goes beyond its end")
    except Exception as error:  # tarfile raises much for headers of nonsense
        raise SbpatchError(
            f"{path} is damaged or not a tar file ({one_line(error)}): get it again, or unpack it"
        ) from None
    return found


def shards(pattern: str) -> list[Path]:
    """The archives that a name with `*`, `?` or `{000..127}` in it means, in order; a plain name means itself."""
    if found := NUMBERS.search(pattern):
        first, last = int(found[1]), int(found[2])
        if not 0 <= last - first < MOST_SHARDS:
            raise SbpatchError(f"{pattern}: {found[0]} is no range of shards")
        numbers = (f"{number:0{len(found[1])}d}" for number in range(first, last + 1))
        return [path for n in numbers for path in shards(pattern.replace(found[0], n, 1))]
    if any(c in pattern for c in "*?"):
        return [Path(path) for path in sorted(glob.glob(pattern))]
    return [Path(pattern)]


def archived_images(paths: Sequence[Path]) -> tuple[list[Item], int, bool]:
    """The images in archives, how many classes, and whether these are named.

    Of a WebDataset sample (`000.jpg`, `000.cls`) the label is in its `.cls`. Where no archive has any, labels count the
    folders of the images in sorted order.

    Raises:
        SbpatchError: an archive is damaged, or the images have neither labels nor at least two folders.
    """
    found = [member for path in paths for member in members(path)]
    images = [m for m in found if m.name.lower().endswith(SUFFIXES)]
    labels = {_key(m): m for m in found if m.name.endswith(LABEL)}
    if labels:
        return list(_labelled(images, labels)), 0, False
    folders = sorted({PurePosixPath(m.name).parent.name for m in images})
    if len(folders) < 2:
        raise SbpatchError(
            f"{paths[0]}: expected a {LABEL} file beside each image, as WebDataset has them, or one folder of images per class"
        )
    index = {name: i for i, name in enumerate(folders)}
    return [m.item(index[PurePosixPath(m.name).parent.name]) for m in images], len(folders), True


def _labelled(images: Sequence[Member], labels: dict[tuple[Path, str], Member]) -> Iterator[Item]:
    for image in images:
        label = labels.get(_key(image))
        if label is None:
            yield image.item(problem=f"it has no {LABEL} file beside it")
            continue
        digits = label.read().strip() if label.size <= MOST_DIGITS else b"a long text"
        plain = digits.isdigit() or digits == b"-1"
        yield image.item().labelled(int(digits) if plain else digits.decode(errors="backslashreplace"))


def _key(member: Member) -> tuple[Path, str]:
    """What the files of one sample share: archive, folder, and name up to its first dot."""
    folder, name = PurePosixPath(member.name).parent, PurePosixPath(member.name).name
    return member.archive, str(folder / name.split(".", 1)[0])
