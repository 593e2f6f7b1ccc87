"""What a model of transformers is run on: its image processor or tokenizer, read from its directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ..data.preprocessing import Preprocessing, TextPreprocessing
from ..errors import SbpatchError, one_line
from .image_processors import image_preprocessing
from .weights import LOAD_ERRORS

TOKENS = 2048  # of a text sample, where the user does not say and the model has positions for so many
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def images(model: PreTrainedModel, folder: Path, input_size: int | None) -> tuple[Any, Preprocessing]:
    """The image processor beside a model's weights and the preprocessing that it asks for."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **LOCAL)
    except LOAD_ERRORS as error:
        reason = one_line(error) if (folder / "preprocessor_config.json").exists() else "there is none"
        raise SbpatchError(f"no preprocessor_config.json that says how images are prepared: {reason}") from None
    preprocessing = image_preprocessing(processor)
    if input_size is not None:
        preprocessing = preprocessing.resized(input_size)
    _, height, width = preprocessing.input_size
    if getattr(model.config, "image_size", None) not in (height, [height, width], (height, width)):
        try:
            with torch.inference_mode():
                model(preprocessing.probe())
        except LOAD_ERRORS as error:
            raise SbpatchError(
                f"{type(model).__name__} does not take images of {height} x {width} px: {one_line(error)}"
            ) from None
    return processor, preprocessing


def text(model: PreTrainedModel, folder: Path, tokens: int | None, read: Mapping[str, Any]) -> TextPreprocessing:
    """The tokenizer beside a model's weights, read with the options `read`, and how long a sample is."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **{**LOCAL, **read})
    except LOAD_ERRORS as error:
        raise SbpatchError(f"no tokenizer that can be read: {one_line(error)}") from None
    files = tokenizer.vocab_files_names.values()
    if not read and not any((folder / file).is_file() for file in files):  # transformers makes an empty one then
        raise SbpatchError(f"no tokenizer beside the weights, expected {' or '.join(files)}")
    if tokens is not None:
        check_length(model, tokens)
    return TextPreprocessing(tokenizer, tokens or min(_positions(model) or tokenizer.model_max_length, TOKENS))


def check_length(model: nn.Module, tokens: int) -> None:
    """Refuse texts longer than the model has positions for.

    Raises:
        SbpatchError: they are.
    """
    limit = _positions(model)
    if limit is not None and tokens > limit:
        raise SbpatchError(f"{type(model).__name__} has positions for {limit} tokens, not {tokens}: ask for fewer")


def _positions(model: nn.Module) -> int | None:
    """The most tokens a text may have; None where the model sets no limit."""
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1  # RoBERTa counts positions from the one after padding
    return getattr(model.config, "max_position_embeddings", None)
