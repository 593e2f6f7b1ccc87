"""A folder with tiny models of every family, images, texts and a patched directory, made once and copied for each test."""

from __future__ import annotations

import multiprocessing
import shutil
from io import BytesIO
from pathlib import Path

import pytest
import torch
from cases import command
from PIL import Image
from safetensors.torch import save_file
from tiny import t2t, vit
from tiny_text import bert, llama, prose, words

QUICK = ["--samples", "3", "--budget", "0.2", "--data", "images", "--quiet", "--keep-slow", "--method", "clusters"]


def jpeg(level: int) -> bytes:
    file = BytesIO()
    Image.radial_gradient("L").resize((80, 64)).point(lambda v: (v + level) % 256).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def timm_directory(folder: Path) -> None:
    """As timm's own `save_for_hf` lays it out."""
    model = vit(num_classes=5)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(
        '{"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": {"img_size": 64, "depth": 2},'
        ' "pretrained_cfg": {"input_size": [3, 64, 64], "interpolation": "bicubic", "crop_pct": 0.9,'
        ' "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_mode": "center", "num_classes": 5,'
        ' "architecture": "vit_tiny_patch16_224", "classifier": "head", "first_conv": "patch_embed.proj"}}'
    )


def transformers_vit(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **shape)).eval().save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    torch.save({"state_dict_ema": t2t(classes=2).state_dict()}, place / "tiny.pth")
    for i in range(6):
        (place / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (place / "images" / "ab"[i % 2] / f"{i}.jpg").write_bytes(jpeg(25 * i))
    for name, model in (("llama", llama()), ("bert", bert())):
        model.save_pretrained(place / name)
        words(name == "llama").save_pretrained(place / name)
    (place / "text.txt").write_text(prose(12))
    timm_directory(place / "timm")
    transformers_vit(place / "vit")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert command("calibrate", "tiny.pth", "-o", "out", *QUICK) == 0
    return place


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with nothing in it, for what is refused before anything is read."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder to work in; nothing reaches a network."""
    shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr("sbpatch.data.hub.answers", lambda url: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    return tmp_path / "place"


@pytest.fixture
def forked_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of eval's variants are forked from the tests, so that nothing is imported again."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr("sbpatch.evaluation.workers.multiprocessing.get_context", lambda kind: fork)
