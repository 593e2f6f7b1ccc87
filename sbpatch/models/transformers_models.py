"""Hugging Face transformers: a directory or a GGUF file -> model and preprocessing, and back to a directory.

Models are instances of transformers' own classes, filled strictly; code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import inspect
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from ..data.preprocessing import AudioPreprocessing, Preprocessing, TextPreprocessing
from ..errors import SbpatchError, one_line
from .checkpoint import Answer, Checkpoint
from .sizes import check_config, check_room
from .transformers_inputs import LOCAL, images, text
from .weights import LOAD_ERRORS, check_tensors, file_sha256, read_tensors, tensors_sha256

# Heads of pretraining that many files hold beside a class without a place for them (bert-base-uncased, roberta-base).
LEFT_OVER = re.compile(r"(^|\.)pooler\.|^cls\.seq_relationship\.")
# Settings of sampling: without effect where a model does not sample, and transformers refuses to save them there.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class Part:
    """The part of a larger model that is taken: its class, where its configuration is, and the names of its tensors."""

    class_name: str
    prefix: tuple[str, ...]
    strip: bool = False  # of the prefix
    config: str | None = None


PARTS = {
    "CLIPModel": Part("CLIPVisionModel", ("vision_model.",), config="vision_config"),
    "SiglipModel": Part("SiglipVisionModel", ("vision_model.",), config="vision_config"),
    # The pretraining model hides three quarters of the image, drawn anew each time. Its encoder is a plain ViT.
    "ViTMAEForPreTraining": Part("ViTModel", ("vit.",), strip=True),
    "ViTMAEModel": Part("ViTModel", ("",)),
    "T5ForConditionalGeneration": Part("T5EncoderModel", ("shared.", "encoder.")),
    "T5Model": Part("T5EncoderModel", ("shared.", "encoder.")),
    "WhisperForConditionalGeneration": Part("WhisperEncoder", ("model.encoder.",), strip=True),
    "WhisperModel": Part("WhisperEncoder", ("encoder.",), strip=True),
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports and progress bars: what is wrong is said by our own errors."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # its GGUF reader has a bar that no setting turns off
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# -- loading ---------------------------------------------------------------------------------------------------------


@_quiet()
def load_directory(name: str, folder: Path, config: Mapping[str, Any], input_size: int | None) -> Checkpoint:
    """The model of a directory in Hugging Face layout, whose `config.json` holds `config`.

    `input_size`: pixels a side, or tokens of a text, where it is not to be the model's own.

    Raises:
        SbpatchError: a file is missing or damaged, the model is of no known class, or a tensor does not fit.
    """
    files = _weights_files(folder)
    state = {key: tensor for file in files for key, tensor in read_tensors(file).items()}
    sha256 = file_sha256(files[0]) if len(files) == 1 else tensors_sha256(state)
    try:
        model = build(config, state)
        if model.can_generate() and (folder / "generation_config.json").is_file():
            model.generation_config = _generation_config(folder)
        return _checkpoint(name, model, folder, sha256, input_size, {})
    except SbpatchError as error:
        raise SbpatchError(f"{folder}: {error}") from None


@_quiet()
def load_gguf(name: str, file: Path, input_size: int | None) -> Checkpoint:
    """The causal language model in a GGUF file, its quantised weights as float32.

    Raises:
        SbpatchError: the extra `gguf` is not installed, or the file is damaged or holds another kind of model.
    """
    if find_spec("gguf") is None:
        raise SbpatchError(f"{file}: GGUF files need the extra 'gguf': pip install 'sbpatch[gguf]'")
    read: dict[str, Any] = {"gguf_file": file.name, **LOCAL}
    try:
        config = transformers.AutoConfig.from_pretrained(file.parent, **read)
        cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if cls is None:
            raise SbpatchError(f"it holds a {config.model_type}, not a causal language model")
        loaded = cls.from_pretrained(file.parent, config=config, dtype=torch.float32, **read)
        values = loaded.config.to_dict() | {"architectures": [cls.__name__]}
        values.pop("quantization_config", None)  # the weights are not quantised any more
        state = loaded.state_dict()
        check_tensors(state, file)
        return _checkpoint(name, build(values, state), file.parent, file_sha256(file), input_size, read)
    except LOAD_ERRORS as error:
        raise SbpatchError(f"{file} is damaged or no GGUF file that transformers reads ({one_line(error)})") from None


@_quiet()
def build(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model from the values of its `config.json` and its tensors; evaluation mode, float32, on the CPU.

    Raises:
        SbpatchError: the class is unknown or has attention of its own, or a tensor is missing, left over or of another shape.
    """
    check_config(config, state)
    own = _config(config)
    cls = _class(own)
    if part := PARTS.get(cls.__name__):
        cls, own, state = _taken(part, own, state)
    elif own.is_encoder_decoder and cls.__name__ not in {part.class_name for part in PARTS.values()}:
        raise SbpatchError(
            f"{cls.__name__} is an encoder-decoder: of these, only the encoders of T5 and Whisper are taken"
        )
    if not cls._supports_sdpa:
        raise SbpatchError(
            f"transformers' {cls.__name__} does not call scaled_dot_product_attention: nothing to patch in it"
        )
    own.architectures = [cls.__name__]
    check_room(lambda: cls(own), state)
    extra: dict[str, Any] = {}
    if "add_pooling_layer" in inspect.signature(cls).parameters and not any("pooler." in key for key in state):
        extra["add_pooling_layer"] = False  # else it would be there, filled with random numbers
    try:
        model, info = cls.from_pretrained(
            None, config=own, state_dict=dict(state), dtype=torch.float32, attn_implementation="sdpa",
            ignore_mismatched_sizes=True, output_loading_info=True, **extra,
        )  # fmt: skip
    except LOAD_ERRORS as error:
        raise SbpatchError(f"the weights do not fit transformers' {cls.__name__}: {one_line(error)}") from None
    odd = [f"no {key}" for key in sorted(info["missing_keys"])]
    odd += [f"{key} of shape {tuple(a)}, not {tuple(b)}" for key, a, b in sorted(info["mismatched_keys"])]
    odd += [f"an unknown {key}" for key in sorted(info["unexpected_keys"]) if not LEFT_OVER.search(key)]
    odd += info["error_msgs"]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise SbpatchError(f"the weights do not fit transformers' {cls.__name__}: they have {odd[0]}{more}")
    return model.eval()


