"""Images that scikit-learn ships: handwritten digits, and random crops of two photographs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .images import Item


def digits_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's handwritten digits, 8 x 8 values from 0 to 16, in a fixed split: 1,437 'train' and 360 'test'.

    Returns images (N, 8, 8) float64 and labels (N,) int64.
    """
    from sklearn.datasets import load_digits  # slow to import, and only these images need it
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)
    index = np.sort(train if split == "train" else test)
    return digits.images[index], digits.target[index]


def digits(split: str) -> list[Item]:
    def image(digit: np.ndarray) -> Image.Image:
        return Image.fromarray((digit * (255 / 16)).round().astype(np.uint8))

    pairs = zip(*digits_split(split), strict=True)
    return [
        Item(f"digit {i} of {split}", digit.astype(np.uint8).tobytes().hex(), int(label), partial(image, digit))
        for i, (digit, label) in enumerate(pairs)
    ]


def photo_crops(count: int, seed: int) -> list[Item]:
    from sklearn.datasets import load_sample_images

    photos = load_sample_images()
    random = np.random.default_rng(seed)

    def crop(photo: np.ndarray, top: int, left: int, side: int, mirrored: bool) -> Image.Image:
        part = photo[top : top + side, left : left + side]
        return Image.fromarray(part[:, ::-1].copy() if mirrored else part)

    items = []
    for i in range(count):
        photo, name = photos.images[i % 2], Path(photos.filenames[i % 2]).name
        height, width = photo.shape[:2]
        side = round(min(height, width) * random.uniform(0.15, 1) ** 0.5)  # 15 % to all of the largest square's area
        box = (
            int(random.integers(height - side + 1)),
            int(random.integers(width - side + 1)),
            side,
            bool(random.integers(2)),
        )
        where = f"crop {box} of {name}"
        items.append(Item(where, where, -1, partial(crop, photo, *box)))
    return items
