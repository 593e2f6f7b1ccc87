"""A causal language model of WikiText-2, with full attention and with 1/8 of its entries (arXiv 2110.15343, section 5).

    python recipes/train_text.py --data-dir DIR --json train-text.json

DIR holds WikiText-2 as train.txt and valid.txt, or as the hub has it; without it the hub is asked, and `--data` takes any text
that sbpatch reads in its place. A single text is split by position, and the longer of two parts is trained on. The tokens are
those of a byte-level BPE vocabulary of 4,096, trained on the training text alone; perplexity is per token of the held-out text,
in windows of 1,024, and beside it stands that of the training text's token frequencies. The file of figures and its table,
train-text.md beside it, are written after each model; a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import training
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from training import Batch, Settings, Task

from sbpatch.data import open_text
from sbpatch.data.samples import strided
from sbpatch.data.texts import Text
from sbpatch.errors import SbpatchError

VOCABULARY = 4096
METHODS = ("full", "scatterbrain", "reformer", "performer", "local", "blocks")
TESTED = 32  # windows
AT_ONCE = 4  # windows


def parts(data: str, folder: Path | None) -> tuple[Text, Text]:
    """What is trained on, and the shorter text that is held out."""
    short, long = sorted(
        (open_text(data, data_dir=folder, split=s) for s in ("test", "train")), key=lambda t: len(t.content)
    )
    return long, short


def tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """A byte-level BPE vocabulary of a text: any text can be written in it."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(text.splitlines(keepends=True), trainer)
    return found


def encoded(found: Tokenizer, text: str) -> Tensor:
    """(tokens,) int64."""
    lines = found.encode_batch(text.splitlines(keepends=True))
    return torch.tensor([token for line in lines for token in line.ids])


def windows(tokens: Tensor, starts: Tensor, length: int) -> Batch:
    """`length` tokens from each start, each with the one after it as its target."""
    whole = tokens[starts[:, None] + torch.arange(length + 1)]  # (B, length + 1)
    return Batch(whole[:, :-1], whole[:, 1:])


def task(args: argparse.Namespace) -> Task:
    """Windows from anywhere in the training text, and `--test` windows spread over the other, none of which overlap."""
    train, test = parts(args.data, args.data_dir)
    vocabulary = tokenizer(train.content, args.vocabulary)
    size, length = vocabulary.get_vocab_size(), args.tokens
    known, unseen = encoded(vocabulary, train.content), encoded(vocabulary, test.content)
    for text, tokens in ((train, known), (test, unseen)):
        if len(tokens) <= length:
            raise SbpatchError(f"{text.name} has {len(tokens)} tokens, too few for a window of {length}: see --tokens")

    def draw(count: int, generator: torch.Generator) -> Batch:
        return windows(known, torch.randint(len(known) - length, (count,), generator=generator), length)

    starts = torch.tensor(strided(range(0, len(unseen) - length, length), args.test))
    batches = [windows(unseen, some, length) for some in starts.split(AT_ONCE)]
    frequency = (known.bincount(minlength=size) + 1).double()
    surprise = -(frequency / frequency.sum()).log()  # of each token, in nats
    asked = torch.cat([batch.targets.flatten() for batch in batches])
    notes = {
        "perplexity of token frequencies": float(surprise[asked].mean().exp()),
        "bytes a token": len(test.content.encode()) / len(unseen),
    }
    name = f"{train.name}: {len(known)} tokens of {size}, tested on {len(asked)} of {test.name}"
    return Task(name, "perplexity", size, size, "each", draw, batches, notes)


def main() -> None:
    parser = training.arguments(__doc__, Settings(), METHODS, "train-text.json")
    parser.add_argument("--data", default="wikitext-2", help="or another text: see sbpatch eval --dataset")
    parser.add_argument("--data-dir", type=Path, help="of WikiText-2: train.txt and valid.txt")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="tokens, at least the 256 bytes")
    parser.add_argument("--test", type=training.positive, default=TESTED, help="windows that perplexity is measured on")
    training.run(parser, task)


if __name__ == "__main__":
    main()
