"""`sbpatch eval`: a model as it is and patched, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import bounds, processes
from ..data.preprocessing import TextPreprocessing
from ..data.retrieval import NAMES as RETRIEVAL
from ..errors import SbpatchError
from ..evaluation import Subject, accounting, evaluate
from ..measure import device_name
from ..plan import hub, report
from ..plan.patch import read_plan
from ..plan.plan import versions
from ..writing import json_text
from .decoding import check_generate, decoding_figures
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
    Quiet,
    Seed,
    SkipBad,
    integer,
    lengths_of,
    progress_bars,
)
from .inputs import default_batch, evaluation_set, open_model
from .results import check_places, out, with_skipped, write_json
from .retrieval import retrieval_figures


def eval_command(
    dataset: Dataset,
    model: Annotated[
        str, typer.Argument(metavar="[DIR|MODEL]", help="what calibrate wrote, or any MODEL")
    ] = "sbpatch-out",
    data_dir: DataDir = None,
    limit: Annotated[
        int | None,
        integer("--limit", most=bounds.SAMPLES, help="use only this many samples, spread evenly over the set"),
    ] = None,
    length: Length = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="for passkey and needle: context lengths in tokens, comma-separated")
    ] = None,
    stride: Annotated[
        int | None, integer("--stride", most=bounds.TOKENS, help="tokens scored in each window; default: all of them")
    ] = None,
    batch_size: Annotated[
        int | None,
        integer("--batch-size", most=bounds.BATCH, help="samples per batch; default: 8, for causal models 1"),
    ] = None,
    skip_bad: SkipBad = False,
    generate: Annotated[
        int,
        integer(
            "--generate", least=0, most=bounds.TOKENS, help="for text: also decode this many tokens after a prompt"
        ),
    ] = 0,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="for passkey and needle: plot of accuracy by depth and length, as a PNG"),
    ] = None,
    checkpoint: CheckpointFile = None,
    device: DeviceFlag = Device.auto,
    dtype: DtypeFlag = Dtype.float32,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    if length is not None and lengths is not None:
        raise typer.BadParameter("give one length or several, not both", param_hint="--length / --lengths")
    _refuse_flags(dataset, {"--lengths": lengths, "--plot": plot}, {"--generate": generate, "--stride": stride})
    check_places(json_file, plot, inputs=(model, dataset, data_dir, checkpoint))
    several = None if lengths is None else lengths_of(lengths)
    folder = Path(model) if model == "sbpatch-out" else hub.patched(model)
    model, plan = (model, None) if folder is None else (str(folder), read_plan(folder))
    loaded = open_model(model, checkpoint, length=length, plan=plan)
    subject = Subject(model, checkpoint, loaded.answer, device.resolve(), dtype.value)
    if dataset in RETRIEVAL:
        if processes.count() > 1:
            raise SbpatchError(f"--dataset {dataset} runs in one process: start it without the launcher")
        found = retrieval_figures(subject, loaded, plan, dataset, data_dir, several, limit, seed, plot, quiet)
        write_json(json_file, json_text(found))
        return
    if generate:
        if processes.count() > 1:
            raise SbpatchError("--generate runs in one process: start it without the launcher")
        check_generate(loaded, generate)
    skipped: list[str] | None = [] if skip_bad else None
    data = evaluation_set(loaded, dataset, data_dir=data_dir, limit=limit, stride=stride, skipped=skipped)
    texts_skipped = len(skipped or [])  # are no samples of the set
    batch_size = batch_size or default_batch(loaded)
    sites = plan.sites if plan else accounting.exact_sites(loaded)
    tokens = loaded.preprocessing.tokens if isinstance(loaded.preprocessing, TextPreprocessing) else None
    if tokens is not None:  # a causal plan may be run at another length
        sites = accounting.at_length(sites, tokens)
    variants = evaluate.evaluate(
        subject, data, batch_size=batch_size, progress=progress_bars(quiet),
        variants=accounting.affordable(sites, tokens, batch_size, dtype.value), skipped=skipped,
    )  # fmt: skip
    for name, figures in variants.items():
        figures["attention_memory_bytes"] = accounting.attention_memory_bytes(sites, name, subject)
    result = {
        "model": plan.model if plan else loaded.name,
        "dataset": data.name,
        "samples": len(data) - len(skipped or []) + texts_skipped,
        "batch_size": batch_size,
        "seed": plan.seed if plan else seed,
        "device": device_name(subject.device),
        "dtype": dtype.value,
        "versions": versions(),
        "variants": variants,
    }
    if processes.count() > 1:
        result["processes"] = processes.count()
    if tokens is not None:
        result["length"] = tokens
    if plan and plan.input_size and tokens not in (None, *plan.input_size):
        result["calibrated_length"] = plan.input_size[0]
    if generate:
        decoding_figures(subject, loaded, data, generate, result, quiet)
    if not quiet:
        out.print(report.eval_table(result))
    write_json(json_file, json_text(with_skipped(result, skipped, quiet)))


def _refuse_flags(dataset: str, of_tasks: dict[str, object], of_text: dict[str, object]) -> None:
    """Refuse flags that are for the retrieval tasks with another data set, and the other way round."""
    wrong, kind = (of_text, "text") if dataset in RETRIEVAL else (of_tasks, " and ".join(RETRIEVAL))
    if given := [flag for flag, value in wrong.items() if value]:
        raise SbpatchError(f"{', '.join(given)} with --dataset {dataset}: for {kind} alone, leave it out")
