"""What the attention of a model stores, by the budget's accounting, and which variants a machine has the memory for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..models.checkpoint import Checkpoint
from ..plan.plan import SitePlan
from ..sites.find import find_sites
from .variants import VARIANTS, Subject

EAGER_BYTES = 4 << 30  # the attention matrix of one site and batch, above which eager is left out: it holds several


def affordable(sites: Sequence[SitePlan], tokens: int | None, batch_size: int, dtype: str) -> list[str]:
    """The variants, without eager where the attention matrix of one site would take more than `EAGER_BYTES`.

    Args:
        tokens: of a text; where None, the sites say how many theirs are.
    """
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    pairs = (site.heads * (site.queries or tokens or site.tokens) * (tokens or site.tokens) for site in sites)
    largest = max(pairs, default=0) * batch_size * size
    return [name for name in VARIANTS if name != "eager" or largest <= EAGER_BYTES]


def exact_sites(checkpoint: Checkpoint) -> list[SitePlan]:
    """The sites of an unpatched model."""
    found = find_sites(checkpoint.model, checkpoint.preprocessing.probe())
    return [SitePlan.of(site, "exact", "not patched") for site in found]


def at_length(sites: Sequence[SitePlan], tokens: int) -> list[SitePlan]:
    """The sites at another length, where causal ones store the same share, and those that are local there are exact."""
    found = [site.model_copy(update={"tokens": tokens}) for site in sites]
    return [site.model_copy(update={"decision": "exact"}) if site.local else site for site in found]


def attention_memory_bytes(sites: Sequence[SitePlan], variant: str, subject: Subject) -> int:
    """Bytes that the attention of all sites stores for one sample, by the budget's accounting.

    Eager attention stores every entry; SDPA one number a row (its running sum), the patched sites what their budget says.
    In the patched model the exact sites run through SDPA.
    """
    size = torch.empty(0, dtype=getattr(torch, subject.dtype)).element_size()
    entries = 0.0
    for site in sites:
        if variant == "eager":
            entries += site.entries
        elif variant in VARIANTS[2:] and site.decision == "patch":
            entries += site.stored
        else:
            entries += site.heads * site.geometry.rows
    return round(entries * size)
