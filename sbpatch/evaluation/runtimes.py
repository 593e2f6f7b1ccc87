"""The runtimes that a model is exported to: how a file for each is written, and how it is run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batch import Inputs, run

Exported = Callable[[Inputs], Tensor]  # a file, opened in its runtime


class Runtime(NamedTuple):
    """One runtime; `write` takes a model (see `Answer`), sample inputs of at least two samples, and where to."""

    name: str
    write: Callable[[nn.Module, Inputs, Path], None]
    open: Callable[[Path], Exported]


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


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """What torch.export and torch.onnx.export are given: the inputs, and that their first dimension may change."""
    batch = {0: torch.export.Dim("batch")}
    if isinstance(inputs, Tensor):
        return {"args": (inputs.clone(),), "dynamic_shapes": {"images": batch}}
    named = {name: tensor.clone() for name, tensor in inputs.items()}
    return {"args": (), "kwargs": named, "dynamic_shapes": dict.fromkeys(named, batch)}


@torch.no_grad()
def _write_program(model: nn.Module, inputs: Inputs, path: Path) -> None:
    program = torch.export.export(model, **_arguments(inputs))
    whole = BytesIO()  # on a full disk, torch's own writer of files aborts the process
    torch.export.save(program, whole)
    path.write_bytes(whole.getbuffer())


def _open_program(path: Path) -> Exported:
    module = torch.export.load(path).module()
    return lambda x: run(module, x)


@torch.no_grad()
def _write_compiled(model: nn.Module, inputs: Inputs, path: Path) -> None:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no GPU
    program = torch.export.export(model, **_arguments(inputs))
    whole = BytesIO()  # as above
    torch._inductor.aoti_compile_and_package(program, package_path=whole)
    path.write_bytes(whole.getbuffer())


def _open_compiled(path: Path) -> Exported:
    module: Any = torch._inductor.aoti_load_package(str(path))
    return lambda x: run(module, x)


@torch.no_grad()
def _write_onnx(model: nn.Module, inputs: Inputs, path: Path) -> None:
    for chatty in ("torch.onnx", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    names = ["images"] if isinstance(inputs, Tensor) else list(inputs)
    program = torch.onnx.export(
        model, dynamo=True, verbose=False, input_names=names, output_names=["answer"], **_arguments(inputs)
    )
    assert program is not None  # as it is where no file is given
    whole = program.model_proto
    for node in whole.graph.node:  # where in whose Python each came from: as much again as a small model's weights
        del node.metadata_props[:]
    path.write_bytes(whole.SerializeToString())


def _open_onnx(path: Path) -> Exported:
    import onnxruntime  # slow to import, and only this needs it

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def answer(x: Inputs) -> Tensor:
        named = {"images": x} if isinstance(x, Tensor) else x
        return torch.from_numpy(
            np.asarray(session.run(None, {name: tensor.numpy() for name, tensor in named.items()})[0])
        )

    return answer


PROGRAM = Runtime("torch.export", _write_program, _open_program)
COMPILED = Runtime("AOTInductor", _write_compiled, _open_compiled)
ONNX = Runtime("onnxruntime", _write_onnx, _open_onnx)
