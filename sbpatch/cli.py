"""Patch the attention of pretrained models with calibrated sparse + low-rank layers, and prove what it gained.

sbpatch calibrate t2t-vit-demo · sbpatch eval --dataset demo · sbpatch export
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer

from . import __version__, artifact, evaluate, export, report
from .calibrate import calibrate, first_decision
from .data import batches, open_images, sample_images
from .errors import SbpatchError
from .flags import (
    CheckpointFile,
    DataDir,
    Device,
    DeviceFlag,
    Dtype,
    DtypeFlag,
    InputSize,
    JsonFile,
    Model,
    Quiet,
    Seed,
    default_data,
    err,
    out,
    progress_bars,
    write_json,
)  # fmt: skip
from .models import load_checkpoint
from .patch import read_plan
from .plan import PLAN_FILE, Budget, Plan, SitePlan, versions
from .recipe import read_recipe
from .sites import find_sites
from .studies import analyze_command, bench_command, compare_command

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(value: bool) -> None:
    if value:
        out.print(f"sbpatch {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


@app.command("inspect")
def inspect_command(
    model: Model,
    input_size: InputSize = None,
    checkpoint: CheckpointFile = None,
    device: DeviceFlag = Device.auto,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """List the attention sites of MODEL: what would be patched, what not, and why."""
    loaded = load_checkpoint(model, checkpoint, input_size)
    where = device.resolve()
    probe = torch.zeros(1, *loaded.preprocessing.input_size, device=where)
    sites = [SitePlan.of(site, *first_decision(site)) for site in find_sites(loaded.model.to(where).eval(), probe)]
    plan = Plan(model=loaded.name, seed=seed, budget=Budget(requested=1.0), sites=sites)
    if not quiet:
        out.print(report.sites_table(plan))
    write_json(json_file, plan.to_json())


@app.command("calibrate")
def calibrate_command(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="directory to write")] = Path("sbpatch-out"),
    checkpoint: CheckpointFile = None,
    source: Annotated[
        str | None, typer.Option("--data", help="where the sample comes from: a data set's name or path")
    ] = None,
    data_dir: DataDir = None,
    samples: Annotated[int, typer.Option("--samples", min=1)] = 32,
    budget: Annotated[
        float | None, typer.Option("--budget", help="entries stored / entries, over the patched sites")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="auto, or a method such as window2d+clusters")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="YAML file with settings; flags go before it")] = None,
    include: Annotated[list[str] | None, typer.Option("--include", help="only sites that match, repeatable")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="leave matching sites exact, repeatable")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan, write nothing")] = False,
    input_size: InputSize = None,
    device: DeviceFlag = Device.auto,
    dtype: DtypeFlag = Dtype.float32,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Measure the attention of MODEL on a sample, plan its patch under a budget, and write the patched directory."""
    settings = read_recipe(recipe)
    if not dry_run:
        artifact.check_output(output)
    loaded = load_checkpoint(model, checkpoint, input_size)
    source = source or settings.data or default_data(loaded)
    images = sample_images(source, loaded.preprocessing, samples, seed, data_dir=data_dir)
    where, kind = device.resolve(), getattr(torch, dtype.value)
    inputs = [x.to(where, kind) for x, _ in batches(images, 8)]
    plan = calibrate(
        loaded.model.to(where, kind),
        inputs,
        budget=settings.budget if budget is None else budget,
        method=method or settings.method,
        seed=seed,
        include=include or settings.include,
        exclude=exclude or settings.exclude,
        min_tokens=settings.min_tokens,
        fixed=settings.sites,
        name=loaded.name,
        progress=progress_bars(quiet),
    )
    plan.base_sha256, plan.input_size = loaded.sha256, list(loaded.preprocessing.input_size)
    plan.data = {"source": images.name, "samples": len(images), "fingerprint": images.fingerprint()}
    plan.device, plan.dtype = where, dtype.value
    if not quiet:
        out.print(report.plan_table(plan))
    if not dry_run:
        loaded.model.to("cpu", torch.float32)
        artifact.save(output, loaded, plan)
        if not quiet:
            out.print(
                f"written to {output}: plan, weights, model card and report.png; next: sbpatch eval {output} --dataset NAME"
            )
    write_json(json_file, plan.to_json())


@app.command("eval")
def eval_command(
    dataset: Annotated[str, typer.Option("--dataset", help="demo, imagenet-val, cifar10, a path or a hub id")],
    model: Annotated[
        str, typer.Argument(metavar="[DIR|MODEL]", help="what calibrate wrote, or any MODEL")
    ] = "sbpatch-out",
    data_dir: DataDir = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="that many samples, spread evenly")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    checkpoint: CheckpointFile = None,
    device: DeviceFlag = Device.auto,
    dtype: DtypeFlag = Dtype.float32,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Accuracy, agreement, time and memory of the model in eager mode, with SDPA, and patched, side by side."""
    plan = read_plan(Path(model)) if model == "sbpatch-out" or (Path(model) / PLAN_FILE).is_file() else None
    loaded = load_checkpoint(model, checkpoint, plan.input_size[-1] if plan and plan.input_size else None)
    images = open_images(dataset, loaded.preprocessing, data_dir=data_dir, limit=limit)
    images.check()
    evaluate.check_classes(loaded, images)
    subject = evaluate.Subject(model, checkpoint, device.resolve(), dtype.value)
    variants = evaluate.evaluate(subject, images, batch_size=batch_size, progress=progress_bars(quiet))
    sites = plan.sites if plan else evaluate.exact_sites(loaded)
    for name, figures in variants.items():
        figures["attention_memory_bytes"] = evaluate.attention_memory_bytes(sites, name, subject)
    result = {
        "model": plan.model if plan else loaded.name,
        "dataset": images.name,
        "samples": len(images),
        "batch_size": batch_size,
        "seed": plan.seed if plan else seed,
        "device": evaluate.device_name(subject.device),
        "dtype": dtype.value,
        "versions": versions(),
        "variants": variants,
    }
    if not quiet:
        out.print(report.eval_table(result))
    write_json(json_file, json.dumps(result, indent=2) + "\n")


@app.command("export")
def export_command(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="what calibrate wrote")] = Path("sbpatch-out"),
    form: Annotated[export.Format, typer.Option("--format")] = export.Format.pt2,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="file or directory to write; default: beside DIR")
    ] = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Export the patched model, run it in its own runtime, and print the largest difference to the model."""
    plan = read_plan(directory)
    loaded = load_checkpoint(str(directory), None, plan.input_size[-1] if plan.input_size else None)
    source = "demo" if plan.data.get("source") == "demo" else None
    images = next(batches(sample_images(source, loaded.preprocessing, 3, seed), 3))[0]
    target = output or export.default_path(directory, form)
    with err.status(f"exporting to {form.value}") if not quiet else nullcontext():
        difference = export.export(directory, form, target, images)
    if not quiet:
        size = export.size_bytes(target) / 1e6
        out.print(
            f"written to {target} ({size:.1f} MB), run in {form.runtime}, largest difference of the logits {difference:.2e}"
        )
    result = {"path": str(target), "format": form.value, "runtime": form.runtime, "difference": difference}
    write_json(json_file, json.dumps(result | {"versions": versions()}, indent=2) + "\n")


for name, command in (("compare", compare_command), ("analyze", analyze_command), ("bench", bench_command)):
    app.command(name)(command)


def main() -> None:
    """Entry point: an SbpatchError is one line and exit code 1; wrong use is exit code 2 (by Typer)."""
    try:
        app()
    except SbpatchError as error:
        err.print(f"sbpatch: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
