"""Accuracy, agreement, time and peak memory of a model as it is (eager and SDPA) and patched, side by side.

Each variant lives in a process of its own, so that memory is its own; all processes are alive at once and take each batch in
turn, so that a machine that slows down slows all of them and the ratios hold.
"""

from __future__ import annotations

import multiprocessing
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .calibrate import Progress, no_progress
from .data import ImageSet, batches
from .errors import SbpatchError
from .measure import elapsed_ms, peak_memory_bytes
from .models import Checkpoint, load_checkpoint
from .patch import patch, read_plan
from .plan import PLAN_FILE, SitePlan
from .sites import Call, find_sites, swap

VARIANTS = ("eager", "sdpa", "patched")


@dataclass(frozen=True)
class Subject:
    """What a worker process loads: a directory that calibrate wrote, or any MODEL; and how it runs it."""

    model: str
    checkpoint: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None

    @property
    def patched(self) -> bool:
        return (Path(self.model) / PLAN_FILE).is_file()


@dataclass
class Totals:
    """Running sums of one variant over the samples seen."""

    top1: int = 0
    top5: int = 0
    agree: int = 0
    labelled: int = 0
    seen: int = 0
    peak_memory: int = 0
    ms: list[float] = field(default_factory=list)  # one a batch

    def add(self, logits: np.ndarray, exact: np.ndarray, labels: np.ndarray) -> None:
        order = np.argsort(-logits, axis=1, kind="stable")
        known = labels >= 0
        self.top1 += int((order[:, 0] == labels)[known].sum())
        self.top5 += int((order[:, :5] == labels[:, None]).any(1)[known].sum())
        self.agree += int((order[:, 0] == exact.argmax(1)).sum())
        self.labelled += int(known.sum())
        self.seen += len(labels)

    def figures(self, batch_size: int) -> dict[str, float]:
        full = self.ms[: self.seen // batch_size] or self.ms  # the last batch may be short
        figures = {
            "agreement": 100 * self.agree / self.seen,
            "latency_ms": statistics.median(full),
            "samples_per_second": 1e3 * min(batch_size, self.seen) / statistics.median(full),
            "peak_memory_bytes": self.peak_memory,
        }
        if self.labelled:
            figures = {"top1": 100 * self.top1 / self.labelled, "top5": 100 * self.top5 / self.labelled} | figures
        return figures


def eager_attention(call: Call) -> Tensor:
    """softmax(Q K^T scale + mask) V with the matrix held in memory, as attention was written before fused kernels."""
    logits = call.query @ call.key.mT * call.softmax_scale
    if call.is_causal:
        keep = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~keep, -torch.inf)
    if call.attn_mask is not None:
        mask = call.attn_mask
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1) @ call.value


def build(subject: Subject, variant: str, example: Tensor) -> nn.Module:
    """The model in one of `VARIANTS`, on its device and in its dtype."""
    model = load_checkpoint(subject.model, subject.checkpoint).model
    if variant == "patched":
        patch(model, read_plan(Path(subject.model)))
    model = model.to(subject.device, getattr(torch, subject.dtype))
    if variant == "eager":
        found = find_sites(model, example.to(subject.device, getattr(torch, subject.dtype)))
        swap(model, {site.name: eager_attention for site in found})
    return model


def _worker(pipe: Connection, subject: Subject, variant: str) -> None:
    """Answer ('batch' | 'memory', images) with (logits, milliseconds) or peak bytes, until None comes."""
    if subject.threads:
        torch.set_num_threads(subject.threads)
    device = torch.device(subject.device)
    model: nn.Module | None = None
    try:
        with torch.inference_mode():
            while (request := pipe.recv()) is not None:
                task, images = request
                x = torch.from_numpy(images).to(device, getattr(torch, subject.dtype))
                if model is None:
                    model = build(subject, variant, x[:1])
                    model(x[:1])  # lazy initialisation is no part of any figure
                run = partial(model, x)
                if task == "memory":
                    pipe.send(peak_memory_bytes(run, device))
                else:
                    logits, ms = elapsed_ms(run, device)
                    pipe.send((logits.float().cpu().numpy(), ms))
    except SbpatchError as error:
        pipe.send(error)


