"""Export a patched model, run what was exported in its own runtime, and compare."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from . import artifact
from .errors import SbpatchError
from .patch import load


class Format(StrEnum):
    pt2 = "pt2"
    onnx = "onnx"
    safetensors = "safetensors"

    @property
    def runtime(self) -> str:
        """What the exported file is run in for the comparison."""
        return {"pt2": "torch.export", "onnx": "onnxruntime", "safetensors": "sbpatch.load"}[self.value]


TOLERANCE = 1e-3  # of the largest absolute logit; above it the file is refused


def default_path(directory: Path, form: Format) -> Path:
    """Beside the directory: `DIR.pt2`, `DIR.onnx`, or `DIR-export`."""
    path = directory.absolute()
    return path.with_name(path.name + {Format.pt2: ".pt2", Format.onnx: ".onnx", Format.safetensors: "-export"}[form])


@torch.inference_mode()
def export(directory: Path, form: Format, target: Path, images: Tensor) -> float:
    """Write the patched model of `directory` to `target` and run it there; returns the largest absolute difference.

    Args:
        images: (B, 3, H, W), the inputs to compare on. The batch is dynamic in the exported file, the image size is not.

    Raises:
        SbpatchError: the model cannot be exported, or the exported one gives other logits; `target` is not written then.
    """
    if form is Format.safetensors:
        model = load(directory)
        artifact.copy(directory, target)
        return _difference(load(target)(images), model(images))
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise SbpatchError(f"cannot write {target}: it is a directory, or its folder does not exist")
    model = load(directory)
    expected = model(images)
    with artifact.written_whole(target) as fresh, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own deprecations
        path = fresh.with_suffix(target.suffix)
        runtime = (_pt2 if form is Format.pt2 else _onnx)(model, images, path)
        difference = max(_difference(runtime(x), y) for x, y in ((images, expected), (images[:1], expected[:1])))
        if difference > TOLERANCE * float(expected.abs().max()):
            raise SbpatchError(f"the exported {form.value} differs from the model by {difference:.2e}: not written")
        path.rename(fresh)
    return difference


def _pt2(model: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    with torch.no_grad():
        program = torch.export.export(model, (images.clone(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _onnx(model: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad():
        torch.onnx.export(
            model, (images.clone(),), path, dynamo=True, verbose=False, external_data=False,
            input_names=["images"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {"images": x.numpy()})[0]))

    return run


def size_bytes(path: Path) -> int:
    """Of a file, or of the files of a directory."""
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())
