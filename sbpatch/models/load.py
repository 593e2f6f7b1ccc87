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
from typing import Any, cast

import timm
from huggingface_hub import constants as hub
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from ..bounds import TOKENS, whole
from ..data.hub import hub_or_cache
from ..data.preprocessing import Preprocessing, image_size
from ..errors import SbpatchError, one_line
from ..reading import check_folder, read_json
from .checkpoint import Checkpoint
from .sizes import check_arguments, check_room
from .t2t_vit import PATCH, T2TViT, t2t_vit_from_state_dict
from .weights import LOAD_ERRORS, RELEASES, file_sha256, hub_snapshot, read_tensors, released, tensors_sha256

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
        found = _load_t2t_file(name, checkpoint or released(name, release), input_size)
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
        load = _transformers().load_gguf if path.suffix == ".gguf" else _load_t2t_file
        return load(name, path, input_size)
    if timm.is_model(timm_name.partition(".")[0]):
        return _load_timm(timm_name, checkpoint, input_size)
    if name.startswith((".", "~", "/")) or path.suffix in WEIGHTS_SUFFIXES:
        raise SbpatchError(f"no such file or directory: {name}")
    if is_hub_id(name):
        if checkpoint is not None:
            raise SbpatchError(f"--checkpoint goes with an alias or a timm name: give a directory in place of {name}")
        return _load_directory(name, hub_snapshot(name), input_size)
    near = difflib.get_close_matches(timm_name, [*RELEASES, *EMBEDDED, *timm.list_models()], n=3)
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
    if config.get("architecture") == "t2t-vit":
        model = t2t_vit_from_state_dict(state)
        for key, value in model.config.to_dict().items():
            if config.get(key) != value:
                raise SbpatchError(f"config.json says {key} {config.get(key)}, but the weights say {value}")
        return model
    args = {"num_classes": _classes(config), **check_arguments(config, state)}
    check_room(lambda: timm.create_model(config["architecture"], **args), state)
    try:
        rebuilt: nn.Module = timm.create_model(config["architecture"], pretrained_cfg=_pretrained_cfg(config), **args)
        rebuilt.load_state_dict(state)
    except LOAD_ERRORS as error:
        raise SbpatchError(f"the weights do not fit timm's {config.get('architecture')}: {one_line(error)}") from None
    return rebuilt.float().eval()


def _load_t2t_file(name: str, path: Path, input_size: int | None) -> Checkpoint:
    state = read_tensors(path)
    try:
        model = t2t_vit_from_state_dict(state)
    except SbpatchError as error:
        raise SbpatchError(f"{path}: {error}; a timm model's file goes with its name: NAME --checkpoint FILE") from None
    return _t2t_checkpoint(name, model, Preprocessing().resized(model.config.input_size), file_sha256(path), input_size)


def _t2t_checkpoint(
    name: str, model: T2TViT, preprocessing: Preprocessing, sha256: str, input_size: int | None
) -> Checkpoint:
    if input_size is not None:
        if input_size % PATCH:
            raise SbpatchError(f"T2T-ViT takes an input size that is a multiple of {PATCH} px, not {input_size}")
        preprocessing = preprocessing.resized(input_size)
    config = {"architecture": "t2t-vit", **model.config.to_dict(), "pretrained_cfg": preprocessing.to_dict()}
    return Checkpoint(name, model, "t2t-vit", config, preprocessing, sha256)


def _load_directory(name: str, folder: Path, input_size: int | None) -> Checkpoint:
    if not (folder / "config.json").exists() and len(files := [*folder.glob("*.gguf")]) == 1:
        return _transformers().load_gguf(name, files[0], input_size)
    check_folder(folder)
    weights = folder / "model.safetensors"
    if not (folder / "config.json").exists():
        raise SbpatchError(f"{folder} is no model directory: it has no config.json")
    config = read_json(folder / "config.json", "configuration of a model")
    if isinstance(config, dict) and isinstance(config.get("model_type"), str):
        return _transformers().load_directory(name, folder, config, input_size)
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise SbpatchError(
            f"{folder / 'config.json'} names neither a 'model_type' (transformers) nor an 'architecture' (timm, T2T-ViT)"
        )
    state = read_tensors(weights)
    try:
        if config["architecture"] == "t2t-vit":
            model = cast(T2TViT, build(config, state))
            preprocessing = Preprocessing.from_dict(_pretrained_cfg(config))
            return _t2t_checkpoint(name, model, preprocessing, file_sha256(weights), input_size)
        if input_size is None:
            return _timm_checkpoint(
                name, build(config, state), config.get("model_args", {}), file_sha256(weights), None
            )
        return _timm_from_tensors(name, config, state, file_sha256(weights), input_size)
    except SbpatchError as error:
        raise SbpatchError(f"{folder}: {error}") from None


