"""The commands that study rather than patch: compare, analyze, bench."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer

from ..attention import parse_method
from ..data import texts, tokens
from ..data.batch import Inputs, moved
from ..data.preprocessing import TextPreprocessing
from ..data.samples import Samples, batches
from ..errors import SbpatchError
from ..evaluation import evaluate
from ..models.checkpoint import Checkpoint
from ..plan import artifact
from ..plan.plan import versions
from ..plan.recipe import Allocation
from ..study import analyze, bench, bench_model, bench_report, compare
from ..study.bench_model import at_length
from .flags import (  # fmt: skip
    CheckpointFile,
    DataDir,
    Dataset,
    Device,
    DeviceFlag,
    Dtype,
    DtypeFlag,
    InputSize,
    JsonFile,
    Length,
    Model,
    Quiet,
    Seed,
    Source,
    calibration_set,
    default_batch,
    evaluation_set,
    input_batches,
    json_place,
    open_model,
    out,
    progress_bars,
    write_json,
)

ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)


def compare_command(
    model: Model,
    dataset: Dataset,
    methods: Annotated[str, typer.Option("--methods", help=f"comma-separated; {compare.method_names()}")] = ",".join(
        compare.METHODS
    ),
    budgets: Annotated[str, typer.Option("--budgets", help="comma-separated shares")] = "0.03",
    allocations: Annotated[
        str | None,
        typer.Option(
            "--allocations",
            help=f"comma-separated, a row each: {', '.join(ALLOCATIONS)}, also with {compare.REFINED}; see calibrate",
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="to calibrate and measure errors on")] = 8,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="evaluate on that many samples")] = None,
    length: Length = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="default: 8, for causal models 1")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="write error and agreement against budget as a PNG")
    ] = None,
    source: Source = None,
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
    rules = [_allocation(text.strip()) for text in allocations.split(",")] if allocations is not None else []
    loaded = open_model(model, checkpoint, length=length)
    data = evaluation_set(loaded, dataset, data_dir=data_dir, limit=limit)
    batch_size = batch_size or default_batch(loaded)
    sample = calibration_set(loaded, source, samples, seed, data_dir)
    where, kind = device.resolve(), getattr(torch, dtype.value)
    rows = compare.compare(
        loaded.model.to(where, kind),
        input_batches(loaded, sample, where, kind),
        [(moved(x, where, kind), y) for x, y in batches(data, batch_size)],
        methods=names,
        budgets=shares,
        answer=loaded.answer,
        allocations=rules,
        seed=seed,
        progress=progress_bars(quiet),
    )
    title = f"{loaded.name} on {data.name}, {len(data)} samples, {evaluate.device_name(where)}, {dtype.value}"
    if not quiet:
        out.print(compare.table(rows, title))
    if plot is not None:
        with artifact.written_whole(plot) as fresh:
            compare.plot(rows, fresh, title)
    settings = {
        "model": loaded.name,
        "dataset": data.name,
        "samples": len(data),
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


def _allocation(text: str) -> str:
    if text.removesuffix(compare.REFINED) not in ALLOCATIONS:
        known = f"{', '.join(ALLOCATIONS)}, each also with {compare.REFINED}"
        raise SbpatchError(f"unknown allocation '{text}': known are {known}")
    return text


def analyze_command(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="directory for the plots and analysis.json")],
    samples: Annotated[int, typer.Option("--samples", min=1)] = 8,
    length: Length = None,
    source: Source = None,
    data_dir: DataDir = None,
    checkpoint: CheckpointFile = None,
    device: DeviceFlag = Device.auto,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """What sparse, low-rank and robust PCA leave of every head's attention, against its entropy; plots and correlations."""
    analyze.check_output(output)
    loaded = open_model(model, checkpoint, length=length)
    data = _unpadded_set(loaded, source, samples, seed, data_dir)
    where = device.resolve()
    loaded.model.to(where)
    inputs = input_batches(loaded, data, where, torch.float32)
    result = analyze.analyze(loaded, inputs, seed=seed, progress=progress_bars(quiet))
    analyze.write(result, output)
    if not quiet:
        out.print(analyze.table(result))
        out.print(f"written to {output}: {', '.join(sorted(p.name for p in output.iterdir()))}")
    write_json(json_file, json.dumps(result, indent=2) + "\n")


