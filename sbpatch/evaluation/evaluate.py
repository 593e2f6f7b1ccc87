"""Accuracy or perplexity, agreement, time and peak memory of a model as it is (eager and SDPA) and patched, side by side.

Of a fine-tuned directory, eager and SDPA run the base model, patched the base's weights with the patch, as it was before
fine-tuning, and finetuned the tuned weights with the patch.

Each variant lives in a process of its own, so that memory is its own; all processes are alive at once and take each batch in
turn, so that a machine that slows down slows all of them and the ratios hold.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from .. import processes
from ..data.batch import Inputs, count
from ..data.images import ImageSet
from ..data.loading import batches, worker_count
from ..data.samples import Part, Samples
from ..errors import SbpatchError
from ..models.answers import Kept, Scores
from ..models.checkpoint import Checkpoint
from ..progress import Progress, no_progress
from .variants import VARIANTS, Subject
from .workers import Workers, packed

EAGER_BATCHES = 3  # that the slow eager variant runs, for its time and memory; its answers are SDPA's but for rounding
EAGER_MS = 30_000.0  # after which it runs no further batch
FIRST_TOKEN_BATCHES = 3  # that a causal model runs once more, for the logits of the last position alone


@dataclass
class Batch:
    """What one variant showed on one batch."""

    number: int
    variant: str
    samples: int
    ms: float
    scores: Scores
    first_ms: float | None = None  # to the first token after the batch
    peak_memory: int = 0

    @classmethod
    def read(cls, values: dict[str, Any]) -> Batch:
        """From what `asdict` made of it."""
        return cls(**{**values, "scores": Scores(**values["scores"])})


@dataclass
class Totals:
    """Sums of one variant over its batches."""

    seen: int = 0
    peak_memory: int = 0
    ms: list[float] = field(default_factory=list)  # one a batch
    first_ms: list[float] = field(default_factory=list)  # to the first token after the batch
    scores: Scores = field(default_factory=Scores)

    def add(self, batch: Batch) -> None:
        self.seen += batch.samples
        self.peak_memory = max(self.peak_memory, batch.peak_memory)
        self.ms.append(batch.ms)
        self.first_ms += [] if batch.first_ms is None else [batch.first_ms]
        self.scores.take(batch.scores)

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


@dataclass(frozen=True)
class Shared:
    """The batches of a data set that this process runs: their numbers, and their samples."""

    numbers: Sequence[int]
    samples: Samples

    @classmethod
    def of(cls, data: Samples, batch_size: int) -> Shared:
        """Whole batches, as one process would cut them, so that a last short one is counted once."""
        numbers = processes.share(range(-(-len(data) // batch_size)))
        if processes.count() == 1:
            return cls(numbers, data)
        if isinstance(data, ImageSet) and not isinstance(data.items, Sequence):
            raise SbpatchError(f"{data.name} is a stream, which one process reads: run eval without a launcher")
        index = range(len(data))
        return cls(numbers, Part(data, [i for n in numbers for i in index[n * batch_size : (n + 1) * batch_size]]))


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
    `EAGER_BATCHES` batches at most, and where there are more it has no figures of quality. Of several processes each runs its
    share of the batches, and all return the figures of all. A variant's process loads the model itself, so this must be called
    under `if __name__ == "__main__":` in a script. `skipped` takes a line for each sample that cannot be read; None: the first
    is an error.

    Raises:
        SbpatchError: a sample or the model cannot be read, or the model gives no finite values.
    """
    if not len(data):
        raise SbpatchError(f"no samples in '{data.name}' to evaluate on")
    there = subject.variants  # reads the plan
    variants = [name for name in variants if name in there]
    if skipped is not None and processes.count() > 1:
        raise SbpatchError("--skip-bad counts what one process skips: run it without a launcher")
    mine = Shared.of(data, batch_size)
    workers = Workers()
    read = batches(
        mine.samples, batch_size, workers=worker_count(data), beside=subject.device != "cpu", skipped=skipped
    )
    try:
        if mine.numbers:
            workers.start(subject, variants)
        seen = _run(workers, subject, progress(mine.numbers, "evaluating"), read)
        workers.finish()
    finally:
        read.close()
        workers.end()
    figures = _figures(variants, seen, batch_size)
    if not figures:
        raise SbpatchError(f"{data.name}: none of {len(data)} samples can be read, the first: {(skipped or [''])[0]}")
    return figures


def _run(
    workers: Workers, subject: Subject, numbers: Iterable[int], read: Iterator[tuple[Inputs, Tensor]]
) -> list[Batch]:
    """Every variant on the batches of these numbers, each in turn; a variant that is done early is dismissed."""
    seen: list[Batch] = []
    for number, (x, y) in zip(numbers, read, strict=False):  # fewer batches where samples are skipped
        eager_ms = sum(batch.ms for batch in seen if batch.variant == "eager")
        if "eager" in workers.pipes and (number >= EAGER_BATCHES or eager_ms > EAGER_MS):
            workers.dismiss("eager")
        inputs, labels = packed(x), y.numpy()
        found: dict[str, Kept] = {}
        running = list(workers.pipes)
        this: dict[str, Batch] = {}
        for variant in running[number % len(running) :] + running[: number % len(running)]:  # each is first in turn
            peak, first_ms = 0, None
            if number == 0:
                peak = workers.ask(variant, "memory", inputs, labels)
            found[variant], ms = workers.ask(variant, "batch", inputs, labels)
            if subject.answer == "next-token" and number < (1 if variant == "eager" else FIRST_TOKEN_BATCHES):
                first_ms = workers.ask(variant, "first token", inputs, labels)
            this[variant] = Batch(number, variant, count(x), ms, Scores(), first_ms, peak)
        for variant in running:
            this[variant].scores.add(found[variant], found["sdpa"])
        seen += this.values()
    return seen


def _figures(variants: Sequence[str], seen: Sequence[Batch], batch_size: int) -> dict[str, dict[str, float]]:
    """The batches of all processes added up in their order, as one process would have; nothing where there are none."""
    shares = processes.gathered([asdict(batch) for batch in seen])
    whole = sorted((Batch.read(one) for part in shares for one in part), key=lambda batch: batch.number)
    totals = {variant: Totals() for variant in variants}
    for batch in whole:
        totals[batch.variant].add(batch)
    for total in totals.values():
        if total.seen < totals["sdpa"].seen:
            total.scores = Scores()  # of some batches only, not to be compared
    return {variant: total.figures(batch_size) for variant, total in totals.items()} if whole else {}


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
