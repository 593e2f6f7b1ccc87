"""The mathematics: tensors in, tensors out, nothing known of models.

Importing this package fills the registry; a new method is one file here, imported below (see docs/adding-a-method.md).
"""

from . import (
    bigbird,
    clusters,
    coreset,
    favor,
    favor_variants,
    linear,
    longformer,
    lsh,
    pooling,
    random_keys,
    sinks,
    strided,
    top_blocks,
    top_clusters,
    window,
)
from .registry import PARTS, Geometry, parse_method, register
from .scatterbrain import Scatterbrain

__all__ = ["PARTS", "Geometry", "Scatterbrain", "clusters", "favor", "lsh", "parse_method", "register", "window"]
