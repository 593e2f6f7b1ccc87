"""Texts: a name or path -> the text that a split of it holds.

A data set with a training split is calibrated on that split and evaluated on its validation or test split. A single text
is split by position: its first quarter is for calibration, the other three quarters are for evaluation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import SbpatchError, one_line
from ..reading import check_regular
from .hub import hub_or_cache

NAMES = ("wikitext-2", "python-docs")
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")  # on the hub
IMAGES = ("demo", "imagenet-val", "cifar10", "sklearn-photos")  # known names of the other kind
# File names of a split, the first that is there; the parquet files as the hub has them.
FILES = ("wiki.{}.raw", "wiki.{}.tokens", "{}.txt", "{}*.parquet")
SPLITS = {"train": ("train",), "test": ("valid", "validation", "test")}
SUFFIXES = (".txt", ".tokens", ".raw", ".md")
PARAGRAPH = 200  # characters: what is shorter says too little to compare embeddings of
ROWS = 256  # of a parquet file that are read at a time
MOST = 20_000_000  # characters read of a longer text: about five million tokens


@dataclass(frozen=True)
class Text:
    """A text and the name that figures are stated with."""

    name: str
    content: str

    def part(self, split: str) -> Text:
        """Its first quarter (`train`) or the rest (`test`), cut at the end of a line."""
        quarter = len(self.content) // 4
        cut = self.content.find("\n", quarter) + 1 or quarter
        if split == "train":
            return Text(f"{self.name}, first 1/4", self.content[:cut])
        return Text(f"{self.name}, last 3/4", self.content[cut:])

    def paragraphs(self) -> list[str]:
        """Paragraphs of at least 200 characters, without headings (` = Title = `).

        They are set apart by empty lines; where a line alone is that long, every line is a paragraph.
        """
        found = []
        for block in re.split(r"\n\s*\n", self.content):
            lines = [" ".join(line.split()) for line in block.splitlines() if not re.fullmatch(r"\s*=.*=\s*", line)]
            found += lines if any(len(line) >= PARAGRAPH for line in lines) else [" ".join(lines)]
        return [paragraph for paragraph in found if len(paragraph) >= PARAGRAPH]


# -- opening ---------------------------------------------------------------------------------------------------------


def is_text(source: str) -> bool:
    """Whether a source can only be a text: one of NAMES, or a file with a text's suffix."""
    return source in NAMES or Path(source).suffix.lower() in SUFFIXES


def open_text(
    source: str, *, data_dir: Path | None = None, split: str = "test", skipped: list[str] | None = None
) -> Text:
    """Open a text.

    Args:
        source: one of
            - `wikitext-2`: in `data_dir`, or in a folder `wikitext-2*` there, as `wiki.valid.raw`, `wiki.valid.tokens`,
              `valid.txt` or `validation*.parquet`, the other splits alike; without `data_dir` the hub's raw version.
            - `python-docs`: Python's own language reference, as `help()` shows it.
            - a UTF-8 file, or a parquet file with a column `text`, or a folder of such files, one after the other.
            - a Hugging Face data set `owner/name` with a column `text`.
        data_dir: where `wikitext-2` is.
        split: `train` (for calibration) or `test` (for evaluation).
        skipped: takes a line for each file of a folder and each row of a parquet file that is no text, which is left out;
            None: the first is an error.

    Raises:
        SbpatchError: the source is unknown, missing, empty or no text; the line says what was looked for where.
    """
    path = Path(os.path.expanduser(source))
    if source == "python-docs":
        text = Text(source, _language_reference()).part(split)
    elif source == "wikitext-2" and data_dir is not None:
        text = _wikitext(Path(data_dir), split)
    elif source == "wikitext-2":
        text = _hub(source, *WIKITEXT, split)
    elif path.exists() and not path.is_dir():
        text = Text(source, _read(path, skipped)).part(split)
    elif source and (files := _files(path)):
        text = Text(source, _joined(files, skipped)).part(split)
    elif source in IMAGES:
        raise SbpatchError(
            f"{source} holds images, and this model takes text: known are {', '.join(NAMES)} and text files"
        )
    elif path.is_dir():
        raise SbpatchError(f"{source} is a directory without text files: give a text file or wikitext-2")
    elif source.count("/") == 1 and not source.startswith((".", "~", "/")) and not path.suffix:
        text = _hub(source, source, None, split)
    elif "/" in source or path.suffix:
        raise SbpatchError(f"no such file: {source}")
    else:
        raise SbpatchError(f"unknown text '{source}': known are {', '.join(NAMES)}, owner/name and text files")
    if not text.content.strip():
        raise SbpatchError(f"{text.name}: no text in it")
    return text


