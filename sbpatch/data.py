"""Sample batches and evaluation sets: a name or path -> images and labels."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def digits_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's handwritten digits, 8 x 8 values from 0 to 16, in a fixed split: 1,437 'train' and 360 'test'.

    Returns images (N, 8, 8) float64 and labels (N,) int64.
    """
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )
    index = np.sort(train if split == "train" else test)
    return digits.images[index], digits.target[index]
