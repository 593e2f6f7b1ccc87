"""What a text becomes for a model: windows of consecutive tokens for causal models, paragraphs for encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import SbpatchError
from .preprocessing import TextPreprocessing
from .samples import strided
from .texts import PARAGRAPH, Text

LONG = 1024  # tokens: longer samples are made of several paragraphs, as hardly any is so long by itself


class TextSet(Dataset[tuple[dict[str, Tensor], Tensor]]):
    """Samples of n tokens: `input_ids` and `attention_mask` (0: padding), (n,) int64 both, and labels (n,) int64.

    A label is the token that comes next, where a causal model's prediction of it is scored, and -1 elsewhere.
    """

    def __init__(self, name: str, samples: Sequence[Sample]) -> None:
        self.name, self.samples = name, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        ids, mask, labels = self.samples[index].tensors()
        return {"input_ids": ids, "attention_mask": mask}, labels

    def fingerprint(self) -> str:
        """SHA-256 over the tokens, padding and labels of the samples in their order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            for tensor in sample.tensors():
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Window:
    """`size` tokens of `tokens` from `start`, after the token that begins every text of the model, where it has one."""

    tokens: Tensor
    start: int
    size: int
    scored: int  # the first position whose next token is scored; those before it were scored in an earlier window
    prefix: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        part = self.tokens[self.start : self.start + self.size + 1]
        ids = torch.cat((self.prefix, part[:-1]))
        labels = torch.full_like(ids, -1)
        labels[len(self.prefix) + self.scored :] = part[1 + self.scored :]
        return ids, torch.ones_like(ids), labels


@dataclass(frozen=True)
class Passage:
    """The tokens of one paragraph, padded to `length`."""

    tokens: list[int]
    length: int
    padding: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.full((self.length,), self.padding)
        ids[: len(self.tokens)] = torch.tensor(self.tokens)
        return ids, (torch.arange(self.length) < len(self.tokens)).long(), torch.full_like(ids, -1)


Sample = Window | Passage


# -- the two views ---------------------------------------------------------------------------------------------------


def spans(tokens: int, size: int, stride: int) -> list[tuple[int, int]]:
    """(start, first scored position) of windows of `size` over a text, so that every token but the first is scored once.

    Windows lie `stride` apart, the last one ends where the text does. Position i of a window predicts its token i + 1.
    """
    last = tokens - 1 - size
    starts = list(range(0, last + 1, stride))
    if starts[-1] < last:
        starts.append(last)
    return [(0, 0), *((start, before + size - start) for before, start in pairwise(starts))]


def windows(
    text: Text, preprocessing: TextPreprocessing, *, stride: int | None = None, limit: int | None = None
) -> TextSet:
    """All windows of a text, each with `stride` newly scored tokens (default: all of them); `limit` spread evenly.

    Raises:
        SbpatchError: the text is shorter than a window, or the stride does not fit into one.
    """
    tokens, prefix, size = _tokens(text, preprocessing)
    if stride is not None and not 1 <= stride <= preprocessing.tokens:
        raise SbpatchError(f"a stride of {stride} tokens: it must be from 1 to the window's {preprocessing.tokens}")
    found = [Window(tokens, s, size, first, prefix) for s, first in spans(len(tokens), size, min(stride or size, size))]
    return TextSet(text.name, strided(found, limit or len(found)))


def sample_windows(text: Text, preprocessing: TextPreprocessing, count: int, seed: int) -> TextSet:
    """`count` different windows of a text, one at a random place in each of as many equal parts; they may overlap.

    Raises:
        SbpatchError: the text is shorter than that many windows can be had from.
    """
    tokens, prefix, size = _tokens(text, preprocessing)
    places = len(tokens) - size
    if places < count:
        raise SbpatchError(
            f"{text.name} has {len(tokens)} tokens, too few for {count} windows of {size}: ask for fewer"
        )
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    edges = [i * places // count for i in range(count + 1)]
    starts = [low + int(u * (high - low)) for u, low, high in zip(draws, edges[:-1], edges[1:], strict=True)]
    return TextSet(text.name, [Window(tokens, start, size, 0, prefix) for start in starts])


def passages(text: Text, preprocessing: TextPreprocessing, *, limit: int | None = None) -> TextSet:
    """The paragraphs of a text, cut or padded to the model's length; `limit` of them spread evenly.

    Where that is over `LONG` tokens, as many paragraphs as it takes, one after the other, are one sample.

    Raises:
        SbpatchError: the text has no paragraph of 200 characters.
    """
    found = _paragraphs(text, preprocessing)
    if not found:
        raise SbpatchError(f"{text.name} has no paragraph of at least {PARAGRAPH} characters")
    return _passages(text, strided(found, limit or len(found)), preprocessing)


def sample_passages(text: Text, preprocessing: TextPreprocessing, count: int, seed: int) -> TextSet:
    """`count` different paragraphs of a text, or samples of several (see `passages`), drawn at random.

    Raises:
        SbpatchError: the text has fewer.
    """
    found = _paragraphs(text, preprocessing)
    if len(found) < count:
        together = f"samples of {preprocessing.tokens} tokens in its " if preprocessing.tokens > LONG else ""
        raise SbpatchError(
            f"{text.name} has {len(found)} {together}paragraphs of at least {PARAGRAPH} characters, {count} were asked for: "
            "ask for fewer"
        )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]
    return _passages(text, [found[i] for i in order.tolist()], preprocessing)


def _tokens(text: Text, preprocessing: TextPreprocessing) -> tuple[Tensor, Tensor, int]:
    """The tokens of a text, the one that the model's texts begin with (or none), and how many of the text a window holds."""
    tokenizer = preprocessing.tokenizer
    tokens = torch.tensor(
        tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64
    )
    first = tokenizer("", verbose=False)["input_ids"][:1]
    prefix = torch.tensor(first if first == [tokenizer.bos_token_id] else [], dtype=torch.int64)
    size = preprocessing.tokens - len(prefix)
    if size < 1 or len(tokens) <= size:
        raise SbpatchError(
            f"{text.name} has {len(tokens)} tokens, too few for a window of {preprocessing.tokens}: see --length"
        )
    return tokens, prefix, size


def _paragraphs(text: Text, preprocessing: TextPreprocessing) -> list[str]:
    """The paragraphs of a text, put together to samples of at least the model's length where that is over `LONG`."""
    found = text.paragraphs()
    if preprocessing.tokens <= LONG or not found:
        return found
    samples: list[str] = []
    part: list[str] = []
    size = 0
    counted = preprocessing.tokenizer(found, add_special_tokens=False, verbose=False)["input_ids"]
    for paragraph, tokens in zip(found, counted, strict=True):
        part, size = [*part, paragraph], size + len(tokens)
        if size >= preprocessing.tokens:
            samples.append("\n\n".join(part))
            part, size = [], 0
    return [*samples, "\n\n".join(part)] if part else samples


def _passages(text: Text, paragraphs: Sequence[str], preprocessing: TextPreprocessing) -> TextSet:
    tokenizer, length = preprocessing.tokenizer, preprocessing.tokens
    found = tokenizer(list(paragraphs), truncation=True, max_length=length, verbose=False)["input_ids"]
    padding = tokenizer.pad_token_id or 0  # behind a mask, but position tables may be counted by it
    return TextSet(text.name, [Passage(tokens, length, padding) for tokens in found])
