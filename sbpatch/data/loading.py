"""Samples in batches, in their order, whether threads of this process read them or worker processes do.

Each worker has a pipe of its own, which breaks if the worker is killed, also in the middle of an answer. Torch's DataLoader
gives its workers one queue, and then waits for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..errors import SbpatchError
from ..interrupts import held_back
from ..processes import count_here
from .batch import Inputs, moved
from .images import ImageSet
from .samples import Part, Samples, pool

AT_A_TIME = 8  # samples that a worker, or this process by its threads, reads
FEW = 64  # images for which workers cost more time than they save
AHEAD = 128 << 20  # bytes of images that are read ahead of a model beside which nothing may run
HELD = 256 << 20  # bytes of a set that is kept where it is gone through several times
MOST_WORKERS = 8
# A fork starts in no time and shares the index of the set with this process.
FORK = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)


def batches(
    samples: Samples,
    batch_size: int,
    *,
    workers: int = 0,
    beside: bool = False,
    skipped: list[str] | None = None,
) -> Generator[tuple[Inputs, Tensor], None, None]:
    """All samples in order: images (B, 3, H, W) float32 with labels (B,) int64, or tokens (see texts.py).

    All batches are full but the last. The same samples come in the same order whatever reads them.

    Args:
        workers: processes that read images; 0: threads of this one, when a batch is asked for.
        beside: let workers read on while a batch is used. Else they read some 128 MB of images and end, so that nothing runs
            beside a timed model.
        skipped: takes a line for each sample that cannot be read, which is left out; None: the first is an error.

    Raises:
        SbpatchError: a sample cannot be read, or a worker has ended.
    """
    found: list[Any] = []
    with closing(_read(samples, workers, beside)) as everything:
        for sample in everything:
            if isinstance(sample, SbpatchError) and skipped is not None:
                skipped.append(str(sample))
                continue
            if isinstance(sample, Exception):
                raise sample
            found.append(sample)
            if len(found) == batch_size:
                yield _collated(found)
                found = []
    if found:
        yield _collated(found)


def worker_count(samples: Samples) -> int:
    """Worker processes that are worth starting for a set: none for texts, whose tokens are there, nor for few images."""
    if images_of(samples) is None or len(samples) <= FEW:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // count_here()))


def images_of(samples: Samples) -> ImageSet | None:
    """The images that a set, or the set that it is a part of, has; None: it is text."""
    while isinstance(samples, Part):
        samples = samples.whole
    return samples if isinstance(samples, ImageSet) else None


@dataclass
class Again:
    """The batches of a set on a device, as often as they are asked for: a small set is held, any other read each time.

    `skipped` as for `batches`; `count` is how many samples could be read, once all were.
    """

    samples: Samples
    batch_size: int
    device: str
    dtype: torch.dtype
    skipped: list[str] | None = None
    count: int = 0
    _held: list[tuple[Inputs, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        images, found, count = images_of(self.samples), list[tuple[Inputs, Tensor]](), 0
        hold = images is not None and len(self.samples) * images.sample_bytes <= HELD
        skipped = [] if self.count and self.skipped is not None else self.skipped  # they are named once
        beside, workers = self.device != "cpu", worker_count(self.samples)
        read = batches(self.samples, self.batch_size, workers=workers, beside=beside, skipped=skipped)
        with closing(read):
            for x, y in self._held or read:
                count += len(y)
                if hold:
                    found.append((x, y))
                yield moved(x, self.device, self.dtype), y
        self.count, self._held = count, found or None


def _collated(samples: list[Any]) -> tuple[Inputs, Tensor]:
    inputs, labels = default_collate(samples)
    return inputs, labels


class _Reader:
    """Samples by key, or the exception that one ends in; images as arrays, since tensors would travel by shared memory."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __call__(self, key: Any) -> Any:
        try:
            inputs, labels = self.samples[key]
        except Exception as error:  # the one who waits for it has to know
            return error
        return (inputs.numpy() if isinstance(inputs, Tensor) else inputs), labels


def _read(samples: Samples, workers: int, beside: bool) -> Generator[Any, None, None]:
    reader = _Reader(samples)
    images = images_of(samples)
    keys = samples.keys() if isinstance(samples, ImageSet) else range(len(samples))
    if images is None or not workers:
        with pool() as threads:
            for some in _parts(keys, AT_A_TIME):
                yield from list(threads.map(reader, some))
    elif beside:
        yield from _by_workers(reader, keys, workers)
    else:
        for some in _parts(keys, max(AT_A_TIME * workers, AHEAD // images.sample_bytes)):
            yield from list(_by_workers(reader, some, workers))


def _parts(keys: Iterable[Any], size: int) -> Iterator[list[Any]]:
    left = iter(keys)
    while some := list(islice(left, size)):
        yield some


# -- workers ----------------------------------------------------------------------------------------------------------


def _by_workers(reader: _Reader, keys: Iterable[Any], workers: int) -> Iterator[Any]:
    """As the reader gives them, in order. A worker is asked for no more before its answer is taken, so that none waits."""
    pipes: list[Connection] = []
    processes: list[Any] = []
    try:
        with held_back():
            _start(reader, workers, pipes, processes)
        asked: deque[Connection] = deque()
        for pipe, some in zip(cycle(pipes), _parts(keys, AT_A_TIME), strict=False):
            answer = _answer(asked.popleft()) if len(asked) == workers else []
            _ask(pipe, some)
            asked.append(pipe)
            yield from answer
        for pipe in asked:
            yield from _answer(pipe)
    finally:
        for process in processes:
            process.kill()
        for process, pipe in zip(processes, pipes, strict=True):
            process.join()
            pipe.close()


def _start(reader: _Reader, workers: int, pipes: list[Connection], processes: list[Any]) -> None:
    """Fill the lists. A signal must not strike a worker that still has this process's handlers: SIGTERM waits for its own."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        for _ in range(workers):
            ours, theirs = FORK.Pipe()
            process = FORK.Process(target=_work, args=(theirs, (*pipes, ours), reader), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _work(pipe: Connection, others: Sequence[Connection], reader: _Reader) -> None:
    """Answer keys with samples until the pipe breaks: the other process has closed it, or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for the command, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for other in others:  # a fork has them too, and a pipe breaks when its last copy is closed
        other.close()
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):
        while True:
            pipe.send([reader(key) for key in pipe.recv()])


def _ask(pipe: Connection, keys: list[Any]) -> None:
    with suppress(ConnectionError):  # the answer will say so
        pipe.send(keys)


def _answer(pipe: Connection) -> list[Any]:
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        raise SbpatchError(
            "a process that reads images has ended early: the system may have taken it for its memory; try again"
        ) from None
