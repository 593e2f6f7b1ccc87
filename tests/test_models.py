"""Loading models: real weights where they are, tiny generated ones elsewhere, and every refusal as one clear line."""

from __future__ import annotations

import json
import os
import pickle
import random
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants as hub
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from sbpatch.data.preprocessing import Preprocessing
from sbpatch.data.sources import batches, open_images
from sbpatch.errors import SbpatchError
from sbpatch.models import weights
from sbpatch.models.load import DEMO, build, load_checkpoint
from sbpatch.models.t2t_vit import T2TViT, T2TViTConfig
from sbpatch.models.weights import Release, read_tensors, tensors_sha256

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("SBPATCH_SHARED", ROOT.parent / "shared")) / "data"
WEAK = SHARED / "t2t-vit-cifar10-weak.pth.tar"
needs_weak = pytest.mark.skipif(not WEAK.exists(), reason=f"no {WEAK}: set SBPATCH_SHARED")
needs_demo = pytest.mark.skipif(
    not (ROOT / "sbpatch/assets" / DEMO / "model.safetensors").exists(),
    reason="run recipes/train_t2t_vit_demo.py first",
)
TINY = "test_vit.r160_in1k"  # timm's own test model: a real ViT of 370,000 parameters


def line(excinfo: pytest.ExceptionInfo[SbpatchError]) -> str:
    text = str(excinfo.value)
    assert text
    assert "\n" not in text
    assert len(text) < 700
    return text


def refused(*args, **kwargs) -> str:
    """The error line of a load that must fail, and fail in seconds."""
    start = time.monotonic()
    with pytest.raises(SbpatchError) as excinfo:
        load_checkpoint(*args, **kwargs)
    assert time.monotonic() - start < 10
    return line(excinfo)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test reaches the network or the user's caches."""
    monkeypatch.setattr("sbpatch.data.hub.answers", lambda url: False)
    monkeypatch.setattr(weights, "RELEASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SBPATCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def t2t() -> T2TViT:
    torch.manual_seed(0)
    return T2TViT(T2TViTConfig(width=64, depth=2, heads=1, mlp_ratio=2.0, classes=5, input_size=32)).eval()


@pytest.fixture
def t2t_file(t2t, tmp_path) -> Path:
    path = tmp_path / "tiny.pth.tar"
    torch.save({"state_dict_ema": t2t.state_dict()}, path)
    return path


@pytest.fixture
def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=7).eval()


def saved(folder: Path, config: dict, state: dict) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    return str(folder)


# ---- preprocessing


