"""The mathematics: tensors in, tensors out, nothing known of models.

Importing this package fills the registry; a new method is one file here, imported below (see docs/adding-a-method.md).
"""

from . import (  # noqa: F401  each registers its parts
    bigbird,
    blocks,
    clusters,
    coreset,
    favor,
    favor_variants,
    hyperattention,
    kdeformer,
    leverage,
    linear,
    local,
    longformer,
    lsh,
    monarch,
    nystromformer,
    pages,
    pooling,
    random_keys,
    reformer,
    sinks,
    strided,
    thinformer,
    top_blocks,
    top_clusters,
    topk,
    wildcat,
    window,
)
from .lp import LpAttention
from .registry import PARTS, Geometry, parse_method, register
from .scatterbrain import Scatterbrain, check_parameters
from .sized import sized_layer, sized_parameters

__all__ = [
    "PARTS",
    "Geometry",
    "LpAttention",
    "Scatterbrain",
    "check_parameters",
    "parse_method",
    "register",
    "sized_layer",
    "sized_parameters",
]
