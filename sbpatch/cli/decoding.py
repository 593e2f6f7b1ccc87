"""`sbpatch eval --generate N`: decoding with a cache, exact and patched side by side."""

from __future__ import annotations

from typing import Any

from ..data.preprocessing import TextPreprocessing
from ..data.samples import Samples
from ..errors import SbpatchError
from ..evaluation import Subject
from ..models.checkpoint import Checkpoint
from .flags import progress_bars


def check_decodes(loaded: Checkpoint, what: str) -> None:
    """Refuse what only a model that generates text can do.

    Raises:
        SbpatchError: it does not.
    """
    if loaded.answer != "next-token" or loaded.family != "transformers":
        raise SbpatchError(f"{what} is for causal language models of transformers, and {loaded.name} is none")


def check_generate(loaded: Checkpoint, tokens: int) -> None:
    """Refuse to decode what leaves no prompt before it.

    Raises:
        SbpatchError: it does, or the model does not generate text.
    """
    check_decodes(loaded, "--generate")
    assert isinstance(loaded.preprocessing, TextPreprocessing)
    if tokens >= (whole := loaded.preprocessing.tokens):
        raise SbpatchError(f"--generate {tokens} leaves no prompt in windows of {whole} tokens: see --length")


def decoding_figures(
    subject: Subject, loaded: Checkpoint, data: Samples, tokens: int, result: dict[str, Any], quiet: bool
) -> None:
    """Add to eval's result what decoding the last `tokens` tokens of some windows gives, by variant."""
    from ..evaluation.decoding import WINDOWS, decoding, variants_of  # transformers is slow to import, and there by now

    variants = variants_of(subject, loaded.preprocessing.probe())
    found = decoding(variants, data, tokens, progress=progress_bars(quiet))
    for name, figures in found.items():
        result["variants"].setdefault(name, {}).update(figures)
    result["decoded"] = {"windows": min(WINDOWS, len(data)), "prompt": result["length"] - tokens, "tokens": tokens}
