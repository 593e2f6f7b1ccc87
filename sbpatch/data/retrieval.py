"""Retrieval tasks: a fact put into real text at a known depth, and the question for it at the end."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SbpatchError
from .preprocessing import TextPreprocessing
from .texts import Text

NAMES = ("passkey", "needle")
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
PEOPLE = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Ines", "Jonas", "Karin", "Louis")
WORDS = (
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket", "kitchen", "lemon",
    "mirror", "orange", "pencil", "river", "silver", "table", "window",
)  # fmt: skip
OTHERS = 3  # facts of the same form about other people, at other places, in a needle task
CHANCE = {"passkey": 0.0, "needle": 100 / (OTHERS + 1)}  # percent that guessing finds: one of the words in the context


@dataclass(frozen=True)
class Task:
    """A context (n,), the question for what it holds (q,), and the answer (a,), all int64; the fact stands at `depth`."""

    context: Tensor
    question: Tensor
    answer: Tensor
    depth: float


def tasks(name: str, text: Text, preprocessing: TextPreprocessing, *, each: int = 4, seed: int = 0) -> list[Task]:
    """`each` tasks at each of `DEPTHS`, context, question and answer together as long as the model's samples.

    `passkey`: one number of five digits. `needle`: a person's word, beside the words of `OTHERS` other people.

    Raises:
        SbpatchError: the name is unknown, or the text is too short.
    """
    if name not in NAMES:
        raise SbpatchError(f"unknown retrieval task '{name}': known are {', '.join(NAMES)}")
    filler = _ids(preprocessing, text.content)
    draw, found = random.Random(seed), []
    for depth in DEPTHS:
        for _ in range(each):
            facts, question, answer = _passkey(draw) if name == "passkey" else _needle(draw)
            inserts = [_ids(preprocessing, f"\n{fact}\n") for fact in facts]
            asked, wanted = _ids(preprocessing, f"\n{question}"), _ids(preprocessing, f" {answer}")
            room = preprocessing.tokens - sum(map(len, inserts)) - len(asked) - len(wanted)
            if room < 1 or len(filler) < room:
                raise SbpatchError(
                    f"{text.name} has {len(filler)} tokens, which do not make a context of {preprocessing.tokens}: "
                    "see --length"
                )
            start = draw.randrange(len(filler) - room + 1)
            places = [depth, *(draw.random() for _ in inserts[1:])]
            parts = _inserted(filler[start : start + room], inserts, places)
            found.append(Task(parts, asked, wanted, depth))
    return found


def _inserted(filler: Tensor, inserts: list[Tensor], places: list[float]) -> Tensor:
    parts, last = [], 0
    for place, insert in sorted(zip(places, inserts, strict=True), key=lambda pair: pair[0]):
        stop = round(place * len(filler))
        parts += [filler[last:stop], insert]
        last = stop
    return torch.cat([*parts, filler[last:]])


def _passkey(draw: random.Random) -> tuple[list[str], str, str]:
    key = draw.randrange(10_000, 100_000)
    return (
        [f"The pass key is {key}. Remember it. {key} is the pass key."],
        "What is the pass key? The pass key is",
        str(key),
    )


def _needle(draw: random.Random) -> tuple[list[str], str, str]:
    people, words = draw.sample(PEOPLE, OTHERS + 1), draw.sample(WORDS, OTHERS + 1)
    facts = [f"The secret word of {who} is {word}." for who, word in zip(people, words, strict=True)]
    return facts, f"Now remember: the secret word of {people[0]} is", words[0]


def _ids(preprocessing: TextPreprocessing, text: str) -> Tensor:
    found = preprocessing.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(found, dtype=torch.int64)
