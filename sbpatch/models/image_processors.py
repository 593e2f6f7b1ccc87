"""An image processor of transformers -> the same preprocessing in our own terms, checked on a picture."""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image

from ..bounds import PIXELS, real, whole
from ..data.preprocessing import LEAST_STD, MOST_MEAN, Preprocessing
from ..errors import SbpatchError, one_line

INTERPOLATION = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
ALIKE = 0.02  # of the values' spread: how far PIL and torchvision may resample apart, on average


def image_preprocessing(processor: Any) -> Preprocessing:
    """What `processor` does, as a `Preprocessing`.

    Raises:
        SbpatchError: it does something else than resize, crop, scale to 0..1 and normalise to one fixed size.
    """
    name = type(processor).__name__
    size, crop = _edges(processor, "do_resize", "size"), _edges(processor, "do_center_crop", "crop_size")
    resample = processor.resample if isinstance(processor.resample, int) else None
    if not size or len(crop or size) != 2 or resample not in INTERPOLATION:
        raise SbpatchError(
            f"{name} with size {processor.size}: it does not resize to one size in a way that is known here"
        )
    for pixels in (*size, *crop):
        whole(pixels, f"{name}'s size", 1, PIXELS)
    height, width = (int(pixels) for pixels in crop or size)
    normalised = bool(processor.do_normalize)
    preprocessing = Preprocessing(
        input_size=(3, height, width),
        interpolation=INTERPOLATION[resample],
        crop_pct=crop_share(height, size[0]),
        mean=_three(processor.image_mean, "mean", -MOST_MEAN) if normalised else (0.0, 0.0, 0.0),
        std=_three(processor.image_std, "std", LEAST_STD) if normalised else (1.0, 1.0, 1.0),
        crop_mode="squash" if len(size) == 2 else "center",
    )
    picture = _picture()
    try:
        theirs = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"][0])
    except Exception as error:  # of values that no library checked before
        raise SbpatchError(f"{name} cannot prepare an image: {one_line(error)}") from None
    ours = preprocessing.transform()(picture)
    if theirs.shape != ours.shape or (theirs - ours).abs().mean() > ALIKE * (ours.max() - ours.min()):
        raise SbpatchError(f"{name} prepares images in a way of its own, which resize, crop and normalise do not give")
    return preprocessing


def _three(values: Any, name: str, least: float) -> tuple[float, ...]:
    """One number a colour, which may be given once for all."""
    given = list(values) if isinstance(values, (list, tuple)) else [values] * 3
    if len(given) != 3:
        raise SbpatchError(f"image_{name} has {len(given)} numbers, not one a colour")
    return tuple(real(x, f"image_{name}", least, MOST_MEAN) for x in given)


def _edges(processor: Any, switch: str, key: str) -> tuple[int, ...]:
    """(height, width), or the (shortest edge,), or () where the step is left out or is another one."""
    if not getattr(processor, switch, None):
        return ()
    try:
        size = {edge: pixels for edge, pixels in dict(getattr(processor, key)).items() if pixels is not None}
    except (TypeError, ValueError) as error:
        raise SbpatchError(f"{type(processor).__name__}: its {key} is no size ({one_line(error)})") from None
    if size.keys() == {"height", "width"}:
        return size["height"], size["width"]
    return (size["shortest_edge"],) if size.keys() == {"shortest_edge"} else ()


def crop_share(inner: int, outer: int) -> float:
    """inner / outer, such that `inner / share`, rounded down, is `outer` again."""
    share = inner / outer
    return share if math.floor(inner / share) == outer else math.nextafter(share, 0.0)


def _picture() -> Image.Image:
    """A smooth RGB image, wider than high, different in each corner."""
    picture = Image.new("RGB", (320, 240))
    ramp = Image.linear_gradient("L")
    bands = (ramp.rotate(90), ramp, Image.radial_gradient("L"))
    picture.paste(Image.merge("RGB", [band.resize(picture.size) for band in bands]))
    return picture
