"""Patch the attention of pretrained models with calibrated sparse + low-rank layers, and prove what it gained.

sbpatch calibrate t2t-vit-demo · sbpatch eval --dataset demo · sbpatch export
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..calibration.costs import CostTable, default_path
from ..calibration.decide import first_decision
from ..calibration.journal import Journal
from ..calibration.stages import calibrate
from ..data.batch import moved
from ..data.preprocessing import TextPreprocessing
from ..data.samples import batches
from ..errors import SbpatchError
from ..evaluation import evaluate, export
from ..plan import artifact, report
from ..plan.patch import read_plan
from ..plan.plan import PLAN_FILE, Budget, Plan, versions
from ..plan.recipe import Allocation, Objective, read_recipe
from ..sites.find import find_sites
from ..version import __version__
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
    err,
    evaluation_set,
    input_batches,
    open_model,
    out,
    progress_bars,
    size_of,
    write_json,
)
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
    length: Length = None,
    checkpoint: CheckpointFile = None,
    device: DeviceFlag = Device.auto,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """List the attention sites of MODEL: what would be patched, what not, and why."""
    loaded = open_model(model, checkpoint, input_size, length)
    where = device.resolve()
    probe = moved(loaded.preprocessing.probe(), where, torch.float32)
    costs = CostTable(default_path(), torch.device(where))
    sites = [first_decision(site, limit=costs) for site in find_sites(loaded.model.to(where).eval(), probe)]
    plan = Plan(model=loaded.name, seed=seed, budget=Budget(requested=1.0), sites=sites)
    if not quiet:
        out.print(report.sites_table(plan))
    write_json(json_file, plan.to_json())


@app.command("calibrate")
def calibrate_command(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="directory to write")] = Path("sbpatch-out"),
    checkpoint: CheckpointFile = None,
    source: Source = None,
    data_dir: DataDir = None,
    samples: Annotated[int, typer.Option("--samples", min=1)] = 32,
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="entries stored / entries of exact attention, over all sites it decides on"),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", help="in place of a budget: points of top-1, or percent of perplexity, it may cost"),
    ] = None,
    objective: Annotated[Objective | None, typer.Option("--objective", help="what the budget is a share of")] = None,
    allocation: Annotated[
        Allocation | None, typer.Option("--allocation", help="joint, or a simpler rule to compare with it")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="auto, or a method such as window2d+clusters")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="YAML file with settings; flags go before it")] = None,
    include: Annotated[list[str] | None, typer.Option("--include", help="only sites that match, repeatable")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="leave matching sites exact, repeatable")
    ] = None,
    keep_slow: Annotated[
        bool,
        typer.Option(
            "--keep-slow", help="also patch where exact attention is faster, to save what eager attention stores"
        ),
    ] = False,
    cost_table: Annotated[
        Path | None,
        typer.Option(
            "--cost-table", help="times of this device, measured where they lack; default: in the user's cache"
        ),
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="learn more of the patch by matching each site's output, some minutes")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan, write nothing")] = False,
    input_size: InputSize = None,
    length: Length = None,
    device: DeviceFlag = Device.auto,
    dtype: DtypeFlag = Dtype.float32,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Measure the attention of MODEL on a sample, plan its patch under a budget, and write the patched directory."""
    if budget is not None and max_drop is not None:
        raise typer.BadParameter("give a budget or a largest drop, not both", param_hint="--budget / --max-drop")
    settings = read_recipe(recipe)
    if not dry_run:
        artifact.check_output(output)
    loaded = open_model(model, checkpoint, input_size, length)
    data = calibration_set(loaded, source or settings.data, samples, seed, data_dir)
    where, kind = device.resolve(), getattr(torch, dtype.value)
    options: dict[str, Any] = {
        "budget": settings.budget if budget is None else budget,
        "max_drop": settings.max_drop if max_drop is None and budget is None else max_drop,
        "method": method or settings.method,
        "objective": objective or settings.objective,
        "allocation": allocation or settings.allocation,
        "seed": seed,
        "include": include or settings.include,
        "exclude": exclude or settings.exclude,
        "min_tokens": settings.min_tokens,
        "keep_slow": keep_slow,
    }
    costs = CostTable(cost_table or default_path(), torch.device(where), kind)
    measured_on = (loaded.sha256, size_of(loaded), data.fingerprint(), where, dtype.value, versions())
    journal = Journal(
        None if dry_run else output.absolute().with_name(f".{output.absolute().name}.calibrating"),
        json.dumps([options, settings.model_dump(mode="json")["sites"], *measured_on]),
    )
    with journal.removed_on_refusal():
        plan = calibrate(
            loaded.model.to(where, kind),
            input_batches(loaded, data, where, kind),
            answer=loaded.answer,
            **options,
            fixed=settings.sites,
            costs=costs,
            refine=refine,
            name=loaded.name,
            journal=journal,
            progress=progress_bars(quiet),
        )
    plan.base_sha256, plan.input_size = loaded.sha256, size_of(loaded)
    plan.data = {"source": data.name, "samples": len(data), "fingerprint": data.fingerprint()}
    plan.device, plan.dtype = where, dtype.value
    if not quiet:
        out.print(report.plan_table(plan))
    if not dry_run:
        loaded.model.to("cpu", torch.float32)
        artifact.save(output, loaded, plan)
        journal.close()
        if not quiet:
            out.print(
                f"written to {output}: plan, weights, model card and report.png; next: sbpatch eval {output} --dataset NAME"
            )
    write_json(json_file, plan.to_json())


