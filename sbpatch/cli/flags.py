"""Flags that several commands share, and what they do: models, samples, devices, progress bars, JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from .. import bounds, processes
from ..data import texts, tokens
from ..data.batch import Inputs, moved
from ..data.loading import batches
from ..data.preprocessing import Preprocessing, TextPreprocessing
from ..data.samples import Samples
from ..data.sources import open_images, sample_images
from ..errors import SbpatchError
from ..evaluation.evaluate import check_classes
from ..models.checkpoint import Checkpoint
from ..models.load import DEMO, load_checkpoint
from ..plan.plan import Plan
from .results import check_places as check_places
from .results import err as err
from .results import json_place
from .results import out as out
from .results import with_skipped as with_skipped
from .results import write_json as write_json
from .results import write_plot as write_plot


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"

    def resolve(self) -> str:
        """A device of PyTorch's; of several processes each takes a GPU of its own."""
        if self is not Device.cpu and torch.cuda.is_available():
            return "cuda" if processes.count() == 1 else f"cuda:{processes.place() % torch.cuda.device_count()}"
        if self is Device.auto:
            return "cpu"
        if self is Device.cuda and not torch.cuda.is_available():
            raise SbpatchError("no CUDA device here (torch.cuda.is_available() is false): use --device cpu")
        return self.value


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def integer(*names: str, least: int = 1, most: int, help: str | None = None) -> Any:
    """A flag that takes an integer within bounds, in the digits 0 to 9; anything else is wrong use."""
    return _bounded(partial(bounds.integer_of, least=least, most=most), "INTEGER", names, help)


def number(*names: str, least: float = 0, most: float, help: str | None = None) -> Any:
    """A flag that takes a finite number within bounds; anything else is wrong use."""
    return _bounded(partial(bounds.number_of, least=least, most=most), "NUMBER", names, help)


def _bounded(read: Callable[[str], Any], metavar: str, names: Sequence[str], help: str | None) -> Any:
    def parse(text: object) -> Any:
        try:
            return read(str(text))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return typer.Option(*names, parser=parse, metavar=metavar, help=help)


Model = Annotated[
    str, typer.Argument(help="alias (t2t-vit-demo, t2t-vit-14), timm name, Hugging Face id, directory or weights file")
]
CheckpointFile = Annotated[
    Path | None, typer.Option("--checkpoint", help="weights file to use instead of the published weights")
]
InputSize = Annotated[
    int | None, integer("--input-size", most=bounds.PIXELS, help="image size in pixels; default: the model's own")
]
Length = Annotated[
    int | None,
    integer("--length", least=2, most=bounds.TOKENS, help="tokens per text sample; default: the model's own"),
]
Dataset = Annotated[
    str,
    typer.Option(
        "--dataset", help="demo, imagenet-val, cifar10; wikitext-2, python-docs, passkey, needle; a path or a hub id"
    ),
]
Source = Annotated[
    str | None, typer.Option("--data", help="data set to draw the calibration sample from, a name or a path")
]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="folder that holds the files of the data set")]
DeviceFlag = Annotated[Device, typer.Option("--device", help="auto: a GPU where there is one")]
DtypeFlag = Annotated[Dtype, typer.Option("--dtype", help="dtype of weights and activations")]
Seed = Annotated[int, integer("--seed", least=0, most=bounds.SEED, help="seed of all random numbers")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="write the result to this file, - for standard output", callback=json_place),
]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad", help="count, name and leave out samples that cannot be read; else the first is an error"
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="no tables, no progress bars")]


def progress_bars(quiet: bool) -> Callable[[Sequence[Any], str], Iterable[Any]]:
    def progress(items: Sequence[Any], description: str) -> Iterable[Any]:
        return track(items, description=f"{description:<18}", console=err, disable=quiet or not processes.is_first())

    return progress


def lengths_of(text: str) -> list[int]:
    """Numbers of tokens, comma-separated.

    Raises:
        SbpatchError: they are something else.
    """
    try:
        return [bounds.integer_of(part, 1, bounds.TOKENS) for part in text.split(",")]
    except ValueError as error:
        raise SbpatchError(f"lengths '{text}' are not positive numbers such as 1024,4096: {error}") from None


# -- what a command runs on ------------------------------------------------------------------------------------------


def open_model(
    name: str,
    checkpoint: Path | None = None,
    input_size: int | None = None,
    length: int | None = None,
    plan: Plan | None = None,
) -> Checkpoint:
    """A model at the size asked for, else at its plan's, else at its own.

    Raises:
        SbpatchError: as `load_checkpoint`; a length for no text, pixels for text, or another length than that of a plan that
            is not causal, which no rule scales.
    """
    planned = plan.input_size if plan and plan.input_size else []
    fixed = plan is not None and not all(site.causal for site in plan.patched)
    if fixed and len(planned) == 1 and length not in (None, *planned):
        raise SbpatchError(f"{name} was calibrated at {planned[0]} tokens: calibrate again for a --length of {length}")
    loaded = load_checkpoint(name, checkpoint, input_size or length or (planned[-1] if planned else None))
    text = isinstance(loaded.preprocessing, TextPreprocessing)
    if (wrong := input_size if text else length) is not None:
        flags = "text: give --length, not --input-size" if text else "no text: give --input-size, not --length"
        raise SbpatchError(f"{loaded.name} takes {flags} {wrong}")
    return loaded


