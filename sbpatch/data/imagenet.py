"""ImageNet's validation images, in whichever of the accepted forms they lie, and their labels."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path

from ..bounds import integer_of
from ..errors import SbpatchError, one_line
from ..reading import check_regular
from .archives import members
from .images import SUFFIXES, Item, file_item

VAL_TAR, DEVKIT = "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12"
MOST_ID, MOST_METADATA = 100_000, 64 << 20  # of the devkit's numbers for classes; bytes of one of its files
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def imagenet_val(roots: Sequence[Path | str | None]) -> list[Item]:
    """The validation images in the first of the places that has some, whichever of the accepted forms they have."""
    places = [Path(root).expanduser() for root in roots if root]
    index = _index()
    for place in places:
        for folder in (place, place / "val", place / "ILSVRC2012_img_val"):
            if not folder.is_dir():
                continue
            wnids = sorted(d.name for d in folder.iterdir() if d.is_dir() and d.name in index)
            if wnids:
                files = (f for w in wnids for f in sorted((folder / w).iterdir()) if f.suffix.lower() in SUFFIXES)
                return [file_item(f, folder, index[f.parent.name]) for f in files]
            flat = sorted(folder.glob("ILSVRC2012_val_*.JPEG"))
            if flat:
                labels = _labels(place, index)
                return [_labelled(file_item(f, folder, -1), f.name, labels, place) for f in flat]
        if (place / VAL_TAR).is_file():
            return _tar(place / VAL_TAR, _labels(place, index))
    if not places:
        raise SbpatchError("imagenet-val: say where it is with --data-dir DIR or $IMAGENET_DIR")
    raise SbpatchError(
        f"imagenet-val: neither class folders n01440764/, ILSVRC2012_val_*.JPEG nor {VAL_TAR} in "
        f"{' or '.join(map(str, places))} or val/ under it"
    )


@cache
def _index() -> dict[str, int]:
    """Class of each WordNet id."""
    from timm.data.imagenet_info import ImageNetInfo  # slow to import, and only ImageNet needs it

    return {wnid: i for i, wnid in enumerate(ImageNetInfo().label_names())}


def _tar(path: Path, labels: Mapping[str, int]) -> list[Item]:
    found = sorted(members(path), key=lambda m: m.name)
    return [_labelled(m.item(), Path(m.name).name, labels, path.parent) for m in found]


def _labelled(item: Item, name: str, labels: Mapping[str, int], place: Path) -> Item:
    if name not in labels:
        return replace(item, problem=f"imagenet-val: the labels in {place} do not cover {name}")
    return replace(item, label=labels[name])


def _labels(place: Path, index: Mapping[str, int]) -> dict[str, int]:
    """File name -> class, from val.txt or the devkit; its ids from 1 follow their own order, which meta.mat translates."""
    from scipy.io.matlab import loadmat

    try:
        if (place / "val.txt").is_file():
            rows = (line.split() for line in (place / "val.txt").read_text().splitlines() if line.strip())
            return {Path(name).name: integer_of(label, 0, len(index) - 1) for name, label in rows}
        truth, meta = _devkit_file(place, TRUTH), _devkit_file(place, META)
        if truth is None:
            raise SbpatchError(f"imagenet-val: no labels in {place}: put val.txt or {DEVKIT}.tar.gz beside the images")
        if meta is None:
            raise SbpatchError(
                f"imagenet-val: {TRUTH} in {place} cannot be read without the devkit's {META}: put it beside it"
            )
        synsets = loadmat(BytesIO(meta), squeeze_me=True)["synsets"]
        classes = {int(s["ILSVRC2012_ID"]): index[str(s["WNID"])] for s in synsets if str(s["WNID"]) in index}
        ids = [integer_of(line, 1, MOST_ID) for line in truth.decode("ascii").split()]
        return {f"ILSVRC2012_val_{i:08d}.JPEG": classes[number] for i, number in enumerate(ids, start=1)}
    except SbpatchError:
        raise
    except Exception as error:  # SciPy's reader checks little of what it reads
        raise SbpatchError(
            f"imagenet-val: the labels in {place} are not in the official form ({one_line(error)})"
        ) from None


def _devkit_file(place: Path, name: str) -> bytes | None:
    for folder in (place, place / "data", place / DEVKIT / "data"):
        if (folder / name).is_file():
            check_regular(folder / name)
            return (folder / name).read_bytes()
    if (place / f"{DEVKIT}.tar.gz").is_file():
        with tarfile.open(place / f"{DEVKIT}.tar.gz") as archive:
            member = archive.extractfile(f"{DEVKIT}/data/{name}")
            return member.read(MOST_METADATA) if member else None
    return None
