"""What a model finds again in its context, by the depth at which it stands: as it is, and with a compressed cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import Cache

from ..data.retrieval import DEPTHS, Task
from ..progress import Progress, no_progress
from .decoding import cache_shares, read_prompt, shares, steps


def retrieval(
    model: nn.Module,
    tasks: Sequence[Task],
    *,
    make_cache: Callable[[], Cache],
    progress: Progress[Any] = no_progress,
) -> dict[str, Any]:
    """Ask `model` every task; greedy, and right where all tokens of the answer are.

    The context is read as a prompt; question and answer go token by token, so that what is found is found in the cache.

    Returns `accuracy` in percent and `by_depth` (depth -> percent), `tokens_per_second` of reading the question and answering,
    and, where the cache is compressed, `cache_read` and `cache_stored` as shares.
    """
    right: dict[float, list[bool]] = {}
    count, seconds = 0, 0.0
    caches: list[tuple[float, float]] = []
    for task in progress(tasks, "retrieving"):
        cache = make_cache()
        found, taken, spent = _ask(model, task, cache)
        right.setdefault(task.depth, []).append(found == task.answer.tolist())
        count, seconds = count + taken, seconds + spent
        caches += shares(cache)
    every = [x for part in right.values() for x in part]
    figures: dict[str, Any] = {
        "accuracy": 100 * sum(every) / len(every),
        "by_depth": {f"{depth:g}": 100 * sum(right[depth]) / len(right[depth]) for depth in DEPTHS if depth in right},
        "tokens_per_second": count / seconds,
    }
    return figures | cache_shares(caches)


def _ask(model: Any, task: Task, cache: Cache) -> tuple[list[int], int, float]:
    """The tokens answered, how many steps that took, and how many seconds."""
    read_prompt(model, task.context, cache)
    count = len(task.question) + len(task.answer) - 1
    start = time.perf_counter()
    likeliest = [token for _, token in steps(model, cache, task.question, count)]
    return likeliest[len(task.question) - 1 :], count, time.perf_counter() - start
