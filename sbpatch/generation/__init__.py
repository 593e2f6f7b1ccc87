"""Generation with a cache of which a step reads a share."""

from .generate import load, with_compressed_cache

__all__ = ["load", "with_compressed_cache"]
