"""`sbpatch export`: a patched directory as a file for another runtime."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.loading import batches
from ..errors import SbpatchError
from ..evaluation import export
from ..plan.patch import read_plan
from ..plan.plan import versions
from ..writing import json_text
from .flags import Dtype, DtypeFlag, JsonFile, Length, Quiet, Seed
from .inputs import calibration_set, open_model
from .results import check_places, err, out, write_json


def export_command(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="what calibrate wrote")] = Path("sbpatch-out"),
    form: Annotated[export.Format, typer.Option("--format")] = export.Format.pt2,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="file or directory to write; default: beside DIR")
    ] = None,
    length: Length = None,
    dtype: DtypeFlag = Dtype.float32,
    compiled: Annotated[
        bool, typer.Option("--compile", help="for pt2: compile for this kind of CPU by AOTInductor; takes minutes")
    ] = False,
    beside: Annotated[
        bool, typer.Option("--beside-exact", help="also export the exact model, and compare size and time")
    ] = False,
    seed: Seed = 0,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    target = output or export.default_path(directory, form)
    whole = form is export.Format.safetensors
    _check(form, dtype, compiled, beside, length)
    check_places(json_file, None if whole else target, inputs=(directory,), directory=target if whole else None)
    plan = read_plan(directory)
    loaded = open_model(str(directory), length=length, plan=plan)
    source = "demo" if plan.data.get("source") == "demo" else None
    inputs = next(batches(calibration_set(loaded, source, 3, seed), 3))[0]
    result: dict[str, Any] = {"path": str(target), "format": form.value, "dtype": dtype.value}
    result["runtime"] = "sbpatch.load" if whole else export.runtime(form, compiled).name
    with err.status(f"exporting to {form.value}") if not quiet else nullcontext():
        how: dict[str, Any] = {"dtype": dtype.value, "compiled": compiled}
        result["difference"] = export.export(directory, form, target, inputs, **how)
        result["size_bytes"] = export.size_bytes(target)
        if beside:
            result["variants"] = export.beside_exact(directory, form, target, inputs, **how)
    if not quiet:
        out.print(
            f"written to {target} ({result['size_bytes'] / 1e6:.1f} MB), run in {result['runtime']}, largest difference of the "
            f"answers {result['difference']:.2e}"
        )
        for name, figures in result.get("variants", {}).items():
            out.print(f"{name}: {figures['size_bytes'] / 1e6:.1f} MB, {figures['latency_ms']:.1f} ms for 3 samples")
    write_json(json_file, json_text(result | {"versions": versions()}))


def _check(form: export.Format, dtype: Dtype, compiled: bool, beside: bool, length: int | None) -> None:
    """Refuse flags that a format does not have."""
    if dtype.value not in export.TOLERANCE:
        raise SbpatchError(f"--dtype {dtype.value} is not exported: give {' or '.join(export.TOLERANCE)}")
    if form is not export.Format.safetensors:
        export.runtime(form, compiled)
    elif dtype is not Dtype.float32 or compiled or beside or length is not None:
        raise SbpatchError(
            "--format safetensors is a copy of the directory: --dtype, --length, --compile and "
            "--beside-exact are for pt2 and onnx"
        )
