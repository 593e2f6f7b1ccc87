"""The run: steps over the training samples, a validation each epoch, the best state kept."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batch import Inputs, moved, run
from ..data.loading import batches, worker_count
from ..data.samples import Part, Samples
from ..errors import SbpatchError, one_line
from ..models.answers import Scores, kept
from ..models.load import load_checkpoint
from ..plan.patch import base_of, patch, read_plan
from ..progress import Progress, no_progress
from .objective import distilled_loss, labelled_loss
from .settings import Settings
from .state import Progressed, State
from .trainable import Trainable, blocks_of, recomputed, without_cache

if TYPE_CHECKING:
    from accelerate import Accelerator

MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # accelerate's names
LARGEST_GRADIENT = 1.0  # Euclidean length of a step's gradient; longer ones are cut to it
WARM_UP = 0.05  # share of the steps over which the step size rises; from there it falls to 0 as half a cosine


@dataclass
class Result:
    """What a run came to: the tuned model's tensors (`state_dict` of the model, patched or not), and how it went."""

    weights: dict[str, Tensor]
    progress: Progressed
    trained: int  # numbers that were trained
    processes: int
    main: bool  # whether this process is the one that writes
    state: State

    @property
    def losses(self) -> list[float]:
        """Of each step's batch, before the step."""
        return self.progress.losses

    @property
    def best(self) -> dict[str, float]:
        return self.progress.validations[self.progress.best]

    def close(self) -> None:
        """Remove what a run that was cut off would go on with: the result is written."""
        self.state.close()


