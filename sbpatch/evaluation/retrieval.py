"""What a model finds again in its context, by the depth at which it stands: as it is, and with a compressed cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..data.retrieval import DEPTHS, Task
from ..generation.cache import CompressedCache
from ..generation.generate import cache_name
from ..progress import Progress, no_progress


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
    device = next(model.parameters()).device
    right: dict[float, list[bool]] = {}
    steps, seconds, shares = 0, 0.0, []
    for task in progress(tasks, "retrieving"):
        cache = make_cache()
        found, count, spent = _ask(model, task, cache, device)
        right.setdefault(task.depth, []).append(found == task.answer.tolist())
        steps, seconds = steps + count, seconds + spent
        if isinstance(cache, CompressedCache):
            shares.append((cache.read_share, cache.stored_share))
    every = [x for part in right.values() for x in part]
    figures: dict[str, Any] = {
        "accuracy": 100 * sum(every) / len(every),
        "by_depth": {f"{depth:g}": 100 * sum(right[depth]) / len(right[depth]) for depth in DEPTHS if depth in right},
        "tokens_per_second": steps / seconds,
    }
    for name, values in zip(("cache_read", "cache_stored"), zip(*shares, strict=True), strict=False):
        known = [x for x in values if x is not None]
        figures |= {name: sum(known) / len(known)} if known else {}
    return figures


@torch.inference_mode()
def _ask(model: Any, task: Task, cache: Cache, device: torch.device) -> tuple[list[int], int, float]:
    """The tokens answered, how many steps that took, and how many seconds."""
    name = cache_name(type(model))
    model(task.context[None].to(device), use_cache=True, logits_to_keep=1, **{name: cache})
    start, found = time.perf_counter(), []
    token = torch.empty(0)
    for i in range(len(task.question) + len(task.answer) - 1):
        if i < len(task.question):
            token = task.question[i : i + 1, None].to(device)  # (1, 1)
        logits = model(token, use_cache=True, **{name: cache}).logits[:, -1]
        if i >= len(task.question) - 1:
            token = logits.argmax(-1, keepdim=True)
            found.append(int(token))
    return found, i + 1, time.perf_counter() - start
