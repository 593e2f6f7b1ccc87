"""Accuracy or perplexity, agreement, time and peak memory of a model as it is (eager and SDPA) and patched, side by side.

Of a fine-tuned directory, eager and SDPA run the base model, patched the base's weights with the patch, as it was before
fine-tuning, and finetuned the tuned weights with the patch.

Each variant lives in a process of its own, so that memory is its own; all processes are alive at once and take each batch in
turn, so that a machine that slows down slows all of them and the ratios hold.
"""

from __future__ import annotations

import inspect
import multiprocessing
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attention.core import repeated
from ..attention.masks import allowed
from ..data.batch import Inputs, count, moved, run, samples
from ..data.images import ImageSet
from ..data.loading import batches, worker_count
from ..data.samples import Samples
from ..errors import SbpatchError, one_line, out_of_memory
from ..interrupts import held_back
from ..measure import elapsed_ms, peak_memory_bytes
from ..models.answers import Kept, Scores, kept
from ..models.checkpoint import Answer, Checkpoint
from ..models.load import load_checkpoint
from ..plan.patch import base_of, patch, read_plan
from ..plan.plan import PLAN_FILE
from ..progress import Progress, no_progress
from ..sites.calls import Call
from ..sites.find import find_sites
from ..sites.swap import swap

VARIANTS = ("eager", "sdpa", "patched", "finetuned")
EAGER_BATCHES = 3  # that the slow eager variant runs, for its time and memory; its answers are SDPA's but for rounding
EAGER_MS = 30_000.0  # after which it runs no further batch
FIRST_TOKEN_BATCHES = 3  # that a causal model runs once more, for the logits of the last position alone


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


@dataclass
class Totals:
    """Running sums of one variant over the samples seen."""

    seen: int = 0
    peak_memory: int = 0
    ms: list[float] = field(default_factory=list)  # one a batch
    first_ms: list[float] = field(default_factory=list)  # to the first token after the batch
    scores: Scores = field(default_factory=Scores)

    def figures(self, batch_size: int) -> dict[str, float]:
        full = self.ms[: self.seen // batch_size] or self.ms  # the last batch may be short
        first = {"time_to_first_token_ms": statistics.median(self.first_ms)} if self.first_ms else {}
        return (
            self.scores.figures()
            | first
            | {
                "latency_ms": statistics.median(full),
                "samples_per_second": 1e3 * min(batch_size, self.seen) / statistics.median(full),
                "peak_memory_bytes": self.peak_memory,
            }
        )


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


def _packed(inputs: Inputs) -> Any:
    """As numpy arrays: tensors would go through shared memory, whose lifetime depends on both processes."""
    return inputs.numpy() if isinstance(inputs, Tensor) else {name: x.numpy() for name, x in inputs.items()}


def _unpacked(inputs: Any) -> Inputs:
    if isinstance(inputs, np.ndarray):
        return torch.from_numpy(inputs)
    return {name: torch.from_numpy(x) for name, x in inputs.items()}


def _worker(pipe: Connection, subject: Subject, variant: str) -> None:
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
                task, packed, labels = request
                x = moved(_unpacked(packed), device, getattr(torch, subject.dtype))
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


def _send(pipe: Connection, request: Any) -> None:
    with suppress(BrokenPipeError):  # the process has ended: what it had to say is there to be received
        pipe.send(request)


def _receive(pipe: Connection, variant: str) -> Any:
    try:
        answer = pipe.recv()
    except EOFError as error:
        raise SbpatchError(
            f"the process of variant '{variant}' ended early: its message stands above, or the system took it for its memory"
        ) from error
    if isinstance(answer, SbpatchError):
        raise answer
    return answer


def _start(subject: Subject, variants: Sequence[str], pipes: dict[str, Connection], processes: list[Any]) -> None:
    """A process a variant; each that was started is in the list, whenever a signal comes."""
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # which lets through the signals that are held back below, the first time
    for variant in variants:
        pipes[variant], theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs, subject, variant), daemon=True)
        with held_back():
            process.start()
            processes.append(process)
        theirs.close()