def finetune(
    directory: Path,
    training: Samples,
    validation: Samples,
    settings: Settings,
    *,
    device: str = "cpu",
    state: Path | None = None,
    resume: bool = False,
    progress: Progress[Any] = no_progress,
) -> Result:
    """Train the weights of a patched directory's model on `training`; the one with the lowest loss on `validation` wins.

    The state before the first step takes part, so that no run makes the model worse on `validation`. The model stays in
    evaluation mode: no dropout, statistics of BatchNorm as they were. Under `accelerate launch` each process computes its
    part of every batch.

    Args:
        directory: what `calibrate -o` or `finetune -o` wrote.
        state: a folder that keeps how far the run is, once a minute; None: none.
        resume: go on from what `state` holds.

    Raises:
        SbpatchError: the directory, the samples or the settings do not fit, or the loss is not finite.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs  # slow to import, and only this needs it

    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=MIXED[settings.dtype],
            gradient_accumulation_steps=settings.accumulate,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:  # a second run in one process, or a device that has no such type
        raise SbpatchError(f"accelerate cannot run in {settings.dtype} here: {one_line(error)}") from None
    with ExitStack() as stack:
        tuning = Tuning(directory, training, validation, settings, accelerator, stack)
        keeper = State(state, tuning.identity(), writes=accelerator.is_main_process)
        return tuning.go(keeper, resume, progress)


class Tuning:
    """A run's model, exact model, optimiser and samples."""

    def __init__(
        self,
        directory: Path,
        training: Samples,
        validation: Samples,
        settings: Settings,
        accelerator: Accelerator,
        stack: ExitStack,
    ) -> None:
        self.settings, self.accelerator, self.training, self.validation = settings, accelerator, training, validation
        self.pieces = settings.pieces(len(training), accelerator.num_processes)
        self.per_epoch = len(training) // settings.batch_size  # the samples left over come in another epoch's order
        self.total = settings.total(self.per_epoch)
        loaded, self.plan = load_checkpoint(str(directory)), read_plan(directory)
        self.answer, self.sha256 = loaded.answer, loaded.sha256
        self.model = patch(loaded.model, self.plan).to(accelerator.device)
        sites = [site.name for site in self.plan.patched]
        self.trainable = Trainable(self.model, sites, settings.train, settings.lora_rank, settings.seed)
        self.exact: nn.Module | None = None
        if settings.distill:
            self.exact = load_checkpoint(str(base_of(directory))).model.to(accelerator.device)
            stack.enter_context(without_cache(self.exact))
        stack.enter_context(without_cache(self.model))
        if settings.checkpointing:
            stack.enter_context(recomputed(self.model, blocks_of(self.model, sites)))
        optimizer = torch.optim.AdamW(self.trainable.parameters().values(), lr=settings.step_size, weight_decay=0.0)
        self.prepared, self.optimizer = accelerator.prepare(self.model, optimizer)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it goes on with."""
        data = {"training": self.training.fingerprint(), "validation": self.validation.fingerprint()}
        return asdict(self.settings) | data | {"weights": self.sha256, "plan": self.plan.to_json()}

    def go(self, state: State, resume: bool, progress: Progress[Any]) -> Result:
        done = self._resumed(state) if resume else Progressed()
        if not resume:
            state.begin()
            self._validate(done, state)
        with closing(self._pieces(done.step)) as pieces:
            for step in progress(range(done.step, self.total), "fine-tuning"):
                done.losses.append(self._step(step, pieces))
                done.step = step + 1
                epoch_ends = done.step % self.per_epoch == 0 or done.step == self.total
                if epoch_ends:
                    self._validate(done, state)
                self._save(done, state, now=epoch_ends)
        self.accelerator.wait_for_everyone()
        self.trainable.take(state.best)
        trained = sum(p.numel() for p in self.trainable.parameters().values())
        self.trainable.merge()
        weights = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        accelerator = self.accelerator
        return Result(weights, done, trained, accelerator.num_processes, accelerator.is_main_process, state)

    def _pieces(self, first: int) -> Generator[tuple[Inputs, Tensor], None, None]:
        """What this process computes of the batches from step `first` on, read ahead by workers, an epoch at a time."""
        size = self.settings.batch_size // self.pieces
        for epoch in range(first // self.per_epoch, -(-self.total // self.per_epoch)):
            order = np.random.default_rng([self.settings.seed, epoch]).permutation(len(self.training))
            steps = range(max(first, epoch * self.per_epoch), min(self.total, (epoch + 1) * self.per_epoch))
            starts = [
                (step % self.per_epoch) * self.settings.batch_size
                + (piece * self.accelerator.num_processes + self.accelerator.process_index) * size
                for step in steps
                for piece in range(self.settings.accumulate)
            ]
            mine = Part(self.training, [i for start in starts for i in order[start : start + size].tolist()])
            yield from batches(mine, size, workers=worker_count(mine), beside=True)

    def _step(self, step: int, pieces: Iterator[tuple[Inputs, Tensor]]) -> float:
        """One update of the weights; the loss of its batch before it, over all processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.step_size * schedule(step, self.total)
        total = torch.zeros((), device=self.accelerator.device)
        for inputs, labels in islice(pieces, self.settings.accumulate):
            with self.accelerator.accumulate(self.prepared):
                loss = self._loss(*self._placed(inputs, labels))[0].mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.trainable.parameters().values(), LARGEST_GRADIENT)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach() / self.settings.accumulate
        mean = float(self.accelerator.reduce(total, "mean"))
        if not np.isfinite(mean):
            raise SbpatchError(f"the loss of step {step + 1} is not finite: give a smaller --lr")
        return mean

    def _placed(self, inputs: Inputs, labels: Tensor) -> tuple[Inputs, Tensor]:
        return moved(inputs, self.accelerator.device, torch.float32), labels.to(self.accelerator.device)

    def _loss(self, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Each sample's loss (B,), the patched model's answer, and the exact model's where it was asked."""
        with self.accelerator.autocast():
            output = run(self.prepared, inputs)
            if self.exact is None:
                return labelled_loss(self.answer, output, labels), output, None
            with torch.no_grad():
                exact = run(self.exact, inputs)
        return distilled_loss(self.answer, output, exact, inputs, labels), output, exact

    @torch.no_grad()
    def _validate(self, done: Progressed, state: State) -> None:
        """Note how good the weights are now, and keep them if they are the best so far; every process does all of it."""
        scores, total = Scores(), 0.0
        size, workers = self.settings.batch_size // self.pieces, worker_count(self.validation)
        with closing(batches(self.validation, size, workers=workers, beside=True)) as read:
            for batch in read:
                inputs, labels = self._placed(*batch)
                losses, output, exact = self._loss(inputs, labels)
                total += float(losses.double().sum())
                found = kept(self.answer, output, inputs, labels)
                scores.add(found, found if exact is None else kept(self.answer, exact, inputs, labels))
        figures = scores.figures()
        if self.exact is None:  # then these compare the model with itself
            figures = {name: x for name, x in figures.items() if name not in ("agreement", "cosine")}
        loss = total / len(self.validation)
        done.validations.append({"step": done.step, "epoch": done.step / self.per_epoch, "loss": loss, **figures})
        if loss <= min(v["loss"] for v in done.validations):
            done.best = len(done.validations) - 1
            state.keep_best(self.trainable.parameters())

    def _save(self, done: Progressed, state: State, now: bool) -> None:
        scaler = self.accelerator.scaler
        weights = {name: p.detach() for name, p in self.trainable.parameters().items()}
        state.save(done, weights, self.optimizer.state_dict(), None if scaler is None else scaler.state_dict(), now)

    def _resumed(self, state: State) -> Progressed:
        found: Mapping[str, Any] = state.resume()
        self.trainable.take(found["weights"])
        self.optimizer.load_state_dict(found["optimizer"])
        if self.accelerator.scaler is not None and found["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(found["scaler"])
        return Progressed(**found["progress"])


def schedule(step: int, total: int) -> float:
    """Share of the largest step size at a step, counted from 0: a linear rise over `WARM_UP`, then half a cosine to 0."""
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1, total - warm))))