def _transformers() -> ModuleType:
    from . import transformers_models  # slow to import, and only such models need it

    return transformers_models


def _load_timm(name: str, checkpoint: Path | None, input_size: int | None) -> Checkpoint:
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        near = difflib.get_close_matches(name, tags, n=3, cutoff=0.0) or [name.partition(".")[0]]
        raise SbpatchError(f"unknown model '{name}': did you mean {' or '.join(near)}?") from None
    if checkpoint is not None:
        config = {"architecture": name.partition(".")[0], "pretrained_cfg": cfg.to_dict() if cfg else {}}
        try:
            return _timm_from_tensors(name, config, read_tensors(checkpoint), file_sha256(checkpoint), input_size)
        except SbpatchError as error:
            raise SbpatchError(f"{checkpoint}: {error}") from None
    if cfg is None or not cfg.has_weights:
        raise SbpatchError(f"timm has no pretrained weights for {name}: pass --checkpoint FILE")
    args: dict[str, Any] = {"img_size": input_size} if input_size and cfg.fixed_input_size else {}
    try:
        with hub_or_cache():
            model: nn.Module = timm.create_model(name, pretrained=True, **args)
    except LOAD_ERRORS as error:
        raise SbpatchError(
            f"{name}: cannot load it from {hub.ENDPOINT}/{cfg.hf_hub_id or ''} or its cache {hub.HF_HUB_CACHE} "
            f"({one_line(error)}); download it elsewhere and pass --checkpoint FILE"
        ) from None
    return _timm_checkpoint(name, model, args, tensors_sha256(model.state_dict()), input_size)


def _timm_from_tensors(
    name: str, config: Mapping[str, Any], state: dict[str, Tensor], sha256: str, input_size: int | None
) -> Checkpoint:
    """Through timm's own loader, which renames old layouts and resamples position tables, and loads strictly."""
    cfg = {k: v for k, v in _pretrained_cfg(config).items() if k not in ("file", "hf_hub_id", "url", "source")}
    args = check_arguments(config, state)
    if input_size and cfg.get("fixed_input_size"):
        args["img_size"] = input_size
    head = state.get(f"{cfg.get('classifier')}.weight")
    classes = head.shape[0] if head is not None else config.get("num_classes", cfg.get("num_classes"))
    overlay = {"state_dict": state, "custom_load": False, "num_classes": classes}
    try:
        model: nn.Module = timm.create_model(
            config["architecture"],
            pretrained=True,
            pretrained_cfg=cfg,
            pretrained_cfg_overlay=overlay,
            num_classes=classes,
            **args,
        )
    except LOAD_ERRORS as error:
        raise SbpatchError(f"the weights do not fit timm's {config['architecture']}: {one_line(error)}") from None
    return _timm_checkpoint(name, model, args, sha256, input_size)


def _timm_checkpoint(
    name: str, model: nn.Module, args: Mapping[str, Any], sha256: str, input_size: int | None
) -> Checkpoint:
    cfg: dict[str, Any] = {k: v for k, v in model.pretrained_cfg.items() if k != "state_dict"}  # type: ignore[union-attr, operator]
    preprocessing = Preprocessing.from_dict(resolve_data_config(pretrained_cfg=cfg))
    if input_size is not None:
        preprocessing = preprocessing.resized(input_size)
    config = {
        "architecture": cfg["architecture"],
        "num_classes": model.num_classes,
        "pretrained_cfg": {**cfg, **preprocessing.to_dict()},
        "model_args": dict(args),
    }
    return Checkpoint(name, model.float().eval(), "timm", config, preprocessing, sha256)


def _classes(config: Mapping[str, Any]) -> int | None:
    value = config.get("num_classes")
    return None if value is None else whole(value, "config.json: num_classes", 0, TOKENS)


def _pretrained_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    cfg = config.get("pretrained_cfg")
    if not isinstance(cfg, Mapping):
        raise SbpatchError("config.json without a 'pretrained_cfg': it does not say how images are prepared")
    if "input_size" in cfg:
        image_size(cfg["input_size"])
    return dict(cfg)
