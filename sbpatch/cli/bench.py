"""`sbpatch bench`: single attention calls by length, against eager and SDPA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import bounds
from ..data.batch import Inputs, moved
from ..data.loading import batches
from ..errors import SbpatchError
from ..measure import device_name
from ..models.checkpoint import Checkpoint
from ..plan.plan import versions
from ..study import bench, bench_model, bench_report
from ..study.bench_model import at_length
from ..writing import json_text
from .flags import (
    CheckpointFile,
    DataDir,
    Device,
    DeviceFlag,
    Dtype,
    DtypeFlag,
    InputSize,
    JsonFile,
    Quiet,
    Seed,
    SkipBad,
    Source,
    integer,
    lengths_of,
    number,
    progress_bars,
)
from .inputs import open_model, unpadded_set
from .results import check_places, out, with_skipped, write_json, write_plot


def bench_command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="model whose attention calls are measured; default: random inputs"),
    ] = None,
    source: Source = None,
    data_dir: DataDir = None,
    skip_bad: SkipBad = False,
    checkpoint: CheckpointFile = None,
    site: Annotated[
        str | None, typer.Option("--site", help="only sites of MODEL whose name matches this pattern")
    ] = None,
    input_size: InputSize = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="tokens, comma-separated; default: 1024,4096,16384 or MODEL's own")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="comma-separated, as for compare; default: a few, and auto")
    ] = None,
    budget: Annotated[float, number("--budget", most=1e9, help="entries stored / entries of exact attention")] = 0.03,
    heads: Annotated[int | None, integer("--heads", most=bounds.HEADS, help="without MODEL; default: 4")] = None,
    head_dim: Annotated[int | None, integer("--head-dim", most=bounds.WIDTH, help="without MODEL; default: 64")] = None,
    batch: Annotated[int, integer("--batch", most=bounds.BATCH, help="samples per call")] = 1,
    causal: Annotated[bool, typer.Option("--causal", help="without MODEL")] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="plot of output error against speed, and of time against length, as a PNG"),
    ] = None,
    device: DeviceFlag = Device.auto,
    dtype: DtypeFlag = Dtype.float32,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    check_places(json_file, plot, inputs=(model, source, data_dir, checkpoint))
    wanted = None if lengths is None else lengths_of(lengths)
    names = [] if methods is None else [name.strip() for name in methods.split(",")]
    bench.check_settings(names, budget)
    where, kind = device.resolve(), getattr(torch, dtype.value)
    options: dict[str, Any] = {"budget": budget, "seed": seed, "progress": progress_bars(quiet)}
    settings = {"device": device_name(where), "dtype": dtype.value, "versions": versions()}
    replayed = ", replays of CUDA graphs" if where == "cuda" else ""
    skipped: list[str] | None = [] if skip_bad else None
    if model is None:
        _refuse_without_model(source, data_dir, checkpoint, site, input_size, skip_bad or None)
        options |= {"heads": heads or 4, "head_dim": head_dim or 64, "batch": batch, "causal": causal}
        subject = f"one call, {batch} x {heads or 4} heads x {head_dim or 64}" + (", causal" if causal else "")
        rows = bench.bench(wanted or bench.LENGTHS, names, device=where, dtype=kind, **options)
    else:
        _refuse_with_model(heads, head_dim, causal)
        loaded = open_model(model, checkpoint, input_size)
        pairs = _bench_samples(loaded, wanted, source, seed, data_dir, batch, where, kind, skipped)
        settings["model"] = subject = loaded.name
        rows = bench_model.bench_model(loaded.model.to(where, kind), pairs, names, pattern=site or "*", **options)
    title = f"{subject}, {settings['device']}, {dtype.value}{replayed}"
    if not quiet:
        out.print(bench_report.table(rows, title))
    write_plot(plot, lambda fresh: bench_report.plot(rows, fresh, title))
    write_json(json_file, json_text(with_skipped(settings | {"rows": rows}, skipped, quiet)))


def _refuse_without_model(*given: object) -> None:
    flags = ("--data", "--data-dir", "--checkpoint", "--site", "--input-size", "--skip-bad")
    if wrong := [flag for flag, value in zip(flags, given, strict=True) if value is not None]:
        raise SbpatchError(f"{', '.join(wrong)} without a MODEL: name one, as in sbpatch bench t2t-vit-demo")


def _refuse_with_model(*given: object) -> None:
    flags = ("--heads", "--head-dim", "--causal")
    if wrong := [flag for flag, value in zip(flags, given, strict=True) if value]:
        raise SbpatchError(f"{', '.join(wrong)} with a MODEL, whose calls have shapes of their own: leave it out")


def _bench_samples(
    loaded: Checkpoint,
    lengths: Sequence[int] | None,
    source: str | None,
    seed: int,
    data_dir: Path | None,
    batch: int,
    device: str,
    dtype: torch.dtype,
    skipped: list[str] | None,
) -> list[tuple[Inputs, Inputs]]:
    """Two batches a length, one to measure on and one to fit on; texts without padding."""
    subjects = [loaded] if lengths is None else [at_length(loaded, tokens) for tokens in lengths]
    found = []
    for subject in subjects:
        one, other = batches(unpadded_set(subject, source, 2 * batch, seed, data_dir, skipped), batch)
        found.append((moved(one[0], device, dtype), moved(other[0], device, dtype)))
    return found
