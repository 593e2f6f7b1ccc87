"""Flags that several commands share, and what they do: devices, progress bars, JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from . import artifact
from .errors import SbpatchError
from .models import DEMO, Checkpoint

out, err = Console(), Console(stderr=True)


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"

    def resolve(self) -> str:
        if self is Device.auto:
            return "cuda" if torch.cuda.is_available() else "cpu"
        if self is Device.cuda and not torch.cuda.is_available():
            raise SbpatchError("no CUDA device here (torch.cuda.is_available() is false): use --device cpu")
        return self.value


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def json_place(path: Path | None) -> Path | None:
    """Refuse a place that cannot be written to before any work is done."""
    if path is not None and str(path) != "-" and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise SbpatchError(f"cannot write {path}: it is a directory, or its folder does not exist")
    return path


Model = Annotated[str, typer.Argument(help="alias (t2t-vit-demo, t2t-vit-14), directory, checkpoint file or timm name")]
CheckpointFile = Annotated[Path | None, typer.Option("--checkpoint", help="weights file in place of the published one")]
InputSize = Annotated[int | None, typer.Option("--input-size", help="pixels a side, where not the model's own")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="where the data set's files are")]
DeviceFlag = Annotated[Device, typer.Option("--device")]
DtypeFlag = Annotated[Dtype, typer.Option("--dtype", help="of weights and activations")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="of everything random")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="write the result to this file, - for standard output", callback=json_place),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="no tables, no progress bars")]


def progress_bars(quiet: bool) -> Callable[[Sequence[Any], str], Iterable[Any]]:
    def progress(items: Sequence[Any], description: str) -> Iterable[Any]:
        return track(items, description=f"{description:<18}", console=err, disable=quiet)

    return progress


def write_json(path: Path | None, text: str) -> None:
    if path is not None and str(path) == "-":
        sys.stdout.write(text)
    elif path is not None:
        with artifact.written_whole(path) as fresh:
            fresh.write_text(text, encoding="utf-8")


def default_data(checkpoint: Checkpoint) -> str | None:
    """The sample where --data is not given: the demo's own digits, else the photographs that scikit-learn ships."""
    return "demo" if checkpoint.name == DEMO else None
