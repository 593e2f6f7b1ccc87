"""Images in tables: parquet files, read a piece at a time, and data sets of Hugging Face, from the hub or from a folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from ..errors import SbpatchError, one_line
from ..reading import check_regular
from .hub import hub_or_cache
from .images import Item, decode

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
PIECE = 64 << 20  # bytes of a column that are held at once
OPEN_GROUPS = 4  # row groups, one piece of each
SHUFFLED = 1000  # samples of a stream, among which those to calibrate on are drawn
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)


class Rows:
    """One column of one row group of a parquet file, read forward; a row before the piece that is held begins it again."""

    def __init__(self, path: Path, group: int, column: str, rows: int) -> None:
        self.path, self.group, self.column, self.rows = path, group, column, rows  # rows a piece
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        file = pq.ParquetFile(self.path, buffer_size=1 << 20)
        self._pieces = file.iter_batches(self.rows, row_groups=[self.group], columns=[self.column], use_threads=False)
        self._start, self._piece = 0, pa.array([])

    def row(self, index: int) -> bytes | None:
        with self._lock:
            if index < self._start:
                self._begin()
            while index >= self._start + len(self._piece):
                self._start += len(self._piece)
                self._piece = encoded(next(self._pieces).column(0))
            return self._piece[index - self._start].as_py()


@lru_cache(OPEN_GROUPS)
def _rows(path: Path, group: int, column: str, rows: int) -> Rows:
    return Rows(path, group, column, rows)


def _cell(path: Path, group: int, column: str, rows: int, index: int) -> Image.Image:
    return decode(_rows(path, group, column, rows).row(index))


def encoded(column: Any) -> Any:
    """A column of encoded images as one of bytes: they stand alone, or as `datasets` stores them, beside a path."""
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    return column


def parquet_images(files: Sequence[Path]) -> tuple[list[Item], int, bool]:
    """The rows of parquet files, how many classes, and whether these are named; only the labels are held.

    Raises:
        SbpatchError: a file is damaged, or it has no columns of encoded images and of labels.
    """
    items: list[Item] = []
    classes = None
    for path in files:
        check_regular(path)
        try:
            file = pq.ParquetFile(path)
            schema = file.schema_arrow
            image, label = _columns(str(path), {field.name: field.type for field in schema})
            labels = file.read(columns=[label])[label].to_pylist()
        except PARQUET_ERRORS as error:
            raise SbpatchError(f"{path} is damaged or not a parquet file ({one_line(error)})") from None
        classes = _named_classes(schema, label) if classes is None else classes
        items += _of_groups(path, file.metadata, image, labels)
    return items, classes or 0, classes is not None


def _of_groups(path: Path, metadata: Any, image: str, labels: Sequence[Any]) -> Iterator[Item]:
    size, first = path.stat().st_size, 0
    for group in range(metadata.num_row_groups):
        found = metadata.row_group(group)
        rows = max(1, found.num_rows * PIECE // max(found.total_byte_size, PIECE))
        for i in range(found.num_rows):
            n = first + i
            opened = partial(_cell, path, group, image, rows, i)
            yield Item(f"{path} row {n}", f"{path.name} {size} {n}", -1, opened).labelled(labels[n])
        first += found.num_rows


def _columns(name: str, types: Mapping[str, pa.DataType]) -> tuple[str, str]:
    image = next((c for c in IMAGE_COLUMNS if c in types), None)
    label = next((c for c in LABEL_COLUMNS if c in types), None)
    if image is None or label is None or not pa.types.is_integer(types[label]):
        raise SbpatchError(
            f"{name}: expected columns 'image' (encoded bytes) and 'label' (integers), found {', '.join(types)}"
        )
    kind = types[image]
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise SbpatchError(f"{name}: column '{image}' holds {kind}, not encoded images")
    return image, label


def _named_classes(schema: pa.Schema, label: str) -> int | None:
    """How many classes `datasets` noted in the file that it wrote."""
    import datasets  # slow to import, and only this needs it

    if b"huggingface" not in (schema.metadata or {}):
        return None
    try:
        feature = datasets.Features.from_arrow_schema(schema)[label]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return feature.num_classes if isinstance(feature, datasets.ClassLabel) else None


# -- data sets of Hugging Face -----------------------------------------------------------------------------------------


def saved_images(folder: Path) -> tuple[list[Item], int, bool]:
    """The rows of a folder that `datasets` saved, which stay on the disk.

    Raises:
        SbpatchError: it cannot be read, or has no columns of encoded images and of labels.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (*PARQUET_ERRORS, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise SbpatchError(f"{folder} cannot be read as a data set that was saved ({one_line(error)})") from None
    if isinstance(found, datasets.DatasetDict):
        raise SbpatchError(f"{folder} has the splits {', '.join(found)}: give the folder of one, {folder}/NAME")
    return _mapped(str(folder), found)


def _mapped(name: str, found: Any) -> tuple[list[Item], int, bool]:
    """A `datasets.Dataset`, whose table lies in files on the disk."""
    table = found.data.table
    image, label = _columns(name, {field.name: field.type for field in table.schema})
    data, labels = encoded(table[image]), table[label].to_pylist()
    sizes = pc.binary_length(data).to_pylist()
    classes = _classes(found.features[label])
    items = [
        Item(f"{name} row {i}", f"{i} {size}", -1, partial(_held, data, i)).labelled(y)
        for i, (y, size) in enumerate(zip(labels, sizes, strict=True))
    ]
    return items, classes or 0, classes is not None


def _held(column: Any, row: int) -> Image.Image:
    return decode(column[row].as_py())


def _classes(feature: Any) -> int | None:
    return getattr(feature, "num_classes", None)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What Hugging Face raises, as one line."""
    import datasets

    errors = (OSError, ValueError, RuntimeError, pa.ArrowException, datasets.exceptions.DatasetsError)
    try:
        yield
    except errors as error:
        raise SbpatchError(
            f"{name} is neither a path here nor a data set that Hugging Face or its cache can give ({one_line(error)})"
        ) from None


def stored_images(name: str, split: str) -> tuple[list[Item], int, bool]:
    """A data set of the hub, stored in Hugging Face's cache and read from there, so that it can be read in any order.

    Raises:
        SbpatchError: it cannot be had, or has no columns of encoded images and of labels.
    """
    import datasets

    with _told(name), hub_or_cache():
        wanted = _split(name, split)
        found = datasets.load_dataset(name, split=wanted)
    return _mapped(f"{name} ({wanted})", found)


class HubStream:
    """The samples of a split on the hub as they come, `limit` of them spread evenly; nothing is stored.

    Raises:
        SbpatchError: it cannot be had, ends too early, or has no columns of images and of labels.
    """

    def __init__(self, name: str, split: str, limit: int | None = None) -> None:
        import datasets

        with _told(name), hub_or_cache():
            wanted = _split(name, split)
            found = datasets.load_dataset(name, split=wanted, streaming=True)
            features = found.features or found._resolve_features().features
            self.name = f"{name} ({wanted})"
            schema = features.arrow_schema
            self.image, self.label = _columns(self.name, {field.name: field.type for field in schema})
            self.classes = _classes(features[self.label])
            if isinstance(features[self.image], datasets.Image):
                found = found.cast_column(self.image, datasets.Image(decode=False))
            self.split = found.select_columns([self.image, self.label])
            noted = (found.info.splits or {}).get(wanted)
            self.total = noted.num_examples if noted else sum(1 for _ in found.select_columns([self.label]))
        self.count = self.total if limit is None else min(limit, self.total)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        taken = row = 0
        with _told(self.name):
            for row, sample in enumerate(self.split):
                if taken == self.count:
                    return
                if row == taken * self.total // self.count:
                    taken += 1
                    yield self._item(row, sample)
        if taken < self.count:
            raise SbpatchError(f"{self.name} ended after {row + 1} of {self.total} samples: try again")

    def shuffled(self, count: int, seed: int) -> Iterator[Item]:
        """Its samples in an order that the seed draws, the first `count` from its beginning, or from those of its files."""
        shuffled = self.split.shuffle(seed=seed, buffer_size=max(SHUFFLED, count))
        with _told(self.name):
            for i, sample in enumerate(shuffled):
                yield self._item(i, sample)

    def _item(self, row: int, sample: Mapping[str, Any]) -> Item:
        cell = sample[self.image]
        data, path = (cell["bytes"], cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
        opened = partial(_fetched, path) if data is None and path else partial(decode, data)
        item = Item(f"{self.name} row {row}", f"{row} {len(data or b'')}", -1, opened)
        return item.labelled(sample[self.label])


def _fetched(path: str) -> Image.Image:
    with fsspec.open(path) as file:
        return decode(file.read())


def _split(name: str, split: str) -> str:
    import datasets

    splits = datasets.get_dataset_split_names(name)
    found = next((s for s in (("train",) if split == "train" else ("validation", "test")) if s in splits), None)
    if found is None:
        raise SbpatchError(f"{name}: no {split} images, its splits are {', '.join(splits)}")
    return found
