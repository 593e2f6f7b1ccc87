"""`sbpatch export`: a patched directory as a file for another runtime."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ..data.loading import batches
from ..evaluation import export
from ..plan.patch import read_plan
from ..plan.plan import versions
from ..writing import json_text
from .flags import (  # fmt: skip
    JsonFile,
    Quiet,
    Seed,
    calibration_set,
    check_places,
    err,
    open_model,
    out,
    write_json,
)


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
    target = output or export.default_path(directory, form)
    whole = form is export.Format.safetensors
    check_places(json_file, None if whole else target, inputs=(directory,), directory=target if whole else None)
    plan = read_plan(directory)
    loaded = open_model(str(directory), plan=plan)
    source = "demo" if plan.data.get("source") == "demo" else None
    inputs = next(batches(calibration_set(loaded, source, 3, seed), 3))[0]
    with err.status(f"exporting to {form.value}") if not quiet else nullcontext():
        difference = export.export(directory, form, target, inputs)
    if not quiet:
        size = export.size_bytes(target) / 1e6
        out.print(
            f"written to {target} ({size:.1f} MB), run in {form.runtime}, largest difference of the logits {difference:.2e}"
        )
    result = {"path": str(target), "format": form.value, "runtime": form.runtime, "difference": difference}
    write_json(json_file, json_text(result | {"versions": versions()}))