def _receive(pipe: Connection, variant: str) -> Any:
    try:
        answer = pipe.recv()
    except EOFError as error:
        raise SbpatchError(f"the process of variant '{variant}' ended early; its message stands above") from error
    if isinstance(answer, SbpatchError):
        raise answer
    return answer


def evaluate(
    subject: Subject,
    images: ImageSet,
    *,
    batch_size: int = 8,
    progress: Progress[Any] = no_progress,
) -> dict[str, dict[str, float]]:
    """Run every variant over `images`: {variant: {top1, top5, agreement, latency_ms, ...}} with the contract's keys.

    Time is the median over batches of `batch_size`; memory is the peak of one such batch. A variant's process loads the
    model itself, so this must be called under `if __name__ == "__main__":` in a script.

    Raises:
        SbpatchError: an image or the model cannot be read.
    """
    if not len(images):
        raise SbpatchError(f"no images in '{images.name}' to evaluate on")
    variants = VARIANTS if subject.patched else VARIANTS[:2]
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for variant in variants:
        pipes[variant], theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs, subject, variant), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
    totals = {variant: Totals() for variant in variants}
    try:
        count = -(-len(images) // batch_size)
        for number, (x, y) in zip(progress(range(count), "evaluating"), batches(images, batch_size), strict=True):
            pixels, labels = x.numpy(), y.numpy()
            logits: dict[str, np.ndarray] = {}
            order = [variants[(number + i) % len(variants)] for i in range(len(variants))]  # nobody always goes first
            for variant in order:
                if number == 0:
                    pipes[variant].send(("memory", pixels))
                    totals[variant].peak_memory = _receive(pipes[variant], variant)
                pipes[variant].send(("batch", pixels))
                logits[variant], ms = _receive(pipes[variant], variant)
                totals[variant].ms.append(ms)
            for variant in variants:
                totals[variant].add(logits[variant], logits["sdpa"], labels)
        for pipe in pipes.values():
            pipe.send(None)
    finally:
        for process in processes:
            process.join(timeout=1)
            process.terminate()
    return {variant: totals[variant].figures(batch_size) for variant in variants}


def check_classes(checkpoint: Checkpoint, images: ImageSet) -> None:
    """Refuse labels that count over other classes than the model's, whose top-1 would be a number without meaning.

    Raises:
        SbpatchError: the numbers of classes differ.
    """
    classes = checkpoint.config.get("classes", checkpoint.config.get("num_classes"))
    if images.classes is not None and classes is not None and images.classes != classes:
        raise SbpatchError(
            f"{images.name} has {images.classes} classes and {checkpoint.name} {classes}: their labels cannot be compared "
            "(folders of ImageNet classes: --dataset imagenet-val --data-dir FOLDER)"
        )


# -- what the attention stores --------------------------------------------------------------------------------------


def exact_sites(checkpoint: Checkpoint) -> list[SitePlan]:
    """The sites of an unpatched model."""
    probe = torch.zeros(1, *checkpoint.preprocessing.input_size)
    return [SitePlan.of(site, "exact", "not patched") for site in find_sites(checkpoint.model, probe)]


def attention_memory_bytes(sites: Sequence[SitePlan], variant: str, subject: Subject) -> int:
    """Bytes that the attention of all sites stores for one sample, by the budget's accounting.

    Eager attention stores every entry; SDPA one number a row (its running sum), the patched sites what their budget says.
    In the patched model the exact sites run through SDPA.
    """
    size = torch.empty(0, dtype=getattr(torch, subject.dtype)).element_size()
    entries = 0.0
    for site in sites:
        if variant == "eager":
            entries += site.entries
        elif variant == "patched" and site.decision == "patch":
            entries += site.stored
        else:
            entries += site.heads * site.tokens
    return round(entries * size)


def device_name(device: str) -> str:
    """A device as figures state it: the GPU's name, or the CPU with its threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