def _language_reference() -> str:
    """Every paragraph once: many a topic is a part of another one, indented otherwise."""
    paragraphs = [paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n")]
    return "\n\n".join({" ".join(paragraph.split()): paragraph for paragraph in paragraphs}.values())


def _wikitext(folder: Path, split: str) -> Text:
    """The split's own file; where there is no training split, a part of the file to evaluate on."""
    folders = [folder, *sorted(f for f in folder.glob("wikitext-2*") if f.is_dir())]

    def found(split: str) -> list[Path]:
        patterns = (pattern.format(name) for name in SPLITS[split] for pattern in FILES)
        return next((files for p in patterns for f in folders if (files := sorted(f.glob(p)))), [])

    train, test = found("train"), found("test")
    files = (train if split == "train" else test) or train or test
    if not files:
        names = ", ".join(pattern.format("valid") for pattern in FILES)
        raise SbpatchError(f"wikitext-2: none of {names} in {folder} or a folder wikitext-2* there")
    text = Text(f"wikitext-2 {files[0].name}", "\n\n".join(_read(file) for file in files))
    return text if train and test else text.part(split)


def _hub(name: str, repository: str, config: str | None, split: str) -> Text:
    import datasets  # slow to import, and only this needs it

    try:
        with hub_or_cache():
            splits = datasets.get_dataset_split_names(repository, config)
            train, test = (next((s for s in SPLITS[key] if s in splits), None) for key in ("train", "test"))
            wanted = (train if split == "train" else test) or train or test or splits[0]
            table = datasets.load_dataset(repository, config, split=wanted).data.table
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise SbpatchError(
            f"{name} is neither a path here nor a data set that Hugging Face or its cache can give ({one_line(error)})"
        ) from None
    _check_column(name, table.schema)
    text = Text(f"{name} ({wanted})", _column(name, [table]))
    return text if train and test else text.part(split)


def _files(folder: Path) -> list[Path]:
    """The text and parquet files below a folder, by name."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (*SUFFIXES, ".parquet")]


def _joined(files: list[Path], skipped: list[str] | None) -> str:
    """Files set apart by empty lines; what is no text left out, if it is to be skipped."""
    found: list[str] = []
    for path in files:
        try:
            found.append(_read(path, skipped))
        except SbpatchError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
        if sum(map(len, found)) >= MOST:
            break
    return "\n\n".join(found)[:MOST]


def _read(path: Path, skipped: list[str] | None = None) -> str:
    check_regular(path)
    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path, buffer_size=1 << 20)
            _check_column(str(path), file.schema_arrow)
            return _column(str(path), file.iter_batches(ROWS, columns=["text"]), skipped)
        with path.open(encoding="utf-8") as text:
            return text.read(MOST)
    except UnicodeDecodeError as error:
        raise SbpatchError(f"{path} is no UTF-8 text ({one_line(error)})") from None
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise SbpatchError(f"{path} cannot be read ({one_line(error)})") from None


def _check_column(name: str, schema: pa.Schema) -> None:
    columns = {field.name: str(field.type) for field in schema}
    if columns.get("text") not in ("string", "large_string"):
        found = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
        raise SbpatchError(f"{name}: expected a column 'text' of strings, found {found}")


def _column(name: str, tables: Iterable[Any], skipped: list[str] | None = None) -> str:
    """Rows of the column `text`, set apart by empty lines, as the published perplexities have them."""
    rows: list[str] = []
    size = 0
    for number, cell in enumerate(cell for table in tables for cell in table.column("text")):
        try:
            rows.append(cell.as_py() or "")
        except UnicodeDecodeError as error:
            if skipped is None:
                raise SbpatchError(f"{name} row {number} is no UTF-8 text ({one_line(error)})") from None
            skipped.append(f"{name} row {number} is no UTF-8 text ({one_line(error)})")
            continue
        size += len(rows[-1])
        if size >= MOST:
            break
    return "\n\n".join(rows)[:MOST]