def evaluate(
    subject: Subject,
    data: Samples,
    *,
    batch_size: int = 8,
    variants: Sequence[str] = VARIANTS,
    progress: Progress[Any] = no_progress,
    skipped: list[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Run every variant over `data`: {variant: {agreement, perplexity, latency_ms, ...}} with the keys that apply.

    Time is the median over batches of `batch_size`; memory is the peak of one such batch. Of a causal model also the time to
    the first token after a batch, without the logits of its other positions. Eager attention runs on the first
    `EAGER_BATCHES` batches at most, and where there are more it has no figures of quality. A variant's process loads the model
    itself, so this must be called under `if __name__ == "__main__":` in a script. `skipped` takes a line for each sample that
    cannot be read; None: the first is an error.

    Raises:
        SbpatchError: a sample or the model cannot be read, or the model gives no finite values.
    """
    if not len(data):
        raise SbpatchError(f"no samples in '{data.name}' to evaluate on")
    there = subject.variants  # reads the plan
    variants = [name for name in variants if name in there]
    pipes: dict[str, Connection] = {}
    processes: list[Any] = []
    totals = {variant: Totals() for variant in variants}
    read = batches(data, batch_size, workers=worker_count(data), beside=subject.device != "cpu", skipped=skipped)
    try:
        _start(subject, variants, pipes, processes)
        steps = range(-(-len(data) // batch_size))  # fewer where samples are skipped
        for number, (x, y) in zip(progress(steps, "evaluating"), read, strict=False):
            if "eager" in pipes and (number == EAGER_BATCHES or sum(totals["eager"].ms) > EAGER_MS):
                pipes.pop("eager").send(None)  # its process ends and leaves its memory to the others
                totals["eager"].scores = Scores()  # of some batches only, not to be compared
            inputs, labels = _packed(x), y.numpy()
            found: dict[str, Kept] = {}
            running = list(pipes)
            for variant in running[number % len(running) :] + running[: number % len(running)]:  # nobody always first
                if number == 0:
                    _send(pipes[variant], ("memory", inputs, labels))
                    totals[variant].peak_memory = _receive(pipes[variant], variant)
                _send(pipes[variant], ("batch", inputs, labels))
                found[variant], ms = _receive(pipes[variant], variant)
                totals[variant].ms.append(ms)
                if subject.answer == "next-token" and number < (1 if variant == "eager" else FIRST_TOKEN_BATCHES):
                    pipes[variant].send(("first token", inputs, labels))
                    totals[variant].first_ms.append(_receive(pipes[variant], variant))
            for variant in running:
                totals[variant].seen += count(x)
                totals[variant].scores.add(found[variant], found["sdpa"])
        for pipe in pipes.values():
            pipe.send(None)
        for process in processes:
            process.join(timeout=1)
    finally:
        read.close()
        for process in processes:
            process.kill()  # it holds nothing that is not ours to lose
        for process in processes:
            process.join()
    if not totals["sdpa"].seen:
        raise SbpatchError(f"{data.name}: none of {len(data)} samples can be read, the first: {(skipped or [''])[0]}")
    return {variant: totals[variant].figures(batch_size) for variant in variants}


def check_classes(checkpoint: Checkpoint, images: ImageSet) -> None:
    """Refuse labels that count over other classes than the model's, whose top-1 would be a number without meaning.

    Raises:
        SbpatchError: the numbers of classes differ.
    """
    classes = checkpoint.classes
    if images.classes is not None and classes is not None and images.classes != classes:
        raise SbpatchError(
            f"{images.name} has {images.classes} classes and {checkpoint.name} {classes}: their labels cannot be compared "
            "(folders of ImageNet classes: --dataset imagenet-val --data-dir FOLDER)"
        )
