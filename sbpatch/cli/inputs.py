"""What a command runs on: the model at the size asked for, and the samples of a data set."""

from __future__ import annotations

from pathlib import Path

import torch

from ..data import texts, tokens
from ..data.batch import Inputs, moved
from ..data.loading import batches
from ..data.preprocessing import Preprocessing, TextPreprocessing
from ..data.samples import Samples
from ..data.sources import open_images, sample_images
from ..errors import SbpatchError
from ..evaluation.evaluate import check_classes
from ..models.checkpoint import Checkpoint
from ..models.load import DEMO, load_checkpoint
from ..plan.plan import Plan


def open_model(
    name: str,
    checkpoint: Path | None = None,
    input_size: int | None = None,
    length: int | None = None,
    plan: Plan | None = None,
) -> Checkpoint:
    """A model at the size asked for, else at its plan's, else at its own.

    Raises:
        SbpatchError: as `load_checkpoint`; a length for no text, pixels for text, or another length than that of a plan that
            is not causal, which no rule scales.
    """
    planned = plan.input_size if plan and plan.input_size else []
    fixed = plan is not None and not all(site.causal for site in plan.patched)
    if fixed and len(planned) == 1 and length not in (None, *planned):
        raise SbpatchError(f"{name} was calibrated at {planned[0]} tokens: calibrate again for a --length of {length}")
    loaded = load_checkpoint(name, checkpoint, input_size or length or (planned[-1] if planned else None))
    text = isinstance(loaded.preprocessing, TextPreprocessing)
    if (wrong := input_size if text else length) is not None:
        flags = "text: give --length, not --input-size" if text else "no text: give --input-size, not --length"
        raise SbpatchError(f"{loaded.name} takes {flags} {wrong}")
    return loaded


def size_of(loaded: Checkpoint) -> list[int]:
    """What a plan keeps of the inputs' size: (channels, height, width), or tokens alone."""
    preprocessing = loaded.preprocessing
    return [preprocessing.tokens] if isinstance(preprocessing, TextPreprocessing) else list(preprocessing.input_size)


def calibration_set(
    loaded: Checkpoint,
    source: str | None,
    count: int,
    seed: int,
    data_dir: Path | None = None,
    skipped: list[str] | None = None,
) -> Samples:
    """`count` samples of a kind that the model takes, of a source's training part.

    Without a source: the demo's own digits, the photographs that scikit-learn ships, or Python's language reference.
    `skipped` takes a line for each that is bad, and others are drawn in their place; None: the first is an error.

    Raises:
        SbpatchError: the source cannot be read, has too few, or is of the other kind.
    """
    preprocessing = loaded.preprocessing
    if isinstance(preprocessing, Preprocessing):
        source = source or ("demo" if loaded.name == DEMO else None)
        return sample_images(source, preprocessing, count, seed, data_dir=data_dir, skipped=skipped)
    text = texts.open_text(source or "python-docs", data_dir=data_dir, split="train", skipped=skipped)
    draw = tokens.sample_windows if loaded.answer == "next-token" else tokens.sample_passages
    return draw(text, preprocessing, count, seed)


def evaluation_set(
    loaded: Checkpoint,
    source: str,
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    stride: int | None = None,
    skipped: list[str] | None = None,
) -> Samples:
    """The samples of a source's test part, checked against the model.

    Args:
        skipped: takes a line for each text that is bad; bad images are then left for `batches` to skip.

    Raises:
        SbpatchError: the source cannot be read, is of the other kind, or has other classes than the model.
    """
    preprocessing = loaded.preprocessing
    if stride is not None and loaded.answer != "next-token":
        raise SbpatchError(f"--stride is for models that predict the next token, and {loaded.name} does not")
    if isinstance(preprocessing, Preprocessing):
        images = open_images(source, preprocessing, data_dir=data_dir, limit=limit, skip_bad=skipped is not None)
        images.fit(loaded.classes)  # before its classes are counted: one wrong label must not make it another set
        if skipped is None:
            images.check()
        check_classes(loaded, images)
        return images
    text = texts.open_text(source, data_dir=data_dir, skipped=skipped)
    if loaded.answer == "next-token":
        return tokens.windows(text, preprocessing, stride=stride, limit=limit)
    return tokens.passages(text, preprocessing, limit=limit)


def training_set(
    loaded: Checkpoint,
    source: str,
    data_dir: Path | None = None,
    limit: int | None = None,
    skipped: list[str] | None = None,
) -> Samples:
    """The samples of a source's training part, or `limit` of them spread evenly: images, windows or paragraphs of a text.

    `skipped` takes a line for each that is bad, which is left out; every image is looked at for that. None: the first is an
    error.

    Raises:
        SbpatchError: as `evaluation_set`.
    """
    preprocessing = loaded.preprocessing
    if isinstance(preprocessing, Preprocessing):
        images = open_images(
            source,
            preprocessing,
            data_dir=data_dir,
            split="train",
            limit=limit,
            skip_bad=skipped is not None,
            stored=True,
        )
        if skipped is None:
            images.check()
        else:
            images.fit(loaded.classes)
            images = images.without_bad(skipped)
        check_classes(loaded, images)
        return images
    text = texts.open_text(source, data_dir=data_dir, split="train", skipped=skipped)
    cut = tokens.windows if loaded.answer == "next-token" else tokens.passages
    return cut(text, preprocessing, limit=limit)


def default_batch(loaded: Checkpoint) -> int:
    """Samples a batch: one for causal models, whose windows are long and whose logits go over a vocabulary."""
    return 1 if loaded.answer == "next-token" else 8


def input_batches(loaded: Checkpoint, samples: Samples, device: str, dtype: torch.dtype) -> list[Inputs]:
    """The inputs of all samples on a device, in batches to calibrate on."""
    return [moved(x, device, dtype) for x, _ in batches(samples, default_batch(loaded))]


def unpadded_set(
    loaded: Checkpoint,
    source: str | None,
    count: int,
    seed: int,
    data_dir: Path | None,
    skipped: list[str] | None = None,
) -> Samples:
    """As `calibration_set`, but encoders get stretches of text as long as they take instead of padded paragraphs.

    Matrices then have one size, and their errors can be compared. The stretches are of running text, without headings, one
    from a random place in each of `count` equal parts.

    Raises:
        SbpatchError: as `calibration_set`, and a text too short for that many.
    """
    preprocessing = loaded.preprocessing
    if not isinstance(preprocessing, TextPreprocessing) or loaded.answer == "next-token":
        return calibration_set(loaded, source, count, seed, data_dir, skipped)
    text = texts.open_text(source or "python-docs", data_dir=data_dir, split="train", skipped=skipped)
    words = " ".join(text.paragraphs()).split()
    starts = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [words[int((i + u / 2) * len(words) / count) : (i + 1) * len(words) // count] for i, u in enumerate(starts)]
    stretches = texts.Text(text.name, "\n\n".join(" ".join(part) for part in parts))
    found = tokens.sample_passages(stretches, preprocessing, count, seed)
    if not all(found[i][0]["attention_mask"].all() for i in range(count)):
        raise SbpatchError(
            f"{text.name} has {len(words)} words, too few for {count} samples of {preprocessing.tokens} tokens: "
            "ask for fewer or shorter ones"
        )
    return found
