"""What a model expects as its input: images of one size, or tokens of its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from .. import bounds
from ..errors import SbpatchError, one_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEAST_CROP, MOST_CROP = 0.05, 10.0  # of crop_pct
LEAST_STD, MOST_MEAN = 1e-6, 1e6  # of values from 0 to 1, or from 0 to 255
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "random")
CROP_MODES = ("center", "squash", "border")


def image_size(values: Any) -> tuple[int, int, int]:
    """(channels, height, width) from a file, within bounds.

    Raises:
        SbpatchError: it is something else.
    """
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise SbpatchError(f"input_size is {bounds.shown(values)}: it must be channels, height and width")
    channels, height, width = (bounds.whole(x, "input_size", 1, bounds.PIXELS) for x in values)
    return channels, height, width


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: resize to `input_size / crop_pct`, crop the centre, scale to 0..1, normalise.

    `input_size` is (channels, height, width) in pixels; `mean` and `std` are per channel, for values from 0 to 1.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_mode: str = "center"

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON can hold them, under the names of timm's `pretrained_cfg`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read `to_dict`'s values, or a timm `pretrained_cfg` (other keys are left alone).

        Raises:
            SbpatchError: a value is missing or is not of its kind.
        """
        try:
            found = cls(
                input_size=image_size(values["input_size"]),
                interpolation=str(values["interpolation"]),
                crop_pct=bounds.real(values["crop_pct"], "crop_pct", LEAST_CROP, MOST_CROP),
                mean=tuple(bounds.real(x, "mean", -MOST_MEAN, MOST_MEAN) for x in values["mean"]),
                std=tuple(bounds.real(x, "std", LEAST_STD, MOST_MEAN) for x in values["std"]),
                crop_mode=str(values.get("crop_mode", "center")),
            )
        except (KeyError, TypeError, ValueError, SbpatchError) as error:
            raise SbpatchError(
                f"preprocessing with a missing or wrong value ({one_line(error)}): it needs input_size, interpolation, "
                "crop_pct, mean and std"
            ) from None
        if found.interpolation not in INTERPOLATIONS or found.crop_mode not in CROP_MODES:
            raise SbpatchError(
                f"preprocessing with interpolation {bounds.shown(found.interpolation)} and crop mode "
                f"{bounds.shown(found.crop_mode)}: known are {', '.join(INTERPOLATIONS)} and {', '.join(CROP_MODES)}"
            )
        if not len(found.mean) == len(found.std) == found.input_size[0]:
            raise SbpatchError(f"preprocessing with {len(found.mean)} means for {found.input_size[0]} channels")
        return found

    def transform(self) -> Callable[[Image], Tensor]:
        """The evaluation transform: an RGB image -> a float32 tensor of shape `input_size`."""
        from timm.data.transforms_factory import create_transform  # slow to import, and only images need it

        transform: Callable[[Image], Tensor] = create_transform(**asdict(self), is_training=False)
        return transform

    def scale(self, width: int, height: int) -> float:
        """By how much the transform resizes an image before it crops; 1 where it goes to the input's size at once."""
        if self.crop_mode != "center":
            return 1.0
        return max(self.input_size[1:]) / self.crop_pct / max(1, min(width, height))

    def resized(self, pixels: int) -> Preprocessing:
        """The same for square inputs of another size."""
        return replace(self, input_size=(self.input_size[0], pixels, pixels))

    def probe(self) -> Tensor:
        """One input of zeros, (1, channels, height, width)."""
        return torch.zeros(1, *self.input_size)


@dataclass(frozen=True)
class AudioPreprocessing(Preprocessing):
    """A spectrogram of `input_size` (1, mel bands, frames): enough to inspect a model, sounds are not read."""

    def transform(self) -> Callable[[Image], Tensor]:
        raise SbpatchError(
            "the model takes spectrograms of sounds: it can be inspected, but no audio data is read here"
        )

    def probe(self) -> Tensor:
        """One input of zeros, (1, mel bands, frames)."""
        return torch.zeros(self.input_size)


@dataclass(frozen=True)
class TextPreprocessing:
    """How a text becomes an input: the model's own tokenizer, and at most `tokens` tokens a sample."""

    tokenizer: Any  # of transformers
    tokens: int

    def probe(self) -> dict[str, Tensor]:
        """One sample of `tokens` equal tokens, none of them padding: `input_ids` and `attention_mask`, (1, tokens)."""
        ids = torch.full((1, self.tokens), self.tokenizer.unk_token_id or 0)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def resized(self, tokens: int) -> TextPreprocessing:
        """The same for samples of another length."""
        return replace(self, tokens=tokens)
