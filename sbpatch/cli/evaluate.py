"""`sbpatch eval`: a model as it is and patched, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..data.preprocessing import TextPreprocessing
from ..data.retrieval import NAMES as RETRIEVAL
from ..evaluation import evaluate
from ..plan import report
from ..plan.patch import read_plan
from ..plan.plan import PLAN_FILE, versions
from .find_again import find_again
from .flags import (  # fmt: skip
    CheckpointFile,
    DataDir,
    Dataset,
    Device,
    DeviceFlag,
    Dtype,
    DtypeFlag,
    JsonFile,
    Length,
    Quiet,
    Seed,
    default_batch,
    evaluation_set,
    open_model,
    out,
    progress_bars,
    write_json,
)


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
    if dataset in RETRIEVAL:
        result = find_again(loaded, plan, model, dataset, data_dir, limit, seed, device.resolve(), dtype.value, quiet)
        write_json(json_file, json.dumps(result, indent=2) + "\n")
        return
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