def test_preprocessing_is_the_published_one():
    assert Preprocessing() == Preprocessing(
        (3, 224, 224), "bicubic", 0.9, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "center"
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    # By hand: shorter side to floor(224 / 0.9) = 248, centre crop, [0, 1], normalise.
    resized = image.resize((330, 248), Image.Resampling.BICUBIC).crop((53, 12, 277, 236))
    expected = (np.asarray(resized) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    got = Preprocessing().transform()(image)
    assert got.shape == (3, 224, 224)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.permute(1, 2, 0), expected, atol=1e-5)


def test_preprocessing_survives_json_and_resizing():
    own = Preprocessing((3, 64, 64), "bilinear", 1.0, (0.5,) * 3, (0.25,) * 3, "squash")
    assert Preprocessing.from_dict(json.loads(json.dumps(own.to_dict()))) == own
    assert own.resized(96).input_size == (3, 96, 96)
    assert own.resized(96).transform()(Image.new("RGB", (50, 70))).shape == (3, 96, 96)


@pytest.mark.parametrize("change", [{"mean": None}, {"input_size": [224]}, {"crop_pct": "wide"}])
def test_preprocessing_refuses_nonsense(change):
    with pytest.raises(SbpatchError, match="preprocessing") as excinfo:
        Preprocessing.from_dict({**Preprocessing().to_dict(), **change})
    line(excinfo)
    with pytest.raises(SbpatchError, match="crop_pct"):
        Preprocessing.from_dict({"input_size": [3, 8, 8], "interpolation": "bicubic"})


# ---- T2T-ViT


@needs_weak
def test_weak_t2t_gives_the_logits_of_the_official_code():
    found = load_checkpoint(str(WEAK))
    golden = load_file(SHARED / "t2t-vit-cifar10-weak-golden.safetensors")
    with torch.inference_mode():
        logits = found.model(golden["images"])
    torch.testing.assert_close(logits, golden["logits"], atol=1e-5, rtol=0)
    assert (found.family, found.config["width"], found.config["depth"]) == ("t2t-vit", 192, 5)
    assert found.preprocessing == Preprocessing()
    assert len(found.sha256) == 64


@needs_demo
def test_demo_is_embedded_in_float32():
    found = load_checkpoint(DEMO)
    assert found.classes == 10
    assert not found.model.training
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    assert found.preprocessing.crop_pct == 1.0
    # It was trained on another resampling of the same digits: what `open_images` gives it must do as well.
    images, target = next(batches(open_images("demo", found.preprocessing, limit=24), 24))
    with torch.inference_mode():
        assert (found.model(images).argmax(1) == target).sum() >= 22


def test_saved_directory_rebuilds_the_same_model(t2t, t2t_file, tmp_path):
    first = load_checkpoint(str(t2t_file))
    assert first.preprocessing.input_size == (3, 32, 32)
    again = load_checkpoint(saved(tmp_path / "out", first.config, first.model.state_dict()))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(again.model(images), t2t(images))
        assert torch.equal(build(first.config, t2t.state_dict())(images), t2t(images))
    assert (again.config, again.preprocessing) == (first.config, first.preprocessing)
    # A plan beside the weights changes nothing about the base model.
    (tmp_path / "out/sbpatch.json").write_text("{}")
    assert load_checkpoint(str(tmp_path / "out")).sha256 == again.sha256


def test_half_precision_weights_run_in_float32(t2t, t2t_file, tmp_path):
    config = load_checkpoint(str(t2t_file)).config
    found = load_checkpoint(saved(tmp_path / "half", config, {k: v.half() for k, v in t2t.state_dict().items()}))
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}


def test_input_size_of_t2t(t2t_file, tmp_path):
    found = load_checkpoint(str(t2t_file), input_size=48)
    assert found.preprocessing.input_size == (3, 48, 48)
    assert found.model(torch.randn(1, 3, 48, 48)).shape == (1, 5)
    again = load_checkpoint(saved(tmp_path / "out", found.config, found.model.state_dict()))
    assert again.preprocessing.input_size == (3, 48, 48)
    assert "multiple of 16 px, not 40" in refused(str(t2t_file), input_size=40)
    assert "positive" in refused(str(t2t_file), input_size=-16)


def test_config_and_weights_that_disagree(t2t, t2t_file, tmp_path):
    config = {**load_checkpoint(str(t2t_file)).config, "depth": 3}
    assert "depth 3, but the weights say 2" in refused(saved(tmp_path / "out", config, t2t.state_dict()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "lacks blocks.1.mlp.fc2.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "has unknown extra"),
        (lambda s: s.update({"norm.bias": torch.zeros(3)}), "wrong shape for norm.bias"),
        (lambda s: s.pop("cls_token"), "not a softmax T2T-ViT"),
    ],
)
def test_every_tensor_must_fit(t2t, tmp_path, change, said):
    state = dict(t2t.state_dict())
    change(state)
    path = tmp_path / "odd.pth"
    torch.save(state, path)
    text = refused(str(path))
    assert said in text
    assert str(path) in text


# ---- aliases


def test_alias_without_network_says_what_to_do(tmp_path):
    text = refused("t2t-vit-14")
    assert "81.7_T2T_ViTt_14.pth.tar" in text
    assert str(tmp_path / "cache") in text
    assert "--checkpoint FILE" in text
    assert list((tmp_path / "cache").iterdir()) == []


def test_alias_with_a_checkpoint_of_another_size(t2t_file):
    text = refused("t2t-vit-14", t2t_file)
    assert "width 64 and depth 2" in text
    assert "width 384 and depth 14" in text
    assert "no such weights file" in refused("t2t-vit-19", Path("nowhere.pth.tar"))


