"""The Hugging Face hub: what a patched directory says of itself there, how it gets there, and how it is found again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub import constants as hub

from ..data.preprocessing import TextPreprocessing
from ..errors import SbpatchError, one_line
from ..models.checkpoint import Checkpoint
from ..models.load import EMBEDDED, is_hub_id, is_timm_name
from ..models.weights import LOAD_ERRORS, hub_snapshot
from .patch import BASE_FOLDER, TENSORS_FILE, read_plan
from .plan import PLAN_FILE

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TAGS = ("sbpatch", "sparse-attention", "low-rank-attention")
# What an earlier push may have left in the repository, and this one would not replace.
STALE = [TENSORS_FILE, "model*.safetensors", "model.safetensors.index.json", f"{BASE_FOLDER}/*"]


def metadata(checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """What the hub's search goes by: library, tags, task, the base model where it is on the hub, its licence where known."""
    found: dict[str, Any] = {"library_name": "sbpatch", "tags": [*TAGS]}
    if checkpoint is None:
        return found
    found["tags"] = [*TAGS, checkpoint.family]
    found["pipeline_tag"] = _task(checkpoint)
    name = checkpoint.name
    if checkpoint.family == "timm" and is_timm_name(name):
        found["base_model"] = f"timm/{name}"
    elif HUB_ID.fullmatch(name) and not Path(name).exists():
        found["base_model"] = name
    license = checkpoint.config.get("pretrained_cfg", {}).get("license")
    if checkpoint.name in EMBEDDED:
        license = "apache-2.0"  # they are a part of sbpatch
    return found | ({"license": license} if isinstance(license, str) else {})


def _task(checkpoint: Checkpoint) -> str:
    """The hub's name for what the model does."""
    if checkpoint.answer == "features":
        text = isinstance(checkpoint.preprocessing, TextPreprocessing)
        return "feature-extraction" if text else "image-feature-extraction"
    return {"classes": "image-classification", "next-token": "text-generation", "tokens": "fill-mask"}[
        checkpoint.answer
    ]


def front_matter(about: dict[str, Any]) -> str:
    """The YAML that a model card begins with."""
    return f"---\n{ModelCardData(**about).to_yaml()}\n---\n"


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload a model patched by sbpatch",
) -> str:
    """Upload a directory that `calibrate -o` or `finetune -o` wrote; returns the address of the commit.

    The repository is made where there is none. Files of another model that an earlier push left in it are removed, others stay.
    `sbpatch.load(repo_id)` then loads the patched model.

    Args:
        repo_id: `owner/name`.
        private: of a new repository; None: as the owner's settings are.
        token: by default the one that `hf auth login` or $HF_TOKEN gave.
        revision: a branch that exists; None: the main one.

    Raises:
        SbpatchError: the directory is no such one, or the hub refuses it or does not answer.
    """
    path = Path(directory)
    read_plan(path)
    if not HUB_ID.fullmatch(repo_id):
        raise SbpatchError(f"'{repo_id}' is no repository of the hub: give owner/name")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=path, revision=revision, commit_message=message, delete_patterns=STALE
        )
    except LOAD_ERRORS as error:
        raise SbpatchError(f"{directory} is not uploaded: {hub.ENDPOINT}/{repo_id}: {one_line(error)}") from None
    return str(done.commit_url)


def patched(model: str) -> Path | None:
    """The directory with a plan that MODEL names, itself or a copy of the hub's in the cache; None: it has no plan.

    Raises:
        SbpatchError: there is no such repository, or neither the hub nor the cache can give it.
    """
    folder = hub_snapshot(model) if is_hub_id(model) else Path(model)
    return folder if (folder / PLAN_FILE).is_file() else None


def local(directory: str | Path) -> Path:
    """Where a patched directory is; of the hub's `owner/name` its copy in the cache, downloaded if the hub answers.

    Raises:
        SbpatchError: there is no such repository, or neither the hub nor the cache can give it.
    """
    path = Path(directory)
    if isinstance(directory, Path) or path.exists() or not HUB_ID.fullmatch(directory):
        return path
    return hub_snapshot(directory)
