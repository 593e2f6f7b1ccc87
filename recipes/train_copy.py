"""Copy: learn to repeat 511 random symbols, with full attention and with 1/8 of its entries (arXiv 2110.15343, section 5).

    python recipes/train_copy.py --json docs/results/train-copy.json

Sequences are 0w0w, w drawn anew each time. The second w is what a model is trained on and what its perplexity is measured on:
1 where it copies, as many as there are symbols where it cannot. Models have two causal blocks of four heads. The file of
figures and its table, train-copy.md beside it, are written after each model; a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import training
from training import Batch, Settings, Task

SYMBOLS = 64  # besides the 0 between the copies
METHODS = ("full", "scatterbrain", "reformer", "performer", "local", "blocks")
TESTED = 32  # sequences
BASE = 163.0  # 1,024 / 2 pi: every rotary pair turns once at least in a sequence, without which hashing does not copy


def sequences(tokens: int, count: int, generator: torch.Generator) -> Batch:
    """0w0w, (count, tokens); the targets are the next tokens, from the second 0 on."""
    half = tokens // 2
    word = torch.randint(1, SYMBOLS + 1, (count, half - 1), generator=generator)
    once = torch.cat((torch.zeros(count, 1, dtype=torch.int64), word), dim=1)
    whole = torch.cat((once, once), dim=1)
    targets = torch.full_like(whole, training.IGNORED)
    targets[:, half:-1] = word
    return Batch(whole, targets)


def task(args: argparse.Namespace) -> Task:
    draw = partial(sequences, args.tokens)
    generator = torch.Generator().manual_seed(2**31)  # no seed of a training
    test = [draw(8, generator) for _ in range(TESTED // 8)]
    count = SYMBOLS + 1
    return Task("copy", "perplexity", count, count, "each", draw, test, {"perplexity of a guess": float(SYMBOLS)})


def main() -> None:
    training.run(training.arguments(__doc__, Settings(batch=2, lr=2e-3, base=BASE), METHODS, "train-copy.json"), task)


if __name__ == "__main__":
    main()