def test_alias_downloads_once_and_watches_the_hash(t2t, t2t_file, tmp_path, monkeypatch):
    monkeypatch.setitem(weights.RELEASES, "t2t-vit-14", Release("tiny.pth.tar", width=64, depth=2))
    monkeypatch.setattr(weights, "RELEASE_URL", t2t_file.parent.as_uri())
    first = load_checkpoint("t2t-vit-14")
    cached = tmp_path / "cache/tiny.pth.tar"
    assert sorted(p.name for p in cached.parent.iterdir()) == ["tiny.pth.tar", "tiny.pth.tar.sha256"]
    assert (tmp_path / "cache/tiny.pth.tar.sha256").read_text().strip() == first.sha256
    monkeypatch.setattr(weights, "RELEASE_URL", "http://127.0.0.1:9")
    assert load_checkpoint("t2t-vit-14").sha256 == first.sha256
    torch.save(t2t.state_dict(), cached)  # readable, but another file
    assert "not what it was: SHA-256" in refused("t2t-vit-14")
    torch.save({"state_dict_ema": t2t.state_dict()}, cached)
    monkeypatch.setitem(weights.RELEASES, "t2t-vit-14", Release("tiny.pth.tar", 64, 2, sha256="0" * 64))
    assert "0" * 64 in refused("t2t-vit-14")  # a published hash wins over the recorded one


def test_short_download_is_not_kept(t2t_file, tmp_path, monkeypatch):
    t2t_file.write_bytes(t2t_file.read_bytes()[:5000])
    monkeypatch.setitem(weights.RELEASES, "t2t-vit-14", Release("tiny.pth.tar", width=64, depth=2))
    monkeypatch.setattr(weights, "RELEASE_URL", t2t_file.parent.as_uri())
    assert "damaged" in refused("t2t-vit-14")
    assert list((tmp_path / "cache").iterdir()) == []


# ---- timm


@pytest.mark.parametrize("name", [TINY, f"timm/{TINY}", "test_vit"])
def test_timm_name_with_a_checkpoint(vit, tmp_path, name):
    path = tmp_path / "vit.safetensors"
    save_file(vit.state_dict(), path)
    found = load_checkpoint(name, path)
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(found.model(images), vit(images))
    assert (found.family, found.classes, found.preprocessing.input_size) == ("timm", 7, (3, 160, 160))
    again = load_checkpoint(saved(tmp_path / "out", found.config, found.model.state_dict()))
    with torch.inference_mode():
        assert torch.equal(again.model(images), vit(images))
    assert (again.config["model_args"], again.preprocessing) == (found.config["model_args"], found.preprocessing)


