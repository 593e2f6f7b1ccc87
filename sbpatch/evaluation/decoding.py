"""Decoding with a cache: how well text is predicted token by token, what the model goes on with by itself, and how fast.

The exact model with its exact cache stands beside the patched one with its compressed cache.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from ..data.samples import Samples, strided
from ..generation.cache import CompressedCache
from ..generation.generate import cache_name, patched_layers
from ..progress import Progress, no_progress
from ..sites.observe import check_finite
from .variants import VARIANTS, Subject, build

WINDOWS = 4  # of a text that are decoded


class Variant(NamedTuple):
    """A causal language model of transformers, and how its caches are made."""

    model: Any
    make_cache: Callable[[], Cache]


@dataclass
class Decoded:
    """What one variant has decoded, over all windows."""

    log_likelihood: float = 0.0
    seconds: float = 0.0
    likeliest: list[int] = field(default_factory=list)  # at each step along the text
    continued: list[int] = field(default_factory=list)
    caches: list[tuple[float, float]] = field(default_factory=list)  # what was read and what is stored, as shares

    def figures(self, exact: Decoded) -> dict[str, float]:
        found = {
            "decoded_perplexity": math.exp(-self.log_likelihood / len(self.likeliest)),
            "decoded_agreement": same(self.likeliest, exact.likeliest),
            "continuation_agreement": same(self.continued, exact.continued),
            "tokens_per_second": len(self.continued) / self.seconds,
        }
        return found | cache_shares(self.caches)


def same(found: list[int], wanted: list[int]) -> float:
    """Percent of equal tokens at the same place."""
    return 100 * sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def cache_shares(caches: list[tuple[float, float]]) -> dict[str, float]:
    """Means of what steps read and of what is stored; nothing where no cache was compressed."""
    names = ("cache_read", "cache_stored")
    return {name: sum(x) / len(x) for name, x in zip(names, zip(*caches, strict=True), strict=False)}


def shares(cache: Cache) -> list[tuple[float, float]]:
    """What steps read of a cache and what it stores, where it is a compressed one that has seen a step."""
    if not isinstance(cache, CompressedCache) or cache.read_share is None or cache.stored_share is None:
        return []
    return [(cache.read_share, cache.stored_share)]


# -- a prompt, and tokens after it ------------------------------------------------------------------------------------


@torch.inference_mode()
def read_prompt(model: Any, prompt: Tensor, cache: Cache) -> None:
    """Run the prompt (n,) and keep it in the cache."""
    device = next(model.parameters()).device
    model(prompt[None].to(device), use_cache=True, logits_to_keep=1, **{cache_name(type(model)): cache})


@torch.inference_mode()
def steps(model: Any, cache: Cache, given: Tensor, count: int) -> Iterator[tuple[Tensor, int]]:
    """`count` tokens one by one on top of what the cache holds: those of `given` (g,), then the likeliest ones.

    Yields each step's logits (V,) and the likeliest next token.

    Raises:
        SbpatchError: logits are not finite.
    """
    name, device = cache_name(type(model)), next(model.parameters()).device
    token = torch.empty(0)
    for i in range(count):
        if i < len(given):
            token = given[i : i + 1, None].to(device)  # (1, 1)
        logits = model(token, use_cache=True, **{name: cache}).logits[0, -1]
        check_finite(logits, "decoding", "a step's logits")
        token = logits.argmax()[None, None]
        yield logits, int(token)


# -- variants side by side --------------------------------------------------------------------------------------------


def variants_of(subject: Subject, example: Any) -> dict[str, Variant]:
    """The exact model with transformers' cache, and the patched ones with a compressed cache of the patched layers.

    A model without a plan stands for both: its second variant, "compressed", compresses the cache alone.
    """
    found: dict[str, Variant] = {}
    for name in subject.variants:
        if name == VARIANTS[0]:
            continue
        model: Any = build(subject, name, example)
        if name == "sdpa":
            found[name] = Variant(model, partial(DynamicCache, config=model.config))
        else:
            found[name] = Variant(model, partial(CompressedCache, model.config, chosen=patched_layers(model)))
    if len(found) == 1:
        exact = found["sdpa"].model
        found["compressed"] = Variant(exact, partial(CompressedCache, exact.config))
    return found


def decoding(
    variants: Mapping[str, Variant],
    data: Samples,
    tokens: int,
    *,
    windows: int = WINDOWS,
    progress: Progress[Any] = no_progress,
) -> dict[str, dict[str, float]]:
    """Decode the last `tokens` tokens of some windows of a text, by each variant; the first is what others are compared with.

    What stands before them is the prompt. Then, each from the same prompt: the window's own tokens one by one, whose next
    tokens are scored; and a greedy continuation of as many tokens, from the first of them on, which is timed.

    Args:
        data: samples of a causal model, longer than `tokens`.
        windows: how many of them, spread evenly.

    Returns:
        {variant: figures}: `decoded_perplexity`; `decoded_agreement`, percent of steps along the text whose likeliest next
        token is the first variant's; `continuation_agreement`, percent of equal tokens at the same place of the
        continuations; `tokens_per_second`; of compressed caches `cache_read` and `cache_stored`, as shares.
    """
    found = {name: Decoded() for name in variants}
    order = list(variants)
    for number, index in enumerate(progress(strided(range(len(data)), windows), "decoding")):
        inputs, labels = data[index]
        text = torch.cat((inputs["input_ids"], labels[-1:]))
        for name in order[number % len(order) :] + order[: number % len(order)]:  # each is first in turn
            _decode(variants[name], found[name], text[: -tokens - 1], text[-tokens - 1 :])
    exact = found[order[0]]
    return {name: one.figures(exact) for name, one in found.items()}


def _decode(variant: Variant, found: Decoded, prompt: Tensor, text: Tensor) -> None:
    """Score the tokens of `text` (t + 1,) after its first, and continue from that one with t tokens of its own."""
    cache, count = variant.make_cache(), len(text) - 1
    read_prompt(variant.model, prompt, cache)
    along = copy.deepcopy(cache)
    for target, (logits, likeliest) in zip(text[1:], steps(variant.model, along, text, count), strict=True):
        found.log_likelihood += float(logits.float().log_softmax(-1)[target])
        found.likeliest.append(likeliest)
    found.caches += shares(along)
    start = time.perf_counter()
    found.continued += [likeliest for _, likeliest in steps(variant.model, cache, text[:1], count)]
    found.seconds += time.perf_counter() - start
