"""The commands that study rather than patch: compare, analyze, bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from . import analyze, artifact, bench, compare, evaluate
from .attention import parse_method
from .data import batches, open_images, sample_images
from .errors import SbpatchError
from .flags import (
    CheckpointFile,
    DataDir,
    Device,
    DeviceFlag,
    Dtype,
    DtypeFlag,
    JsonFile,
    Model,
    Quiet,
    Seed,
    default_data,
    json_place,
    out,
    progress_bars,
    write_json,
)  # fmt: skip
from .models import load_checkpoint
from .plan import versions


def compare_command(
    model: Model,
    dataset: Annotated[str, typer.Option("--dataset", help="demo, imagenet-val, cifar10, a path or a hub id")],
    methods: Annotated[str, typer.Option("--methods", help=f"comma-separated; {compare.method_names()}")] = ",".join(
        compare.METHODS
    ),
    budgets: Annotated[str, typer.Option("--budgets", help="comma-separated shares")] = "0.03",
    samples: Annotated[int, typer.Option("--samples", min=1, help="to calibrate and measure errors on")] = 8,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="evaluate on that many samples")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="write error and agreement against budget as a PNG")
    ] = None,
    source: Annotated[str | None, typer.Option("--data", help="where the calibration sample comes from")] = None,
    data_dir: DataDir = None,
    checkpoint: CheckpointFile = None,
    device: DeviceFlag = Device.auto,
    dtype: DtypeFlag = Dtype.float32,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Methods side by side under one budget definition: accuracy, agreement, errors, time."""
    json_place(plot)
    shares = [_share(text) for text in budgets.split(",")]
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name != "auto":
            parse_method(name)
    loaded = load_checkpoint(model, checkpoint)
    images = open_images(dataset, loaded.preprocessing, data_dir=data_dir, limit=limit)
    images.check()
    evaluate.check_classes(loaded, images)
    where, kind = device.resolve(), getattr(torch, dtype.value)
    sample = sample_images(source or default_data(loaded), loaded.preprocessing, samples, seed, data_dir=data_dir)
    rows = compare.compare(
        loaded.model.to(where, kind),
        [x.to(where, kind) for x, _ in batches(sample, 8)],
        [(x.to(where, kind), y) for x, y in batches(images, batch_size)],
        methods=names,
        budgets=shares,
        seed=seed,
        progress=progress_bars(quiet),
    )
    title = f"{loaded.name} on {images.name}, {len(images)} samples, {evaluate.device_name(where)}, {dtype.value}"
    if not quiet:
        out.print(compare.table(rows, title))
    if plot is not None:
        with artifact.written_whole(plot) as fresh:
            compare.plot(rows, fresh, title)
    settings = {
        "model": loaded.name,
        "dataset": images.name,
        "samples": len(images),
        "batch_size": batch_size,
        "seed": seed,
    }
    device_used = {"device": evaluate.device_name(where), "dtype": dtype.value, "versions": versions()}
    write_json(json_file, json.dumps(settings | device_used | {"rows": rows}, indent=2) + "\n")


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SbpatchError(f"budget '{text}' is not a number such as 0.03") from None


def analyze_command(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="directory for the plots and analysis.json")],
    samples: Annotated[int, typer.Option("--samples", min=1)] = 8,
    source: Annotated[str | None, typer.Option("--data", help="where the sample comes from")] = None,
    data_dir: DataDir = None,
    checkpoint: CheckpointFile = None,
    device: DeviceFlag = Device.auto,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """What sparse, low-rank and robust PCA leave of every head's attention, against its entropy; plots and correlations."""
    analyze.check_output(output)
    loaded = load_checkpoint(model, checkpoint)
    images = sample_images(source or default_data(loaded), loaded.preprocessing, samples, seed, data_dir=data_dir)
    where = device.resolve()
    loaded.model.to(where)
    inputs = [x.to(where) for x, _ in batches(images, 8)]
    result = analyze.analyze(loaded, inputs, seed=seed, progress=progress_bars(quiet))
    analyze.write(result, output)
    if not quiet:
        out.print(analyze.table(result))
        out.print(f"written to {output}: {', '.join(sorted(p.name for p in output.iterdir()))}")
    write_json(json_file, json.dumps(result, indent=2) + "\n")


def bench_command(
    lengths: Annotated[str, typer.Option("--lengths", help="tokens, comma-separated")] = "1024,4096,16384",
    methods: Annotated[str, typer.Option("--methods", help="comma-separated")] = ",".join(bench.METHODS),
    budget: Annotated[float, typer.Option("--budget", help="entries stored / entries")] = 0.03,
    heads: Annotated[int, typer.Option("--heads", min=1)] = 4,
    head_dim: Annotated[int, typer.Option("--head-dim", min=1)] = 64,
    batch: Annotated[int, typer.Option("--batch", min=1)] = 1,
    causal: Annotated[bool, typer.Option("--causal")] = False,
    device: DeviceFlag = Device.auto,
    dtype: DtypeFlag = Dtype.float32,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Time and memory of one attention call against eager and SDPA, by length (the paper's Figure 6)."""
    if not all(text.strip().isdigit() and int(text) > 0 for text in lengths.split(",")):
        raise SbpatchError(f"lengths '{lengths}' are not positive numbers such as 1024,4096")
    where = device.resolve()
    rows = bench.bench(
        [int(text) for text in lengths.split(",")], [name.strip() for name in methods.split(",")],
        budget=budget, heads=heads, head_dim=head_dim, batch=batch, causal=causal, device=where,
        dtype=getattr(torch, dtype.value), seed=seed, progress=progress_bars(quiet),
    )  # fmt: skip
    settings = {"device": evaluate.device_name(where), "dtype": dtype.value, "versions": versions()}
    if not quiet:
        out.print(
            bench.table(rows, f"one call, {batch} x {heads} heads x {head_dim}, {settings['device']}, {dtype.value}")
        )
    write_json(json_file, json.dumps(settings | {"rows": rows}, indent=2) + "\n")
