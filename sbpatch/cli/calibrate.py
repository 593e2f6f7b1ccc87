"""`sbpatch calibrate`: a model, a sample and a budget -> a patched directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import bounds, processes
from ..calibration.costs import CostTable, default_path
from ..calibration.journal import Journal
from ..calibration.stages import calibrate
from ..errors import printable
from ..plan import artifact, report
from ..plan.plan import versions
from ..plan.recipe import Allocation, Objective, read_recipe
from ..writing import beside, json_text
from .flags import (
    CheckpointFile,
    DataDir,
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
    SkipBad,
    Source,
    integer,
    number,
    progress_bars,
)
from .inputs import calibration_set, input_batches, open_model, size_of
from .results import check_places, err, out, with_skipped, write_json


def calibrate_command(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="directory to write")] = Path("sbpatch-out"),
    checkpoint: CheckpointFile = None,
    source: Source = None,
    data_dir: DataDir = None,
    samples: Annotated[int, integer("--samples", most=bounds.SAMPLES, help="samples to run the model on")] = 32,
    budget: Annotated[
        float | None,
        number(
            "--budget",
            most=1e9,
            help="entries stored / entries of exact attention, averaged over the sites that may be patched",
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        number(
            "--max-drop",
            least=-1e9,
            most=1e9,
            help="instead of a budget: the largest loss allowed, in points of top-1 or percent of perplexity",
        ),
    ] = None,
    objective: Annotated[
        Objective | None, typer.Option("--objective", help="what the budget limits: stored entries (memory) or time")
    ] = None,
    allocation: Annotated[
        Allocation | None,
        typer.Option(
            "--allocation", help="how the budget is divided among heads: joint, or a simpler rule for comparison"
        ),
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="auto, or a method such as window2d+clusters")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="YAML file with settings; flags override it")] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="patch only sites whose name matches this pattern; repeatable")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", help="leave sites whose name matches this pattern exact; repeatable"),
    ] = None,
    keep_slow: Annotated[
        bool,
        typer.Option(
            "--keep-slow", help="also patch where exact attention is faster, to save the memory of eager attention"
        ),
    ] = False,
    cost_table: Annotated[
        Path | None,
        typer.Option(
            "--cost-table",
            help="file of measured times on this device; missing ones are measured and added; default: in the user's cache",
        ),
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="tune the patch further to match each site's output; takes minutes")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan, write nothing")] = False,
    skip_bad: SkipBad = False,
    input_size: InputSize = None,
    length: Length = None,
    device: DeviceFlag = Device.auto,
    dtype: DtypeFlag = Dtype.float32,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    if budget is not None and max_drop is not None:
        raise typer.BadParameter("give a budget or a largest drop, not both", param_hint="--budget / --max-drop")
    settings = read_recipe(recipe)
    if not dry_run:
        artifact.check_output(output)
    read = (source or settings.data, data_dir, checkpoint, recipe, cost_table)
    check_places(json_file, inputs=(model, *read), directory=None if dry_run else output)
    loaded = open_model(model, checkpoint, input_size, length)
    skipped: list[str] | None = [] if skip_bad else None
    data = calibration_set(loaded, source or settings.data, samples, seed, data_dir, skipped)
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
        None if dry_run or not processes.is_first() else beside(output, "calibrating"),
        json.dumps([options, settings.model_dump(mode="json")["sites"], *measured_on]),
    )
    journal.found = processes.from_first(lambda: journal.found)
    if journal.note:
        err.print(journal.note, soft_wrap=True)
    with journal.kept_if_cut_off():
        plan = calibrate(
            loaded.model.to(where, kind),
            input_batches(loaded, data, where, kind),
            answer=loaded.answer,
            **options,
            fixed=settings.sites,
            costs=costs,
            refine=refine,
            name=printable(loaded.name),
            journal=journal,
            progress=progress_bars(quiet),
        )
        processes.check_same(plan.to_json(), "plans")
        plan.base_sha256, plan.input_size = loaded.sha256, size_of(loaded)
        plan.data = {"source": printable(data.name), "samples": len(data), "fingerprint": data.fingerprint()}
        plan.device, plan.dtype = where, dtype.value
        if not quiet:
            out.print(report.plan_table(plan))
        if not dry_run and processes.is_first():
            loaded.model.to("cpu", torch.float32)
            artifact.save(output, loaded, plan)
    if not (dry_run or quiet):
        out.print(
            f"written to {output}: plan, weights, model card and report.png; next: sbpatch eval {output} --dataset NAME"
        )
    write_json(json_file, json_text(with_skipped(json.loads(plan.to_json()), skipped, quiet)))