def _unpadded_set(loaded: Checkpoint, source: str | None, count: int, seed: int, data_dir: Path | None) -> Samples:
    """As `calibration_set`, but encoders get stretches of text as long as they take instead of padded paragraphs.

    Matrices then have one size, and their errors can be compared. The stretches are of running text, without headings, one
    from a random place in each of `count` equal parts.

    Raises:
        SbpatchError: as `calibration_set`, and a text too short for that many.
    """
    preprocessing = loaded.preprocessing
    if not isinstance(preprocessing, TextPreprocessing) or loaded.answer == "next-token":
        return calibration_set(loaded, source, count, seed, data_dir)
    text = texts.open_text(source or "python-docs", data_dir=data_dir, split="train")
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


def bench_command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="whose attention calls to measure; default: random ones")
    ] = None,
    source: Source = None,
    data_dir: DataDir = None,
    checkpoint: CheckpointFile = None,
    site: Annotated[str | None, typer.Option("--site", help="only the sites of MODEL that match")] = None,
    input_size: InputSize = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="tokens, comma-separated; default: 1024,4096,16384 or MODEL's own")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="comma-separated, as compare takes them; default: a few, and auto")
    ] = None,
    budget: Annotated[float, typer.Option("--budget", help="entries stored / entries of exact attention")] = 0.03,
    heads: Annotated[int | None, typer.Option("--heads", min=1, help="without MODEL; default: 4")] = None,
    head_dim: Annotated[int | None, typer.Option("--head-dim", min=1, help="without MODEL; default: 64")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="samples a call")] = 1,
    causal: Annotated[bool, typer.Option("--causal", help="without MODEL")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="write time against length as a PNG")] = None,
    device: DeviceFlag = Device.auto,
    dtype: DtypeFlag = Dtype.float32,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Time and memory of one attention call against eager and SDPA, by length (the paper's Figure 6)."""
    json_place(plot)
    wanted = None if lengths is None else _lengths(lengths)
    names = [] if methods is None else [name.strip() for name in methods.split(",")]
    bench.check_settings(names, budget)
    where, kind = device.resolve(), getattr(torch, dtype.value)
    options: dict[str, Any] = {"budget": budget, "seed": seed, "progress": progress_bars(quiet)}
    settings = {"device": evaluate.device_name(where), "dtype": dtype.value, "versions": versions()}
    replayed = ", replays of CUDA graphs" if where == "cuda" else ""
    if model is None:
        _refuse_without_model(source, data_dir, checkpoint, site, input_size)
        options |= {"heads": heads or 4, "head_dim": head_dim or 64, "batch": batch, "causal": causal}
        subject = f"one call, {batch} x {heads or 4} heads x {head_dim or 64}" + (", causal" if causal else "")
        rows = bench.bench(wanted or bench.LENGTHS, names, device=where, dtype=kind, **options)
    else:
        _refuse_with_model(heads, head_dim, causal)
        loaded = open_model(model, checkpoint, input_size)
        pairs = _bench_samples(loaded, wanted, source, seed, data_dir, batch, where, kind)
        settings["model"] = subject = loaded.name
        rows = bench_model.bench_model(loaded.model.to(where, kind), pairs, names, pattern=site or "*", **options)
    title = f"{subject}, {settings['device']}, {dtype.value}{replayed}"
    if not quiet:
        out.print(bench_report.table(rows, title))
    if plot is not None:
        with artifact.written_whole(plot) as fresh:
            bench_report.plot(rows, fresh, title)
    write_json(json_file, json.dumps(settings | {"rows": rows}, indent=2) + "\n")


def _lengths(text: str) -> list[int]:
    if not all(part.strip().isdigit() and int(part) > 0 for part in text.split(",")):
        raise SbpatchError(f"lengths '{text}' are not positive numbers such as 1024,4096")
    return [int(part) for part in text.split(",")]


def _refuse_without_model(*given: object) -> None:
    flags = ("--data", "--data-dir", "--checkpoint", "--site", "--input-size")
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
) -> list[tuple[Inputs, Inputs]]:
    """Two batches a length, one to measure on and one to fit on; texts without padding."""
    subjects = [loaded] if lengths is None else [at_length(loaded, tokens) for tokens in lengths]
    found = []
    for subject in subjects:
        one, other = batches(_unpadded_set(subject, source, 2 * batch, seed, data_dir), batch)
        found.append((moved(one[0], device, dtype), moved(other[0], device, dtype)))
    return found
