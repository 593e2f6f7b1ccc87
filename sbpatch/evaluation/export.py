"""Export a patched model, run what was exported in its own runtime, and compare."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from ..data.batch import Inputs, count, run, samples
from ..errors import SbpatchError, one_line
from ..plan import artifact
from ..plan.patch import load
from ..writing import check_target, written_whole


class Format(StrEnum):
    pt2 = "pt2"
    onnx = "onnx"
    safetensors = "safetensors"

    @property
    def runtime(self) -> str:
        """What the exported file is run in for the comparison."""
        return {"pt2": "torch.export", "onnx": "onnxruntime", "safetensors": "sbpatch.load"}[self.value]


TOLERANCE = 1e-3  # of the largest absolute answer; above it the file is refused
# What the exporters and the runtimes raise for a model that they cannot take.
EXPORT_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError)


def default_path(directory: Path, form: Format) -> Path:
    """Beside the directory: `DIR.pt2`, `DIR.onnx`, or `DIR-export`."""
    path = directory.absolute()
    return path.with_name(path.name + {Format.pt2: ".pt2", Format.onnx: ".onnx", Format.safetensors: "-export"}[form])


class Answer(nn.Module):
    """A model as it is exported: images, or a text's tokens by name, in; its answer alone out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor | None = None, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        if images is not None:
            return run(self.model, images)
        named = {"input_ids": input_ids, "attention_mask": attention_mask}
        return run(self.model, {name: tensor for name, tensor in named.items() if tensor is not None})


@torch.inference_mode()
def export(directory: Path, form: Format, target: Path, inputs: Inputs) -> float:
    """Write the patched model of `directory` to `target` and run it there; returns the largest absolute difference.

    Args:
        inputs: what to compare on, images (B, 3, H, W) or named tensors of B samples, B at least 2. The exported file takes
            any number of them, of this size or length alone.

    Raises:
        SbpatchError: the model cannot be exported, or the exported one gives other answers; `target` is not written then.
    """
    if form is Format.safetensors:
        model = load(directory)
        artifact.copy(directory, target)
        return _difference(run(load(target), inputs), run(model, inputs))
    check_target(target)
    if count(inputs) < 2:
        raise SbpatchError("an export needs at least two samples, or the exported file would take one alone")
    model = Answer(load(directory)).eval()
    expected = run(model, inputs)
    with written_whole(target) as fresh, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own deprecations
        path = fresh.with_suffix(target.suffix)
        try:
            exported = (_pt2 if form is Format.pt2 else _onnx)(model, inputs, path)
            found = [exported(inputs), exported(samples(inputs, 0, 1))]
        except EXPORT_ERRORS as error:
            raise SbpatchError(
                f"{directory} cannot be exported to {form.value}, not written: {_reason(error)}"
            ) from None
        difference = max(_difference(x, y) for x, y in zip(found, (expected, expected[:1]), strict=True))
        if not difference <= TOLERANCE * float(expected.abs().max()):
            raise SbpatchError(f"the exported {form.value} differs from the model by {difference:.2e}: not written")
        path.rename(fresh)
    return difference


def _reason(error: BaseException) -> str:
    """What the exporter stumbled over: the first cause, under its own advice on how to go on."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {one_line(error)}"


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """What torch.export and torch.onnx.export are given: the inputs, and that their first dimension may change."""
    batch = {0: torch.export.Dim("batch")}
    if isinstance(inputs, Tensor):
        return {"args": (inputs.clone(),), "dynamic_shapes": {"images": batch}}
    named = {name: tensor.clone() for name, tensor in inputs.items()}
    return {"args": (), "kwargs": named, "dynamic_shapes": dict.fromkeys(named, batch)}


def _pt2(model: nn.Module, inputs: Inputs, path: Path) -> Callable[[Inputs], Tensor]:
    with torch.no_grad():
        program = torch.export.export(model, **_arguments(inputs))
    whole = BytesIO()  # on a full disk, torch's own writer of files aborts the process
    torch.export.save(program, whole)
    path.write_bytes(whole.getbuffer())
    module = torch.export.load(path).module()
    return lambda x: run(module, x)


def _onnx(model: nn.Module, inputs: Inputs, path: Path) -> Callable[[Inputs], Tensor]:
    for chatty in ("torch.onnx", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    names = ["images"] if isinstance(inputs, Tensor) else list(inputs)
    with torch.no_grad():
        torch.onnx.export(
            model, f=path, dynamo=True, verbose=False, external_data=False, input_names=names, output_names=["answer"],
            **_arguments(inputs),
        )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def answer(x: Inputs) -> Tensor:
        named = {"images": x} if isinstance(x, Tensor) else x
        return torch.from_numpy(
            np.asarray(session.run(None, {name: tensor.numpy() for name, tensor in named.items()})[0])
        )

    return answer


def size_bytes(path: Path) -> int:
    """Of a file, or of the files of a directory."""
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())
