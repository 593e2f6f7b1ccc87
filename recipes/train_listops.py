"""ListOps: the value of a nested expression such as [MAX 2 [MIN 7 9 ] 0 ], from full attention and from 1/8 of its entries.

    python recipes/train_listops.py --json docs/results/train-listops.json

The operators are minimum, maximum, median and sum modulo 10. An expression is 256 to 1,024 tokens long, and a model answers at
its first token, the outermost operator: one of ten digits (Nangia and Bowman, arXiv 1804.06028; Long Range Arena, arXiv
2011.04006). Expressions are drawn anew each time. Beside the accuracies stand what a guess gets: any digit, always the most
frequent one, and for each outermost operator its most frequent one. The file of figures and its table, train-listops.md beside
it, are written after each model; a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
import training
from training import Batch, Settings, Task

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
DIGITS = tuple(map(str, range(10)))
SYMBOLS = [*DIGITS, *OPERATORS, "]"]
PADDING = len(SYMBOLS)
DEEPEST, ARGUMENTS = 10, 10  # operators within each other, and most arguments of one
NESTED = 0.25  # share of the arguments that are operators
METHODS = ("full", "scatterbrain", "reformer", "performer", "local", "lsh+clusters")
TESTED = 1000  # expressions


class TooLong(Exception):
    """An expression has more tokens than asked for."""


def expression(draw: Callable[[], float], most: int, depth: int = 1) -> tuple[list[str], int]:
    """An operator with its arguments, and its value. `draw` gives numbers from 0 to 1."""
    operator = list(OPERATORS)[int(draw() * len(OPERATORS))]
    symbols, values = [operator], []
    for _ in range(2 + int(draw() * (ARGUMENTS - 1))):
        if depth < DEEPEST and draw() < NESTED:
            inner, value = expression(draw, most - len(symbols) - 1, depth + 1)
            symbols += inner
        else:
            value = int(draw() * 10)
            symbols.append(DIGITS[value])
        values.append(value)
        if len(symbols) >= most:
            raise TooLong
    return [*symbols, "]"], OPERATORS[operator](values)


def of_length(draw: Callable[[], float], least: int, most: int) -> tuple[list[str], int]:
    """The first expression drawn that has that many tokens."""
    while True:
        try:
            symbols, value = expression(draw, most)
        except TooLong:
            continue
        if len(symbols) >= least:
            return symbols, value


def expressions(tokens: int, count: int, generator: torch.Generator) -> Batch:
    """`count` expressions of a quarter of `tokens` at least, padded to `tokens`, and their values."""
    source = random.Random(int(torch.randint(2**62, (), generator=generator)))
    drawn = [of_length(source.random, tokens // 4, tokens) for _ in range(count)]
    number = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    rows = torch.full((count, tokens), PADDING)
    for row, (symbols, _) in zip(rows, drawn, strict=True):
        row[: len(symbols)] = torch.tensor([number[symbol] for symbol in symbols])
    return Batch(rows, torch.tensor([value for _, value in drawn]), rows != PADDING)


def guesses(test: Sequence[Batch]) -> dict[str, float]:
    """Percent right of the digit that is most frequent, overall and for each outermost operator."""
    values = Counter(value for batch in test for value in batch.targets.tolist())
    pairs = Counter(pair for x in test for pair in zip(x.tokens[:, 0].tolist(), x.targets.tolist(), strict=True))
    best = sum(max(count for (op, _), count in pairs.items() if op == one) for one in {op for op, _ in pairs})
    share = 100 / values.total()
    return {
        "chance": 10.0,
        "most frequent digit": share * max(values.values()),
        "most frequent digit of the first operator": share * best,
    }


def task(args: argparse.Namespace) -> Task:
    draw = partial(expressions, args.tokens)
    generator = torch.Generator().manual_seed(2**31)  # no seed of a training
    test = [draw(min(20, args.test), generator) for _ in range(-(-args.test // 20))]
    return Task("listops", "accuracy", len(SYMBOLS) + 1, 10, "first", draw, test, guesses(test))


def main() -> None:
    parser = training.arguments(__doc__, Settings(batch=8), METHODS, "train-listops.json")
    parser.add_argument(
        "--test", type=training.positive, default=TESTED, help="expressions that accuracy is measured on"
    )
    training.run(parser, task)


if __name__ == "__main__":
    main()
