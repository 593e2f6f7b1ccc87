"""Sequences that each belong to a class, as a task of training from scratch: what the recipes on bytes and pixels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from training import Batch, Task

from sbpatch.errors import SbpatchError

TESTED = 8  # sequences at a time


@dataclass(frozen=True)
class Labelled:
    """Tokens (N, n) of any integer type and the classes of their sequences (N,); `padding` is a token that is none."""

    name: str
    tokens: Tensor
    labels: Tensor
    padding: int | None = None

    def batch(self, index: Tensor) -> Batch:
        tokens = self.tokens[index].long()
        return Batch(tokens, self.labels[index], None if self.padding is None else tokens != self.padding)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        return self.batch(torch.randint(len(self.labels), (count,), generator=generator))


def classification(vocabulary: int, classes: int, train: Labelled, test: Labelled) -> Task:
    """Beside the accuracies stand what a guess gets: any class, and always the most frequent one of the training samples.

    Raises:
        SbpatchError: a label is no class.
    """
    for part in (train, test):
        least, most = part.labels.aminmax()
        if least < 0 or most >= classes:
            raise SbpatchError(f"{part.name}: labels {least} to {most}, but classes are 0 to {classes - 1}")
    frequent = train.labels.bincount().argmax()
    notes = {"chance": 100 / classes, "most frequent class": 100 * float((test.labels == frequent).double().mean())}
    name = f"{train.name}: {len(train.labels)} sequences, tested on {len(test.labels)} of {test.name}"
    batches = [test.batch(index) for index in torch.arange(len(test.labels)).split(TESTED)]
    return Task(name, "accuracy", vocabulary, classes, "mean", train.draw, batches, notes)
