"""`sbpatch compare`: methods side by side under one budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import torch
import typer

from .. import bounds
from ..attention import parse_method
from ..data.loading import Again
from ..errors import SbpatchError
from ..measure import device_name
from ..plan.plan import versions
from ..plan.recipe import Allocation
from ..study import compare
from ..writing import json_text
from .flags import (
    CheckpointFile,
    DataDir,
    Dataset,
    Device,
    DeviceFlag,
    Dtype,
    DtypeFlag,
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
from .inputs import calibration_set, default_batch, evaluation_set, input_batches, open_model
from .results import check_places, out, with_skipped, write_json, write_plot

ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)


def compare_command(
    model: Model,
    dataset: Dataset,
    methods: Annotated[str, typer.Option("--methods", help=f"comma-separated; {compare.method_names()}")] = ",".join(
        compare.METHODS
    ),
    budgets: Annotated[str, typer.Option("--budgets", help="budgets, comma-separated")] = "0.03",
    allocations: Annotated[
        str | None,
        typer.Option(
            "--allocations",
            help=f"comma-separated, a row each: {', '.join(ALLOCATIONS)}, also with {compare.REFINED}; see calibrate",
        ),
    ] = None,
    samples: Annotated[
        int, integer("--samples", most=bounds.SAMPLES, help="samples to calibrate and to measure errors on")
    ] = 8,
    limit: Annotated[
        int | None, integer("--limit", most=bounds.SAMPLES, help="evaluate on only this many samples")
    ] = None,
    length: Length = None,
    batch_size: Annotated[
        int | None,
        integer("--batch-size", most=bounds.BATCH, help="samples per batch; default: 8, for causal models 1"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="write error and agreement against budget as a PNG")
    ] = None,
    source: Source = None,
    data_dir: DataDir = None,
    skip_bad: SkipBad = False,
    checkpoint: CheckpointFile = None,
    device: DeviceFlag = Device.auto,
    dtype: DtypeFlag = Dtype.float32,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    check_places(json_file, plot, inputs=(model, dataset, source, data_dir, checkpoint))
    shares = [_share(text) for text in budgets.split(",")]
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name != "auto":
            parse_method(name)
    rules = [_allocation(text.strip()) for text in allocations.split(",")] if allocations is not None else []
    loaded = open_model(model, checkpoint, length=length)
    skipped: list[str] | None = [] if skip_bad else None
    data = evaluation_set(loaded, dataset, data_dir=data_dir, limit=limit, skipped=skipped)
    batch_size = batch_size or default_batch(loaded)
    sample = calibration_set(loaded, source, samples, seed, data_dir, skipped)
    where, kind = device.resolve(), getattr(torch, dtype.value)
    evaluation = Again(data, batch_size, where, kind, skipped)
    rows = compare.compare(
        loaded.model.to(where, kind),
        input_batches(loaded, sample, where, kind),
        evaluation,
        methods=names,
        budgets=shares,
        answer=loaded.answer,
        allocations=rules,
        seed=seed,
        progress=progress_bars(quiet),
    )
    title = f"{loaded.name} on {data.name}, {evaluation.count} samples, {device_name(where)}, {dtype.value}"
    if not quiet:
        out.print(compare.table(rows, title))
    write_plot(plot, lambda fresh: compare.plot(rows, fresh, title))
    settings = {
        "model": loaded.name,
        "dataset": data.name,
        "samples": evaluation.count,
        "batch_size": batch_size,
        "seed": seed,
    }
    device_used = {"device": device_name(where), "dtype": dtype.value, "versions": versions()}
    result = settings | device_used | {"rows": rows}
    write_json(json_file, json_text(with_skipped(result, skipped, quiet)))


def _share(text: str) -> float:
    try:
        return bounds.number_of(text, 0, 1)
    except ValueError as error:
        raise SbpatchError(f"budget '{text}' is not a number such as 0.03: {error}") from None


def _allocation(text: str) -> str:
    if text.removesuffix(compare.REFINED) not in ALLOCATIONS:
        known = f"{', '.join(ALLOCATIONS)}, each also with {compare.REFINED}"
        raise SbpatchError(f"unknown allocation '{text}': known are {known}")
    return text
