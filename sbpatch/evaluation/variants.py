"""The variants that `eval` compares: how each is built, and the process in which it answers, one batch at a time."""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attention.core import repeated
from ..attention.masks import allowed
from ..data.batch import Inputs, moved, run, samples
from ..errors import SbpatchError, one_line, out_of_memory
from ..measure import elapsed_ms, peak_memory_bytes
from ..models.answers import kept
from ..models.checkpoint import Answer
from ..models.load import load_checkpoint
from ..plan.patch import base_of, patch, read_plan
from ..plan.plan import PLAN_FILE
from ..sites.calls import Call
from ..sites.find import find_sites
from ..sites.swap import swap

VARIANTS = ("eager", "sdpa", "patched", "finetuned")


@dataclass(frozen=True)
class Subject:
    """What a worker process loads: a directory that calibrate wrote, or any MODEL; and how it runs it."""

    model: str
    checkpoint: Path | None = None
    answer: Answer = "classes"
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        """Those of `VARIANTS` that there are."""
        if not (Path(self.model) / PLAN_FILE).is_file():
            return VARIANTS[:2]
        return VARIANTS[:3] if base_of(Path(self.model)) == Path(self.model) else VARIANTS


def eager_attention(call: Call) -> Tensor:
    """softmax(Q K^T scale + mask) V with the matrix held in memory, as attention was written before fused kernels.

    A query that may see no key at all gets zeros, as PyTorch's attention gives it.
    """
    key, value = call.key, call.value
    if call.enable_gqa:
        key, value = (repeated(x, call.query.shape[1]) for x in (key, value))
    logits = call.query @ key.mT * call.softmax_scale
    mask = call.attn_mask
    if call.key_mask is not None:
        mask = allowed(call.key_mask, call.is_causal, *logits.shape[-2:])
    elif call.is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is None:
        return logits.softmax(-1) @ value
    if mask.dtype != torch.bool:
        return (logits + mask).softmax(-1) @ value
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.masked_fill(~mask.any(-1, keepdim=True), 0) @ value


def build(subject: Subject, variant: str, example: Inputs) -> nn.Module:
    """The model in one of `VARIANTS`, on its device and in its dtype."""
    of_base = variant != "finetuned" and subject.variants == VARIANTS
    name = str(base_of(Path(subject.model))) if of_base else subject.model
    model = load_checkpoint(name, subject.checkpoint).model
    if variant in VARIANTS[2:]:
        patch(model, read_plan(Path(subject.model)))
    dtype = getattr(torch, subject.dtype)
    model = model.to(subject.device, dtype)
    if variant == "eager":
        found = find_sites(model, moved(example, subject.device, dtype))
        swap(model, {site.name: eager_attention for site in found if not site.by_hand})
    return model


def as_generation_starts(model: nn.Module, inputs: Inputs) -> Inputs:
    """Inputs that ask a causal language model of transformers for the logits of its last position alone.

    The logits of all positions over a vocabulary, which perplexity needs and generation does not, take more memory than
    eager attention does, and would hide it.
    """
    if isinstance(inputs, Tensor) or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return inputs
    ids = inputs["input_ids"]
    return {**inputs, "logits_to_keep": torch.tensor([ids.shape[-1] - 1], device=ids.device)}


def packed(inputs: Inputs) -> Any:
    """As numpy arrays: tensors would go through shared memory, whose lifetime depends on both processes."""
    return inputs.numpy() if isinstance(inputs, Tensor) else {name: x.numpy() for name, x in inputs.items()}


def unpacked(inputs: Any) -> Inputs:
    if isinstance(inputs, np.ndarray):
        return torch.from_numpy(inputs)
    return {name: torch.from_numpy(x) for name, x in inputs.items()}


def worker(pipe: Connection, subject: Subject, variant: str) -> None:
    """Answer requests (task, inputs, labels) until None comes: 'batch' with (what is kept, milliseconds), 'memory' with peak
    bytes, 'first token' with milliseconds.
    """
    if subject.threads:
        torch.set_num_threads(subject.threads)
    device = torch.device(subject.device)
    model: nn.Module | None = None
    try:
        with torch.inference_mode():
            while (request := pipe.recv()) is not None:
                task, sent, labels = request
                x = moved(unpacked(sent), device, getattr(torch, subject.dtype))
                if model is None:
                    model = build(subject, variant, samples(x, 0, 1))
                    if variant != "eager":  # minutes at 8,192 tokens, and its first run is not timed anyway
                        run(model, samples(x, 0, 1))  # lazy initialisation is no part of any figure
                if task == "memory":
                    pipe.send(peak_memory_bytes(partial(run, model, as_generation_starts(model, x)), device))
                elif task == "first token":
                    pipe.send(elapsed_ms(partial(run, model, as_generation_starts(model, x)), device)[1])
                else:
                    output, ms = elapsed_ms(partial(run, model, x), device)
                    pipe.send((kept(subject.answer, output, x, torch.from_numpy(labels)), ms))
                    del output  # before the next forward: a window's logits are hundreds of megabytes
    except (EOFError, ConnectionError):
        return  # the parent was killed
    except SbpatchError as error:
        pipe.send(error)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        pipe.send(
            SbpatchError(f"variant '{variant}': {one_line(error)}; try a smaller --batch-size or shorter samples")
        )


def send(pipe: Connection, request: Any) -> None:
    with suppress(BrokenPipeError):  # the process has ended: what it had to say is there to be received
        pipe.send(request)


def receive(pipe: Connection, variant: str) -> Any:
    try:
        answer = pipe.recv()
    except EOFError as error:
        raise SbpatchError(
            f"the process of variant '{variant}' ended early: its message stands above, or the system took it for its memory"
        ) from error
    if isinstance(answer, SbpatchError):
        raise answer
    return answer
