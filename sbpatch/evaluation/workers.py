"""The processes in which the variants of `eval` answer, one batch at a time, each with a model of its own.

On a CPU under Linux one process imports what a model needs and loads it, and forks one for each variant; they share its weights
in memory. Elsewhere, where a fork would break what is loaded, each imports and loads for itself.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.batch import Inputs, moved, run, samples
from ..errors import SbpatchError, one_line, out_of_memory
from ..interrupts import held_back
from ..measure import elapsed_ms, peak_memory_bytes
from ..models.answers import kept
from .variants import Subject, as_generation_starts, build, load_base

FORKS = sys.platform == "linux"
SECONDS = 2.0  # in which a process that has nothing left to do has ended
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Workers:
    """A process for each variant, from the first question on."""

    def __init__(self) -> None:
        self.pipes: dict[str, Connection] = {}  # of variants that still answer
        self.started: list[Any] = []  # processes, from here; forks are theirs

    def start(self, subject: Subject, variants: Sequence[str]) -> None:
        """Start them; whatever was started is known here, whenever a signal comes."""
        resource_tracker.ensure_running()  # which lets through the signals that are held back below, the first time
        pairs = {variant: multiprocessing.Pipe() for variant in variants}
        self.pipes.update({variant: ours for variant, (ours, _) in pairs.items()})
        theirs = {variant: end for variant, (_, end) in pairs.items()}
        if FORKS and subject.device == "cpu":
            self._start(_forking, subject, theirs)
        else:
            for variant, end in theirs.items():
                self._start(worker, end, subject, variant)
        for end in theirs.values():
            end.close()

    def _start(self, target: Any, *args: Any) -> None:
        process = multiprocessing.get_context("spawn").Process(target=target, args=args, daemon=True)
        with held_back():
            process.start()
            self.started.append(process)

    def ask(self, variant: str, *request: Any) -> Any:
        """The answer of one variant to a request of `worker`.

        Raises:
            SbpatchError: it cannot be had.
        """
        with suppress(BrokenPipeError):  # the process has ended: what it had to say is there to be received
            self.pipes[variant].send(request)
        try:
            answer = self.pipes[variant].recv()
        except EOFError as error:
            raise SbpatchError(
                f"the process of variant '{variant}' ended early: its message stands above, "
                "or the system took it for its memory"
            ) from error
        if isinstance(answer, SbpatchError):
            raise answer
        return answer

    def dismiss(self, variant: str) -> None:
        """Its process ends, and leaves its memory to the others."""
        with suppress(BrokenPipeError):  # it has ended already
            self.pipes.pop(variant).send(None)

    def finish(self) -> None:
        """Let all of them end by themselves: no more is asked."""
        for variant in list(self.pipes):
            self.dismiss(variant)
        for process in self.started:
            process.join(timeout=SECONDS)

    def end(self) -> None:
        """End all of them, whatever they are doing: they hold nothing that is not ours to lose."""
        for process in self.started:
            process.kill()
        for process in self.started:
            process.join()


def _forking(subject: Subject, ends: dict[str, Connection]) -> None:
    """Load the model, fork a process for each variant, and wait for them; they end with this one, and it with the command."""
    _end_with_parent()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has none of the threads that computed before it, and would wait for them
    base: nn.Module | Exception
    try:
        base = load_base(subject)
    except (SbpatchError, RuntimeError) as error:  # each variant's process says it, when it is asked
        base = error
    here = os.getpid()
    for variant, end in ends.items():
        if os.fork() == 0:
            _end_with_parent()
            for other in ends.values():
                if other is not end:
                    other.close()  # or nobody would see that the process at its other side has ended
            if os.getppid() == here:
                torch.set_num_threads(threads)
                _forked(end, subject, variant, base)
            os._exit(0)
    for end in ends.values():
        end.close()
    for _ in ends:
        os.wait()


def _end_with_parent() -> None:
    """From here on the system kills this process when its parent ends, however that comes about."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _forked(end: Connection, subject: Subject, variant: str, base: nn.Module | Exception) -> None:
    """`worker`, which must not return into what the forked process was doing."""
    try:
        worker(end, subject, variant, base)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def worker(pipe: Connection, subject: Subject, variant: str, base: nn.Module | Exception | None = None) -> None:
    """Answer requests (task, inputs, labels) until None comes: 'batch' with (what is kept, milliseconds), 'memory' with peak
    bytes, 'first token' with milliseconds. `base`: the model as `load_base` gives it, or why it does not.
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
                    if isinstance(base, Exception):
                        raise base
                    model = build(subject, variant, samples(x, 0, 1), base)
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


def packed(inputs: Inputs) -> Any:
    """As numpy arrays: tensors would go through shared memory, whose lifetime depends on both processes."""
    return inputs.numpy() if isinstance(inputs, torch.Tensor) else {name: x.numpy() for name, x in inputs.items()}


def unpacked(inputs: Any) -> Inputs:
    if isinstance(inputs, np.ndarray):
        return torch.from_numpy(inputs)
    return {name: torch.from_numpy(x) for name, x in inputs.items()}
