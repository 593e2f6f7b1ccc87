"""`sbpatch finetune`: a patched directory and a data set -> one whose weights are tuned to the patch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import JustifyMethod
from rich.table import Table

from ..measure import device_name
from ..plan import artifact, report
from ..plan.patch import read_plan
from ..plan.plan import Plan, versions
from ..training import Result, Settings, Train, finetune, save
from ..training.samples import divided
from ..writing import beside, json_text
from .flags import DataDir, Dataset, Device, DeviceFlag, Dtype, JsonFile, Quiet, Seed, SkipBad, progress_bars
from .inputs import default_batch, open_model, training_set
from .results import out, with_skipped, write_json


def finetune_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="what calibrate or finetune wrote")],
    dataset: Dataset,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="directory to write; default: DIR-finetuned")
    ] = None,
    data_dir: DataDir = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="passes over the samples; default: 1")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="number of updates, instead of epochs")] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", min=1e-12, help="largest step size of AdamW; default: by --train")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="samples per update; default: 8, for causal models 1")
    ] = None,
    accumulate: Annotated[
        int,
        typer.Option("--accumulate", min=1, help="split each batch into this many parts, to save memory"),
    ] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="compute activations again in the backward pass, to save memory")
    ] = False,
    distill: Annotated[
        bool, typer.Option("--distill", help="train towards the exact model's outputs instead of labels")
    ] = False,
    train: Annotated[
        Train,
        typer.Option("--train", help="which weights to train; attention: projections of the patched sites, and norms"),
    ] = Train.all,
    lora_rank: Annotated[int, typer.Option("--lora-rank", min=1, help="rank for --train lora")] = 8,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="use only this many samples, spread evenly over the set")
    ] = None,
    validation: Annotated[
        int, typer.Option("--validation", min=1, help="samples set aside to select the best state")
    ] = 64,
    skip_bad: SkipBad = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue the interrupted run to this output")] = False,
    device: DeviceFlag = Device.auto,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="dtype of activations; weights stay float32")] = Dtype.float32,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    if epochs is not None and steps is not None:
        raise typer.BadParameter("give epochs or steps, not both", param_hint="--epochs / --steps")
    target = output or directory.absolute().with_name(f"{directory.absolute().name}-finetuned")
    artifact.check_output(target)
    plan = read_plan(directory)
    loaded = open_model(str(directory), plan=plan)
    skipped: list[str] | None = [] if skip_bad else None
    samples, aside = divided(training_set(loaded, dataset, data_dir, limit, skipped), validation, seed)
    settings = Settings(
        epochs or 1, steps, lr, batch_size or default_batch(loaded), accumulate, train, lora_rank, distill,
        checkpointing, dtype.value, seed,
    )  # fmt: skip
    result = finetune(
        directory, samples, aside, settings, device=device.resolve(),
        state=beside(target, "finetuning"), resume=resume,
        progress=progress_bars(quiet),
    )  # fmt: skip
    if not result.main:  # of several processes one writes
        return
    best = result.best
    record = {
        "dataset": samples.name, "samples": len(samples), "steps": round(best["step"]), "train": train.value,
        "distill": distill, "lr": settings.step_size, "batch_size": settings.batch_size, "seed": seed,
        "fingerprint": samples.fingerprint(),
    }  # fmt: skip
    save(target, directory, result.weights, record)
    result.close()
    if not quiet:
        out.print(_table(plan, result))
        out.print(f"written to {target}; next: sbpatch eval {target} --dataset NAME")
    answer: dict[str, Any] = {
        "model": plan.model, "dataset": samples.name, "samples": len(samples), "validation_samples": len(aside),
        "seed": seed, "device": device_name(device.resolve()), "dtype": dtype.value, "versions": versions(),
        "settings": asdict(settings) | {"lr": settings.step_size}, "processes": result.processes,
        "trained_parameters": result.trained, "losses": result.losses,
        "validation": result.progress.validations, "best": best,
    }  # fmt: skip
    write_json(json_file, json_text(with_skipped(answer, skipped, quiet)))


def _table(plan: Plan, result: Result) -> Table:
    """A row a validation, the best one bold."""
    figures = [key for key in report.QUALITY if key in result.best]
    columns: dict[str, JustifyMethod] = {"step": "left", "loss": "right"}
    columns |= {report.QUALITY[key][0]: "right" for key in figures}
    table = report.simple_table(f"{plan.model}, fine-tuned", **columns)
    for row in result.progress.validations:
        values = [format(row[key], report.QUALITY[key][1]) for key in figures]
        table.add_row(f"{row['step']:.0f}", f"{row['loss']:.4g}", *values, style="bold" if row is result.best else None)
    return table