def size_of(loaded: Checkpoint) -> list[int]:
    """What a plan keeps of the inputs' size: (channels, height, width), or tokens alone."""
    preprocessing = loaded.preprocessing
    return [preprocessing.tokens] if isinstance(preprocessing, TextPreprocessing) else list(preprocessing.input_size)


def calibration_set(
    loaded: Checkpoint,
    source: str | None,
    count: int,
    seed: int,
    data_dir: Path | None = None,
    skipped: list[str] | None = None,
) -> Samples:
    """`count` samples of a kind that the model takes, of a source's training part.

    Without a source: the demo's own digits, the photographs that scikit-learn ships, or Python's language reference.
    `skipped` takes a line for each that is bad, and others are drawn in their place; None: the first is an error.

    Raises:
        SbpatchError: the source cannot be read, has too few, or is of the other kind.
    """
    preprocessing = loaded.preprocessing
    if isinstance(preprocessing, Preprocessing):
        source = source or ("demo" if loaded.name == DEMO else None)
        return sample_images(source, preprocessing, count, seed, data_dir=data_dir, skipped=skipped)
    text = texts.open_text(source or "python-docs", data_dir=data_dir, split="train", skipped=skipped)
    draw = tokens.sample_windows if loaded.answer == "next-token" else tokens.sample_passages
    return draw(text, preprocessing, count, seed)


def evaluation_set(
    loaded: Checkpoint,
    source: str,
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    stride: int | None = None,
    skipped: list[str] | None = None,
) -> Samples:
    """The samples of a source's test part, checked against the model.

    Args:
        skipped: takes a line for each text that is bad; bad images are then left for `batches` to skip.

    Raises:
        SbpatchError: the source cannot be read, is of the other kind, or has other classes than the model.
    """
    preprocessing = loaded.preprocessing
    if stride is not None and loaded.answer != "next-token":
        raise SbpatchError(f"--stride is for models that predict the next token, and {loaded.name} does not")
    if isinstance(preprocessing, Preprocessing):
        images = open_images(source, preprocessing, data_dir=data_dir, limit=limit, skip_bad=skipped is not None)
        images.fit(loaded.classes)  # before its classes are counted: one wrong label must not make it another set
        if skipped is None:
            images.check()
        check_classes(loaded, images)
        return images
    text = texts.open_text(source, data_dir=data_dir, skipped=skipped)
    if loaded.answer == "next-token":
        return tokens.windows(text, preprocessing, stride=stride, limit=limit)
    return tokens.passages(text, preprocessing, limit=limit)


def training_set(
    loaded: Checkpoint,
    source: str,
    data_dir: Path | None = None,
    limit: int | None = None,
    skipped: list[str] | None = None,
) -> Samples:
    """The samples of a source's training part, or `limit` of them spread evenly: images, windows or paragraphs of a text.

    `skipped` takes a line for each that is bad, which is left out; every image is looked at for that. None: the first is an
    error.

    Raises:
        SbpatchError: as `evaluation_set`.
    """
    preprocessing = loaded.preprocessing
    if isinstance(preprocessing, Preprocessing):
        images = open_images(
            source,
            preprocessing,
            data_dir=data_dir,
            split="train",
            limit=limit,
            skip_bad=skipped is not None,
            stored=True,
        )
        if skipped is None:
            images.check()
        else:
            images.fit(loaded.classes)
            images = images.without_bad(skipped)
        check_classes(loaded, images)
        return images
    text = texts.open_text(source, data_dir=data_dir, split="train", skipped=skipped)
    cut = tokens.windows if loaded.answer == "next-token" else tokens.passages
    return cut(text, preprocessing, limit=limit)


def default_batch(loaded: Checkpoint) -> int:
    """Samples a batch: one for causal models, whose windows are long and whose logits go over a vocabulary."""
    return 1 if loaded.answer == "next-token" else 8


def input_batches(loaded: Checkpoint, samples: Samples, device: str, dtype: torch.dtype) -> list[Inputs]:
    """The inputs of all samples on a device, in batches to calibrate on."""
    return [moved(x, device, dtype) for x, _ in batches(samples, default_batch(loaded))]


def unpadded_set(
    loaded: Checkpoint,
    source: str | None,
    count: int,
    seed: int,
    data_dir: Path | None,
    skipped: list[str] | None = None,
) -> Samples:
    """As `calibration_set`, but encoders get stretches of text as long as they take instead of padded paragraphs.

    Matrices then have one size, and their errors can be compared. The stretches are of running text, without headings, one
    from a random place in each of `count` equal parts.

    Raises:
        SbpatchError: as `calibration_set`, and a text too short for that many.
    """
    preprocessing = loaded.preprocessing
    if not isinstance(preprocessing, TextPreprocessing) or loaded.answer == "next-token":
        return calibration_set(loaded, source, count, seed, data_dir, skipped)
    text = texts.open_text(source or "python-docs", data_dir=data_dir, split="train", skipped=skipped)
    words = " ".join(text.paragraphs()).split()
    starts = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [words[int((i + u / 2) * len(words) / count) : (i + 1) * len(words) // count] for i, u in enumerate(starts)]
    stretches = texts.Text(text.name, "\n\n".join(" ".join(part) for part in parts))
    found = tokens.sample_passages(stretches, preprocessing, count, seed)
    if not all(found[i][0]["attention_mask"].all() for i in range(count)):
        raise SbpatchError(
            f"{text.name} has {len(words)} words, too few for {count} samples of {preprocessing.tokens} tokens: "
            "ask for fewer or shorter ones"
        )
    return found
