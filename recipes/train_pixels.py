"""CIFAR-10 as sequences of grey pixels: ten classes, from full attention and from 1/8 of its entries.

    python recipes/train_pixels.py --data-dir DIR --json train-pixels.json

An image is its 32 x 32 pixels, row by row, each of 256 values of grey, and a model answers by the mean of its 1,024 tokens:
nothing tells it that they lie in a square (Long Range Arena, arXiv 2011.04006). DIR holds cifar10-train.parquet and
cifar10-test.parquet; without it the hub is asked, and `--data` takes any images that sbpatch reads in their place. The file of
figures and its table, train-pixels.md beside it, are written after each model; a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
from math import isqrt
from pathlib import Path

import torch
import training
from labelled import Labelled, classification
from torch import Tensor
from training import Settings, Task

from sbpatch.data import Preprocessing, batches, open_images
from sbpatch.data.images import ImageSet
from sbpatch.errors import SbpatchError

GREYS = 256
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey (ITU-R BT.601)
METHODS = ("full", "scatterbrain", "reformer", "performer", "local", "lsh+clusters")
TESTED = 1000  # images
AT_ONCE = 256  # images that are read


def pixels(images: Tensor) -> Tensor:
    """(B, 3, side, side), 0 to 1 -> (B, side * side) uint8, row by row."""
    grey = torch.einsum("bchw,c->bhw", images, torch.tensor(LUMA))
    return (255 * grey).round().clamp(0, 255).byte().flatten(1)


def sequences(images: ImageSet) -> Labelled:
    read = [(pixels(some), labels) for some, labels in batches(images, AT_ONCE)]
    tokens, labels = (torch.cat(parts) for parts in zip(*read, strict=True))
    return Labelled(images.name, tokens, labels)


def task(args: argparse.Namespace) -> Task:
    """All training images, and `--test` test images spread over their set."""
    side = isqrt(args.tokens)
    if side**2 != args.tokens:
        raise SbpatchError(f"--tokens {args.tokens}: images are square, such as 32 x 32 = 1024")
    size = Preprocessing((3, side, side), "bicubic", 1.0, (0.0,) * 3, (1.0,) * 3)
    train = open_images(args.data, size, data_dir=args.data_dir, split="train")
    test = open_images(args.data, size, data_dir=args.data_dir, split="test", limit=args.test)
    classes = train.classes
    if classes is None:
        raise SbpatchError(f"{args.data} does not say how many classes it has")
    return classification(GREYS, classes, sequences(train), sequences(test))


def main() -> None:
    parser = training.arguments(__doc__, Settings(batch=8), METHODS, "train-pixels.json")
    parser.add_argument("--data", default="cifar10", help="or other images: see sbpatch eval --dataset")
    parser.add_argument("--data-dir", type=Path, help="of cifar10-train.parquet and cifar10-test.parquet")
    parser.add_argument("--test", type=training.positive, default=TESTED, help="images that accuracy is measured on")
    training.run(parser, task)


if __name__ == "__main__":
    main()
