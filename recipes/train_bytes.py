"""Texts as sequences of bytes: is a film review for or against, from full attention and from 1/8 of its entries.

    python recipes/train_bytes.py --json train-bytes.json
    python recipes/train_bytes.py --data DIR --tokens 4000 --entries 500 --json train-bytes-4000.json

The data are IMDb's reviews, `stanfordnlp/imdb` on the hub, or any others in that form: a data set of the hub, or a folder of
train.parquet and test.parquet, with columns `text` and `label`. A text is its first 1,024 bytes of UTF-8, padded where it has
fewer, and a model answers by the mean of its bytes (Long Range Arena, arXiv 2011.04006, where they are 4,000). The file of
figures and its table, train-bytes.md beside it, are written after each model; a run that was stopped goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import datasets
import torch
import training
from labelled import Labelled, classification
from training import Settings, Task

from sbpatch.data.hub import hub_or_cache
from sbpatch.data.samples import strided
from sbpatch.errors import SbpatchError, one_line

PADDING = 256  # after the bytes
METHODS = ("full", "scatterbrain", "reformer", "performer", "local", "lsh+clusters")
TESTED = 1000  # texts


def opened(data: str) -> datasets.DatasetDict:
    """The parts `train` and `test`.

    Raises:
        SbpatchError: they are not there, or lack a column.
    """
    try:
        with nullcontext() if Path(data).is_dir() else hub_or_cache():
            found = datasets.load_dataset(data)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise SbpatchError(
            f"{data} is neither a folder of parquet files nor a data set that Hugging Face or its cache can give "
            f"({one_line(error)})"
        ) from None
    for part in ("train", "test"):
        if part not in found:
            raise SbpatchError(f"{data}: expected the parts 'train' and 'test', found {', '.join(found)}")
        kinds = {name: str(getattr(kind, "dtype", "nested")) for name, kind in found[part].features.items()}
        if "string" not in kinds.get("text", "") or "int" not in kinds.get("label", ""):
            listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise SbpatchError(f"{data} {part}: expected a 'text' of strings and a 'label' of integers, found {listed}")
    return found


def sequences(name: str, texts: Sequence[str], labels: Sequence[int], tokens: int) -> Labelled:
    """The first bytes of each text, padded to `tokens`.

    Raises:
        SbpatchError: a text is empty.
    """
    rows = torch.full((len(texts), tokens), PADDING, dtype=torch.int16)
    for i, text in enumerate(texts):
        content = bytearray((text or "").encode()[:tokens])
        if not content:
            raise SbpatchError(f"{name}: text {i} is empty: remove it")
        rows[i, : len(content)] = torch.frombuffer(content, dtype=torch.uint8)
    return Labelled(name, rows, torch.tensor(labels), PADDING)


def task(data: str, tokens: int, tested: int) -> Task:
    """All training texts, and `tested` test texts spread over their part, which is often sorted by class."""
    found = opened(data)
    test = found["test"].select(strided(range(len(found["test"])), tested))
    train, test = (
        sequences(f"{data} {name}", part["text"][:], part["label"][:], tokens)
        for name, part in (("train", found["train"]), ("test", test))
    )
    label = found["train"].features["label"]
    classes = label.num_classes if isinstance(label, datasets.ClassLabel) else 1 + int(train.labels.max())
    return classification(PADDING + 1, classes, train, test)


def main() -> None:
    parser = training.arguments(__doc__, Settings(batch=8), METHODS, "train-bytes.json")
    parser.add_argument("--data", default="stanfordnlp/imdb", help="of the hub, or a folder of parquet files")
    parser.add_argument("--test", type=training.positive, default=TESTED, help="texts that accuracy is measured on")
    training.run(parser, lambda args: task(args.data, args.tokens, args.test))


if __name__ == "__main__":
    main()