def test_saved_timm_directory_is_one_for_timm_too(vit, tmp_path):
    path = tmp_path / "vit.pth"
    torch.save({"model": {f"module.{k}": v for k, v in vit.state_dict().items()}}, path)
    found = load_checkpoint(TINY, path, input_size=96)
    folder = saved(tmp_path / "out", found.config, found.model.state_dict())
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(theirs(images), found.model(images))
        assert torch.equal(load_checkpoint(folder).model(images), found.model(images))
    assert load_checkpoint(folder, input_size=64).model(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_timm_from_the_hub_cache_without_network(tmp_path):
    model = timm.create_model("test_vit")
    repo = tmp_path / "hub" / f"models--timm--{TINY}"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("a" * 40)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    found = load_checkpoint(TINY)
    assert torch.equal(found.model.head.weight, model.head.weight)
    assert found.sha256 == tensors_sha256(model.state_dict())
    assert not hub.HF_HUB_OFFLINE  # as it was before


def test_timm_without_network_fails_in_seconds(tmp_path):
    text = refused(TINY)
    assert f"https://huggingface.co/timm/{TINY}" in text
    assert str(tmp_path / "hub") in text
    assert "--checkpoint FILE" in text


def test_timm_weights_must_fit(vit, t2t_file, tmp_path):
    state = vit.state_dict()
    del state["norm.bias"]
    torch.save(state, tmp_path / "short.pth")
    text = refused(TINY, tmp_path / "short.pth")
    assert "norm.bias" in text
    assert "short.pth" in text
    config = load_checkpoint(TINY, _whole(vit, tmp_path)).config
    assert "norm.bias" in refused(saved(tmp_path / "out", config, state))
    with pytest.raises(SbpatchError, match="pos_embed"):  # a saved directory is not resampled behind one's back
        build(config, {**vit.state_dict(), "pos_embed": torch.zeros(1, 17, 64)})
    assert "do not fit timm's test_vit" in refused(TINY, t2t_file)


def _whole(vit: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "whole.pth"
    torch.save(vit.state_dict(), path)
    return path


def test_timm_model_without_published_weights():
    assert "no pretrained weights for test_vit4: pass --checkpoint" in refused("test_vit4")


# ---- names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("t2t-vit-15", "did you mean t2t-vit-1"),
        ("vit_base_patch16_38", "vit_base_patch16_384"),
        ("vit_base_patch16_384.augreg_in1", "vit_base_patch16_384.augreg_in1k"),
        ("timm/vit_tinny_patch16_224", "vit_tiny_patch16_224"),
        ("qqq", "known are t2t-vit-14"),
        ("google/vit-base-patch16-224", "huggingface.co/google/vit-base-patch16-224"),
        ("nothing-here.gguf", "no such file or directory"),
        ("./nothing-here", "no such file or directory"),
        ("weights.safetensors", "no such file or directory"),
    ],
)
def test_unknown_names(name, said, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert said in refused(name)


def test_checkpoint_goes_with_a_name_only(t2t_file, tmp_path):
    for name in (str(t2t_file), str(tmp_path), DEMO):
        assert f"give {t2t_file} itself as MODEL" in refused(name, t2t_file)


def test_directories_that_hold_no_model(tmp_path):
    assert "config.json" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}')
    assert "names neither a 'model_type'" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architecture": "test_vit"}')
    assert f"no such weights file: {tmp_path / 'model.safetensors'}" in refused(str(tmp_path))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "pretrained_cfg" in refused(str(tmp_path))


# ---- weights files


class Evil:
    def __reduce__(self):
        return os.system, ("touch sbpatch-was-here",)


def test_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": Evil()}}, "evil.pth")
    text = refused("evil.pth")
    assert "posix.system" in text
    assert "safetensors" in text
    Path("plain.pth").write_bytes(pickle.dumps(Evil()))
    refused("plain.pth")
    assert not Path("sbpatch-was-here").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_give_one_line(tmp_path, kind):
    """Cut anywhere or with bytes changed, a file loads or is refused with a line that names it; nothing else escapes."""
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    state = {"a.weight": torch.randn(4, 3), "b": torch.randn(2)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict_ema": state}, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    assert read_tensors(path).keys() == state.keys()
    rng = random.Random(0)
    cuts = [whole[: len(whole) * i // 60] for i in range(60)]
    flips = []
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        flips.append(bytes(damaged))
    for i, data in enumerate(cuts + flips):
        path.write_bytes(data)
        if i < len(cuts):
            with pytest.raises(SbpatchError, match=path.name) as excinfo:
                read_tensors(path)
            line(excinfo)
        else:
            with suppress(SbpatchError):  # a changed value in a tensor cannot be told
                read_tensors(path)


@pytest.mark.parametrize("content", [[], {}, {"epoch": 3}, {"state_dict": {}}, torch.zeros(3)])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(SbpatchError, match="holds no state dict") as excinfo:
        read_tensors(tmp_path / "x.pth")
    line(excinfo)


def test_tensor_hash_sees_values_names_and_shapes():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)}
    same = dict(reversed({k: v.clone() for k, v in state.items()}.items()))
    assert tensors_sha256(state) == tensors_sha256(same)
    for other in (
        {**state, "a": state["a"].view(3, 2)},
        {**state, "b": torch.tensor(2)},
        {"c": state["a"], "b": state["b"]},
    ):
        assert tensors_sha256(other) != tensors_sha256(state)
