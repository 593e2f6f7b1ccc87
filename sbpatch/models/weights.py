"""Weights files: the tensors in one, their hashes, and the releases that the aliases name."""

from __future__ import annotations

import hashlib
import http.client
import math
import os
import pickle
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants as hub
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

from ..data.hub import CONNECT_SECONDS, hub_or_cache
from ..errors import SbpatchError, one_line
from ..reading import check_regular
from ..writing import PLAN

RELEASE_URL = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main"
# What timm, transformers and torch.load raise for weights that do not fit, damage, and files they cannot get; tokenizers
# raise `Exception` itself.
LOAD_ERRORS = (Exception,)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
PLAIN = {*FLOATING, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# Of a model's repository: configuration, tokenizer and weights in the folder itself, no copies for other frameworks.
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "model.safetensors", "model-*-of-*.safetensors"]
HUB_FILES += ["sbpatch.safetensors"]  # of a patched one
BASE_FILES = [f"base/{name}" for name in HUB_FILES]  # of a fine-tuned one


@dataclass(frozen=True)
class Release:
    """One official softmax T2T-ViT file. `sha256` is None where none is published: then the first download's holds."""

    file: str
    width: int
    depth: int
    sha256: str | None = None


RELEASES = {
    "t2t-vit-14": Release("81.7_T2T_ViTt_14.pth.tar", width=384, depth=14),
    "t2t-vit-19": Release("82.4_T2T_ViTt_19.pth.tar", width=448, depth=19),
    "t2t-vit-24": Release("82.6_T2T_ViTt_24.pth.tar", width=512, depth=24),
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file or of a PyTorch checkpoint (.pth, .pth.tar, .pt, .bin), on the CPU.

    The wrappers that training scripts leave are taken off: the dicts `state_dict_ema`, `state_dict` and `model`, and
    the prefix `module.` on the names. No code in a pickle is run.

    Raises:
        SbpatchError: the file is missing or damaged, needs code to be run, or holds something else than tensors.
    """
    if not path.exists():
        raise SbpatchError(f"no such weights file: {path}")
    check_regular(path)
    safe = path.suffix == ".safetensors"
    try:
        loaded = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if wanted:
            raise SbpatchError(
                f"{path} is a pickle that wants to run {wanted[1]}, which is refused: save its tensors as safetensors"
            ) from None
        reason = "the pickle is broken" if isinstance(error, pickle.UnpicklingError) else one_line(error)
        raise SbpatchError(f"{path} is damaged or not a weights file ({reason}): get it again") from None
    for wrapper in ("state_dict_ema", "state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise SbpatchError(
            f"{path} holds no state dict: expected named tensors, alone or under state_dict_ema, state_dict or model"
        )
    found = {str(key).removeprefix("module."): tensor for key, tensor in loaded.items()}
    check_tensors(found, path)
    return found


def check_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not plain, dense and finite, one pass over each.

    Minus infinity is a number in a mask, by whose name its tensor is known.

    Raises:
        SbpatchError: one is not; the line names it.
    """
    for name, tensor in state.items():
        if wrong := _not_plain(tensor):
            raise SbpatchError(f"{path}: tensor '{name}' is {wrong}: save it as plain floating point or integer values")
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = (float(x) for x in (tensor if tensor.element_size() > 1 else tensor.float()).detach().aminmax())
        if "mask" in name and low == -math.inf and high < math.inf:
            continue
        if not (math.isfinite(low) and math.isfinite(high)):
            value = "NaN" if math.isnan(high) else "an infinite value"
            raise SbpatchError(f"{path}: tensor '{name}' holds {value}: get the file again")


def _not_plain(tensor: Tensor) -> str:
    """What a tensor is that no weight of a model is, or ""."""
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "nested" if tensor.is_nested else f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_complex():
        return "complex"
    if tensor.dtype not in PLAIN:
        return f"of type {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"expanded to {tuple(tensor.shape)} from fewer values"
    return ""


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and values of a state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hub_snapshot(name: str) -> Path:
    """The folder of the Hugging Face model `owner/name` in its cache, downloaded if the hub answers.

    Raises:
        SbpatchError: there is no such model, or neither the hub nor the cache can give it.
    """
    try:
        with hub_or_cache():
            folder = _snapshot(name, HUB_FILES)
            if not [*folder.glob("model*.safetensors*")]:
                folder = _snapshot(name, ["pytorch_model*.bin"])
            if (folder / PLAN).is_file():
                _snapshot(name, BASE_FILES, ignored=None)
    except LocalEntryNotFoundError:
        raise SbpatchError(
            f"{name}: no such directory, no answer from {hub.ENDPOINT}/{name}, and nothing of it in the cache "
            f"{hub.HF_HUB_CACHE}; download it elsewhere and give its directory as MODEL"
        ) from None
    except LOAD_ERRORS as error:
        raise SbpatchError(
            f"{name}: no such directory, and {hub.ENDPOINT}/{name} does not give it ({one_line(error)})"
        ) from None
    return folder


def _snapshot(name: str, files: list[str], ignored: str | None = "*/*") -> Path:
    offline = hub.HF_HUB_OFFLINE
    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=ignored, local_files_only=offline))
    except LocalEntryNotFoundError as error:
        if partial := getattr(error, "snapshot_path", None):
            return Path(partial)  # may be all that is needed: what is missing is said when it is read
        raise


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def released(alias: str, release: Release) -> Path:
    """The file of an alias in the cache, downloaded if it is not there, its SHA-256 checked."""
    path = Path(os.environ.get("SBPATCH_CACHE") or "~/.cache/sbpatch").expanduser() / release.file
    record = path.with_name(path.name + ".sha256")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    timeout = socket.getdefaulttimeout()
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(CONNECT_SECONDS)  # torch's downloader has no timeout of its own
            torch.hub.download_url_to_file(f"{RELEASE_URL}/{release.file}", str(partial))
            read_tensors(partial)  # a connection that closed early leaves a short file and no error
            partial.replace(path)
        found = file_sha256(path)
        if not record.exists():
            record.write_text(found + "\n")
        expected = release.sha256 or record.read_text().strip()
    except (OSError, http.client.HTTPException, SbpatchError) as error:
        raise SbpatchError(
            f"{alias}: no {release.file} in {path.parent}, and none from {RELEASE_URL} ({one_line(error)}): "
            "download it elsewhere and pass --checkpoint FILE"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
        with suppress(OSError):  # mostly: it was never made
            partial.unlink()
    if found != expected:
        raise SbpatchError(
            f"{path} is not what it was: SHA-256 {found}, not {expected}; delete it to download it again"
        )
    return path
