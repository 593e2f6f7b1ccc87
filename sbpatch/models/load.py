"""Models: an alias, a path, a timm name or a Hugging Face id -> a pretrained model and the preprocessing it expects.

Weights are read as data only (safetensors, or pickles under `weights_only=True`) and loaded strictly: every tensor of
the file is used and every tensor of the model is filled, or there is an error that says which one is not.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..errors import SbpatchError
from ..reading import check_folder, read_json
from .checkpoint import Checkpoint
from .weights import RELEASES, hub_snapshot, released

DEMO = "t2t-vit-demo"
EMBEDDED = (DEMO, "t2t-vit-cifar10")  # trained by recipes/train_*.py, in assets/
WEIGHTS_SUFFIXES = {".tar", ".pth", ".pt", ".bin", ".safetensors", ".gguf"}


def load_checkpoint(name: str, checkpoint: Path | None = None, input_size: int | None = None) -> Checkpoint:
    """Load a pretrained model by name.

    Args:
        name: an alias (`t2t-vit-14`, `-19`, `-24`: downloaded once to $SBPATCH_CACHE or ~/.cache/sbpatch;
            `t2t-vit-demo`: embedded), a directory with `config.json` and weights, a T2T-ViT checkpoint or GGUF file, a
            timm name, with `timm/` in front or not, or a Hugging Face id `owner/name`.
        checkpoint: a weights file to use in place of the published one; with an alias or a timm name only.
        input_size: pixels a side, or tokens of a text, where it is not to be the model's own.

    Raises:
        SbpatchError: the name is unknown, or the weights cannot be found, read or fitted.
    """
    path = Path(os.path.expanduser(name))
    timm_name = name.removeprefix("timm/")
    if input_size is not None and input_size < 1:
        raise SbpatchError(f"an input size of {input_size}: it must be positive")
    if name in RELEASES:
        release = RELEASES[name]
        found = _images().load_t2t_file(name, checkpoint or released(name, release), input_size)
        width, depth = found.config["width"], found.config["depth"]
        if (width, depth) != (release.width, release.depth):
            raise SbpatchError(
                f"{checkpoint} holds a T2T-ViT of width {width} and depth {depth}, but {name} has width "
                f"{release.width} and depth {release.depth}: give the file itself as MODEL"
            )
        return found
    if checkpoint is not None and (name in EMBEDDED or path.exists()):
        raise SbpatchError(f"{name} has its own weights: give {checkpoint} itself as MODEL, or an alias or a timm name")
    if name in EMBEDDED:
        return _load_directory(name, Path(__file__).parents[1] / "assets" / name, input_size)
    if path.is_dir():
        return _load_directory(name, path, input_size)
    if path.is_file():
        load = _transformers().load_gguf if path.suffix == ".gguf" else _images().load_t2t_file
        return load(name, path, input_size)
    if is_timm_name(timm_name):
        return _images().load_timm(timm_name, checkpoint, input_size)
    if name.startswith((".", "~", "/")) or path.suffix in WEIGHTS_SUFFIXES:
        raise SbpatchError(f"no such file or directory: {name}")
    if is_hub_id(name):
        if checkpoint is not None:
            raise SbpatchError(f"--checkpoint goes with an alias or a timm name: give a directory in place of {name}")
        return _load_directory(name, hub_snapshot(name), input_size)
    near = difflib.get_close_matches(timm_name, [*RELEASES, *EMBEDDED, *_timm().list_models()], n=3)
    known = f"known are {', '.join((*RELEASES, *EMBEDDED))}, timm names, paths and Hugging Face ids owner/name"
    raise SbpatchError(f"unknown model '{name}': " + (f"did you mean {' or '.join(near)}?" if near else known))


def is_hub_id(name: str) -> bool:
    """Whether a name is Hugging Face's `owner/name`, and neither a path nor a timm name."""
    path = Path(os.path.expanduser(name))
    if name.count("/") != 1 or name.startswith((".", "~", "/", "timm/")):
        return False
    return path.suffix not in WEIGHTS_SUFFIXES and not path.exists()


def build(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """Rebuild a model from the `config` of its Checkpoint and its tensors; evaluation mode, float32, on the CPU.

    Raises:
        SbpatchError: the configuration is not of a known kind, or a tensor is missing, left over or of another shape.
    """
    if "model_type" in config:
        return _transformers().build(config, state)
    return _images().build(config, state)


def _load_directory(name: str, folder: Path, input_size: int | None) -> Checkpoint:
    if not (folder / "config.json").exists() and len(files := [*folder.glob("*.gguf")]) == 1:
        return _transformers().load_gguf(name, files[0], input_size)
    check_folder(folder)
    if not (folder / "config.json").exists():
        raise SbpatchError(f"{folder} is no model directory: it has no config.json")
    config = read_json(folder / "config.json", "configuration of a model")
    if isinstance(config, dict) and isinstance(config.get("model_type"), str):
        return _transformers().load_directory(name, folder, config, input_size)
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise SbpatchError(
            f"{folder / 'config.json'} names neither a 'model_type' (transformers) nor an 'architecture' (timm, T2T-ViT)"
        )
    try:
        return _images().load_directory(name, folder, config, input_size)
    except SbpatchError as error:
        raise SbpatchError(f"{folder}: {error}") from None


def is_timm_name(name: str) -> bool:
    """Whether timm has the architecture that a name such as `vit_base_patch16_384.augreg_in1k` begins with."""
    return bool(_timm().is_model(name.partition(".")[0]))


# These are slow to import, and no model needs all of them.


def _timm() -> ModuleType:
    import timm

    return timm


def _images() -> ModuleType:
    from . import image_models

    return image_models


def _transformers() -> ModuleType:
    from . import transformers_models

    return transformers_models