def _config(values: Mapping[str, Any]) -> PreTrainedConfig:
    kind = str(values["model_type"])
    if kind not in transformers.CONFIG_MAPPING:
        own_code = "; the code that comes with it is not run" if "auto_map" in values else ""
        raise SbpatchError(f"transformers {transformers.__version__} has no model type '{kind}'{own_code}")
    if "quantization_config" in values:
        method = dict(values["quantization_config"]).get("quant_method", "an unknown method")
        raise SbpatchError(
            f"its weights are quantised ({method}): give the model in float16, bfloat16 or float32, or a GGUF"
        )
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(dict(values))
    except LOAD_ERRORS as error:
        raise SbpatchError(f"config.json is no valid {kind} configuration: {one_line(error)}") from None


def _class(config: PreTrainedConfig) -> Any:
    """The class that config.json names, if it is one of transformers; else the bare model of that type."""
    bare: Any = MODEL_MAPPING.get(type(config), None)
    wanted = (config.architectures or [""])[0]
    for place in (transformers, sys.modules.get(getattr(bare, "__module__", ""))):
        found = getattr(place, wanted, None) if wanted else None
        if inspect.isclass(found) and issubclass(found, PreTrainedModel):
            return found
    if not (inspect.isclass(bare) and issubclass(bare, PreTrainedModel)):
        raise SbpatchError(f"transformers has no class '{wanted}' and no bare model for type '{config.model_type}'")
    return bare


def _taken(
    part: Part, config: PreTrainedConfig, state: Mapping[str, Tensor]
) -> tuple[Any, PreTrainedConfig, dict[str, Tensor]]:
    """The class, configuration and tensors of a part of a larger model."""
    if part.config:
        config = getattr(config, part.config)
    config.architectures = [part.class_name]
    cls = _class(config)
    if not isinstance(config, cls.config_class):
        known = cls.config_class().to_dict().keys() - {"model_type", "transformers_version"}
        config = cls.config_class(**{key: value for key, value in config.to_dict().items() if key in known})
    taken = {key: tensor for key, tensor in state.items() if key.startswith(part.prefix)}
    if part.strip:
        taken = {key.removeprefix(part.prefix[0]): tensor for key, tensor in taken.items()}
    return cls, config, taken


def _weights_files(folder: Path) -> list[Path]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return [folder / whole]
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                return [folder / Path(shard).name for shard in shards]
            except LOAD_ERRORS as error:
                raise SbpatchError(f"{index} is damaged ({one_line(error)}): get it again") from None
    raise SbpatchError(f"{folder}: no weights in it, neither model.safetensors nor pytorch_model.bin, whole or sharded")


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except LOAD_ERRORS as error:
        raise SbpatchError(f"generation_config.json is damaged ({one_line(error)})") from None
    if not config.do_sample:
        for name in SAMPLING:
            setattr(config, name, None)
    return config


# -- preprocessing ---------------------------------------------------------------------------------------------------


def _checkpoint(
    name: str, model: PreTrainedModel, folder: Path, sha256: str, input_size: int | None, read: Mapping[str, Any]
) -> Checkpoint:
    config = json.loads(model.config.to_json_string())
    preprocessing: Preprocessing | TextPreprocessing
    if model.main_input_name == "pixel_values":
        processor, preprocessing = images(model, folder, input_size)
    elif model.main_input_name == "input_ids":
        preprocessing = text(model, folder, input_size, read)
        processor = preprocessing.tokenizer
    elif model.main_input_name == "input_features" and hasattr(model.config, "max_source_positions"):
        if input_size is not None:
            raise SbpatchError(f"{type(model).__name__} takes spectrograms of one size: leave --input-size out")
        # Its second convolution halves the frames.
        size = (1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        processor, preprocessing = None, AudioPreprocessing(size)
    else:
        raise SbpatchError(
            f"{type(model).__name__} takes {model.main_input_name}: neither images, text nor spectrograms"
        )
    answer = _answer(type(model).__name__)
    return Checkpoint(name, model, "transformers", config, preprocessing, sha256, answer, processor)


def _answer(class_name: str) -> Answer:
    if "ForImageClassification" in class_name:
        return "classes"
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "next-token"
    return "tokens" if class_name.endswith("ForMaskedLM") else "features"


# -- saving ----------------------------------------------------------------------------------------------------------


@_quiet()
def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the model and its tokenizer or image processor as plain transformers load them; tied weights once."""
    assert isinstance(checkpoint.model, PreTrainedModel)
    checkpoint.model.save_pretrained(folder)
    if checkpoint.processor is not None:
        checkpoint.processor.save_pretrained(folder)
