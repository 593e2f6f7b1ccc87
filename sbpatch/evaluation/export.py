"""Export a patched model, run what was exported in its own runtime, and compare."""

from __future__ import annotations

import statistics
import warnings
from enum import StrEnum
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..data.batch import Inputs, count, moved, run, samples
from ..errors import SbpatchError, one_line
from ..measure import elapsed_ms
from ..models.load import load_checkpoint
from ..plan import artifact
from ..plan.patch import base_of, load
from ..writing import check_target, written_whole
from .runtimes import COMPILED, ONNX, PROGRAM, Answer, Runtime


class Format(StrEnum):
    pt2 = "pt2"
    onnx = "onnx"
    safetensors = "safetensors"


# Of the largest absolute answer; above it the file is refused. Most differ by a tenth of it: the rest is for a landmark that is
# chosen, or a row that goes over clusters, by the last bit of a sum.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2}
# What the exporters and the runtimes raise for a model that they cannot take.
EXPORT_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError)
RUNS = 7  # of each file, in turns; the median counts


def default_path(directory: Path, form: Format) -> Path:
    """Beside the directory: `DIR.pt2`, `DIR.onnx`, or `DIR-export`."""
    path = directory.absolute()
    return path.with_name(path.name + {Format.pt2: ".pt2", Format.onnx: ".onnx", Format.safetensors: "-export"}[form])


def runtime(form: Format, compiled: bool = False) -> Runtime:
    """What a file of the format is run in.

    Raises:
        SbpatchError: it is a directory, or a format that is not compiled.
    """
    if form is Format.safetensors or (compiled and form is not Format.pt2):
        raise SbpatchError(f"--format {form.value} is not compiled, only pt2 is")
    return ONNX if form is Format.onnx else COMPILED if compiled else PROGRAM


@torch.inference_mode()
def export(
    directory: Path, form: Format, target: Path, inputs: Inputs, *, dtype: str = "float32", compiled: bool = False
) -> float:
    """Write the patched model of `directory` to `target` and run it there; returns the largest absolute difference.

    Args:
        inputs: what to compare on, images (B, 3, H, W) float32 or named tensors of B samples, B at least 2. The exported
            file takes any number of them, of this size or length alone.
        dtype: of weights, activations and images in the file, float32 or float16; the difference is to the float32 model.
        compiled: for pt2, machine code by AOTInductor in place of a program.

    Raises:
        SbpatchError: the model cannot be exported, or the exported one gives other answers; `target` is not written then.
    """
    if form is Format.safetensors:
        model = load(directory)
        artifact.copy(directory, target)
        return _difference(run(load(target), inputs), run(model, inputs))
    used = runtime(form, compiled)
    check_target(target)
    if count(inputs) < 2:
        raise SbpatchError("an export needs at least two samples, or the exported file would take one alone")
    model = load(directory)
    expected = run(model, inputs)
    with written_whole(target) as fresh:
        path = fresh.with_suffix(target.suffix)
        found = _written(used, model, inputs, path, dtype, f"{directory} cannot be exported to {form.value}")
        difference = max(_difference(x, y) for x, y in zip(found, (expected, expected[:1]), strict=True))
        if not difference <= TOLERANCE[dtype] * float(expected.abs().max()):
            raise SbpatchError(f"the exported {form.value} differs from the model by {difference:.2e}: not written")
        path.rename(fresh)
    return difference


def _written(
    used: Runtime, model: nn.Module, inputs: Inputs, path: Path, dtype: str, failed: str
) -> tuple[Tensor, Tensor]:
    """Write a model, cast to `dtype` in place, and run it: its answers to all samples and to the first one alone."""
    cast = moved(inputs, "cpu", getattr(torch, dtype))
    answer = Answer(model.to(getattr(torch, dtype))).eval()
    run(answer, cast)  # what layers make once for a longer text is made before the exporter sees them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own deprecations
        try:
            used.write(answer, cast, path)
            exported = used.open(path)
            return exported(cast).float(), exported(samples(cast, 0, 1)).float()
        except EXPORT_ERRORS as error:
            raise SbpatchError(f"{failed}, not written: {_reason(error)}") from None


@torch.inference_mode()
def beside_exact(
    directory: Path, form: Format, target: Path, inputs: Inputs, *, dtype: str = "float32", compiled: bool = False
) -> dict[str, dict[str, float]]:
    """Size and time of the exported file, and of the exact model exported in the same way: {variant: {size_bytes, latency_ms}}.

    The exact model's file is written to a temporary folder. Time is the median of `RUNS` runs on `inputs`, in turns.

    Raises:
        SbpatchError: the exact model cannot be exported.
    """
    used = runtime(form, compiled)
    exact = load_checkpoint(str(base_of(directory))).model
    cast = moved(inputs, "cpu", getattr(torch, dtype))
    with TemporaryDirectory() as folder:
        path = Path(folder, f"exact{target.suffix}")
        _written(used, exact, inputs, path, dtype, f"the exact model of {directory} cannot be exported to {form.value}")
        files = {"exact": path, "patched": target}
        opened = {name: used.open(file) for name, file in files.items()}
        times: dict[str, list[float]] = {name: [] for name in files}
        for number in range(RUNS + 1):
            for name, exported in opened.items():
                ms = elapsed_ms(partial(exported, cast), torch.device("cpu"))[1]
                times[name] += [ms] if number else []  # what a runtime does at its first run is no part of the time
        return {
            name: {"size_bytes": size_bytes(file), "latency_ms": statistics.median(times[name])}
            for name, file in files.items()
        }


def _reason(error: BaseException) -> str:
    """What the exporter stumbled over: the first cause, under its own advice on how to go on."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {one_line(error)}"


def size_bytes(path: Path) -> int:
    """Of a file, or of the files of a directory."""
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())
