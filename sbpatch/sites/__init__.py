"""Attention sites: found in a model, their calls caught, what they compute swapped, and how far two answers are apart."""

from .calls import Call
from .find import Site, find_sites
from .swap import swapped

__all__ = ["Call", "Site", "find_sites", "swapped"]
