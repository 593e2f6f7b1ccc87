"""Local attention: sites where a token reads its neighbours alone, by their mask or by what the module says of itself.

Such a site reads few keys as it is, and a patch has nothing to save there: it stays exact. At sequences no longer than its
window it is a site as any other.
"""

from __future__ import annotations

from torch import nn


def declared_reach(module: nn.Module) -> int | None:
    """How far tokens read by the settings of an attention module of transformers, their own counted; None where all the way.

    A mask says this better, and says nothing while the sequence is shorter.
    """
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    found = getattr(config, "sliding_window", None)  # of all layers: Mistral, Phi-3
    if hasattr(module, "sliding_window"):
        found = module.sliding_window
    elif kinds and isinstance(layer, int) and layer < len(kinds):
        names = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
        found = getattr(config, names.get(kinds[layer], ""), None)
    return found if type(found) is int and found > 0 else None


def reason(reach: int, tokens: int, causal: bool) -> str:
    """Why a site stays exact where tokens read less far than the sequence is long."""
    keys = f"the last {reach} tokens, its own among them" if causal else f"the {reach - 1} tokens on either side of it"
    return f"local attention: of {tokens} tokens, each reads at most {keys}"