@app.command("eval")
def eval_command(
    dataset: Dataset,
    model: Annotated[
        str, typer.Argument(metavar="[DIR|MODEL]", help="what calibrate wrote, or any MODEL")
    ] = "sbpatch-out",
    data_dir: DataDir = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="that many samples, spread evenly")] = None,
    length: Length = None,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="tokens newly scored a window; default: all of them")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="default: 8, for causal models 1")
    ] = None,
    checkpoint: CheckpointFile = None,
    device: DeviceFlag = Device.auto,
    dtype: DtypeFlag = Dtype.float32,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Accuracy or perplexity, agreement, time and memory of the model in eager mode, with SDPA, and patched, side by side."""
    plan = read_plan(Path(model)) if model == "sbpatch-out" or (Path(model) / PLAN_FILE).is_file() else None
    loaded = open_model(model, checkpoint, length=length, plan=plan)
    data = evaluation_set(loaded, dataset, data_dir=data_dir, limit=limit, stride=stride)
    batch_size = batch_size or default_batch(loaded)
    subject = evaluate.Subject(model, checkpoint, loaded.answer, device.resolve(), dtype.value)
    variants = evaluate.evaluate(subject, data, batch_size=batch_size, progress=progress_bars(quiet))
    sites = plan.sites if plan else evaluate.exact_sites(loaded)
    for name, figures in variants.items():
        figures["attention_memory_bytes"] = evaluate.attention_memory_bytes(sites, name, subject)
    result = {
        "model": plan.model if plan else loaded.name,
        "dataset": data.name,
        "samples": len(data),
        "batch_size": batch_size,
        "seed": plan.seed if plan else seed,
        "device": evaluate.device_name(subject.device),
        "dtype": dtype.value,
        "versions": versions(),
        "variants": variants,
    }
    if isinstance(loaded.preprocessing, TextPreprocessing):
        result["length"] = loaded.preprocessing.tokens
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
    loaded = open_model(str(directory), plan=plan)
    source = "demo" if plan.data.get("source") == "demo" else None
    inputs = next(batches(calibration_set(loaded, source, 3, seed), 3))[0]
    target = output or export.default_path(directory, form)
    with err.status(f"exporting to {form.value}") if not quiet else nullcontext():
        difference = export.export(directory, form, target, inputs)
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
