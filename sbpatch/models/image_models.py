"""Image models: T2T-ViT in its own layout, and timm's models by name, by file or from a directory."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
from huggingface_hub import constants as hub
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from ..bounds import TOKENS, whole
from ..data.hub import hub_or_cache
from ..data.preprocessing import Preprocessing, image_size
from ..errors import SbpatchError, one_line
from .checkpoint import Checkpoint
from .sizes import check_arguments, check_room
from .t2t_vit import PATCH, T2TViT, t2t_vit_from_state_dict
from .weights import LOAD_ERRORS, file_sha256, read_tensors, tensors_sha256


def build(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """As `load.build`, for T2T-ViT and timm."""
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


def load_directory(name: str, folder: Path, config: dict[str, Any], input_size: int | None) -> Checkpoint:
    """A directory with timm's `config.json`, or that of a T2T-ViT, and `model.safetensors`."""
    weights = folder / "model.safetensors"
    state = read_tensors(weights)
    if config["architecture"] == "t2t-vit":
        model = cast(T2TViT, build(config, state))
        preprocessing = Preprocessing.from_dict(_pretrained_cfg(config))
        return _t2t_checkpoint(name, model, preprocessing, file_sha256(weights), input_size)
    if input_size is None:
        args = config.get("model_args", {})
        return _timm_checkpoint(name, build(config, state), args, file_sha256(weights), None)
    return _timm_from_tensors(name, config, state, file_sha256(weights), input_size)


def load_t2t_file(name: str, path: Path, input_size: int | None) -> Checkpoint:
    """A file of weights in the layout of T2T-ViT's releases."""
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


def load_timm(name: str, checkpoint: Path | None, input_size: int | None) -> Checkpoint:
    """A model by its timm name, with the published weights or those of a file."""
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
