"""`sbpatch analyze`: what sparse, low-rank and robust PCA leave of each head's attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import bounds, processes
from ..study import analyze
from ..writing import json_text
from .flags import (
    CheckpointFile,
    DataDir,
    Device,
    DeviceFlag,
    JsonFile,
    Length,
    Model,
    Quiet,
    Seed,
    SkipBad,
    Source,
    integer,
    progress_bars,
)
from .inputs import input_batches, open_model, unpadded_set
from .results import check_places, out, with_skipped, write_json


def analyze_command(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="directory for the plots and analysis.json")],
    samples: Annotated[int, integer("--samples", most=bounds.SAMPLES, help="samples to run the model on")] = 8,
    length: Length = None,
    source: Source = None,
    data_dir: DataDir = None,
    skip_bad: SkipBad = False,
    checkpoint: CheckpointFile = None,
    device: DeviceFlag = Device.auto,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    analyze.check_output(output)
    check_places(json_file, inputs=(model, source, data_dir, checkpoint), directory=output)
    loaded = open_model(model, checkpoint, length=length)
    skipped: list[str] | None = [] if skip_bad else None
    data = unpadded_set(loaded, source, samples, seed, data_dir, skipped)
    where = device.resolve()
    loaded.model.to(where)
    inputs = input_batches(loaded, data, where, torch.float32)
    result = analyze.analyze(loaded, inputs, seed=seed, progress=progress_bars(quiet))
    if processes.is_first():
        analyze.write(result, output)
    if not quiet and processes.is_first():
        out.print(analyze.table(result))
        out.print(f"written to {output}: {', '.join(sorted(p.name for p in output.iterdir()))}")
    write_json(json_file, json_text(with_skipped(result, skipped, quiet)))
