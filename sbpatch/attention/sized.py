"""A layer from a method's name and a number of entries: for models that are trained with it, and for studies of methods.

Geometry(1024, heads=4, head_dim=32, causal=True)  ->  sized_layer("reformer+favor", that, 128, low_rank=0.25)
"""

from __future__ import annotations

from ..errors import SbpatchError
from .registry import PARTS, Geometry, parse_method
from .scatterbrain import Scatterbrain


def sized_parameters(method: str, site: Geometry, entries: float, low_rank: float = 0.5) -> dict[str, int] | None:
    """Parameters with which `method` stores at most `entries` for one query row, or None where it has none so small.

    Args:
        low_rank: of a method with two parts, the share of the entries that the low-rank one gets.

    Raises:
        SbpatchError: an unknown method.
    """
    sparse, low = parse_method(method)
    shares = {sparse: 1 - low_rank, low: low_rank} if sparse and low else {sparse or low: 1.0}
    found: dict[str, int] = {}
    for name, share in shares.items():
        sized = PARTS[name].sized(entries * share, site) if name else None
        if sized is None:
            return None
        found |= sized
    return found


def sized_layer(method: str, site: Geometry, entries: float, *, low_rank: float = 0.5, seed: int = 0) -> Scatterbrain:
    """The layer of `method` that stores at most `entries` for one query row: q, k, v (B, H, n, d) -> (B, H, n, d).

    It has no weights to train, and passes gradients on to q, k and v; which keys a row reads is not differentiated. What is
    random is drawn from `seed`. On a causal site, an entry that a method spends on a later key is spent in vain.

    Args:
        entries: as `Scatterbrain.stored` counts them.
        low_rank: of a method with two parts, the share of the entries that the low-rank one gets.

    Raises:
        SbpatchError: an unknown method, or one that has no form so small or none for such a site.
    """
    parameters = sized_parameters(method, site, entries, low_rank)
    if parameters is None:
        kind = "causal" if site.causal else "bidirectional"
        raise SbpatchError(
            f"'{method}' cannot work with {entries:g} entries a row at a {kind} site of {site.tokens} keys"
        )
    return Scatterbrain(method, site, seed, **parameters)
