"""What models are run on: images, texts and batches of them, with the preprocessing that a model expects."""

from .batch import Inputs
from .loading import batches
from .preprocessing import Preprocessing, TextPreprocessing
from .samples import Samples
from .sources import open_images, sample_images
from .texts import open_text

__all__ = [
    "Inputs",
    "Preprocessing",
    "Samples",
    "TextPreprocessing",
    "batches",
    "open_images",
    "open_text",
    "sample_images",
]
