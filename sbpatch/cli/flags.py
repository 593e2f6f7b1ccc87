"""Flags that several commands share, and what they do: devices, dtypes, progress bars."""

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
from ..errors import SbpatchError
from .results import err, json_place


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
