"""Exported files: images or named tokens in, any number of samples, the patched model's answers out, or one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from tiny import checkpoint_of, command, plan_for, refused, t2t, vit
from transformers_coverage import FAMILIES, plan_on

import sbpatch
from sbpatch.data.batch import Inputs, moved, run, samples
from sbpatch.evaluation.export import Format, beside_exact, export
from sbpatch.models.load import load_checkpoint
from sbpatch.plan import artifact


def texts(tokens: int, count: int = 3, fewer: int = 3) -> dict[str, torch.Tensor]:
    """Token ids and masks, of one in `fewer` tokens less from one sample to the next; 0: all of the same length."""
    ids = torch.randint(3, 60, (count, tokens))
    lengths = [tokens * (fewer - i) // fewer if fewer else tokens for i in range(count)]
    mask = torch.stack([torch.arange(tokens) < length for length in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def patched(class_name: str, folder: Path, **change: Any) -> Inputs:
    """A patched directory `folder`/out of a tiny model, and inputs for it."""
    family = next(f for f in FAMILIES if f.class_name == class_name)
    replace(family, values=family.values | change).save(folder / "base")
    loaded = load_checkpoint(str(folder / "base"))
    artifact.save(folder / "out", loaded, plan_on(loaded))
    probe = loaded.preprocessing.probe()
    if isinstance(probe, torch.Tensor):
        return torch.randn(3, *probe.shape[1:])
    causal = loaded.answer == "next-token"  # whose padded prompts a file computes together, the model one by one
    return texts(loaded.preprocessing.tokens, fewer=0 if causal else 3)


def patched_timm(folder: Path) -> Inputs:
    (folder / "base").mkdir()
    model = vit(depth=1)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "pretrained_cfg": model.pretrained_cfg}
    config["model_args"] = {"img_size": 64, "depth": 1}
    config["pretrained_cfg"] |= {"input_size": [3, 64, 64]}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "base" / "model.safetensors")
    loaded = load_checkpoint(str(folder / "base"))
    artifact.save(folder / "out", loaded, plan_on(loaded))
    return torch.randn(3, 3, 64, 64)


def patched_t2t(folder: Path) -> Inputs:
    model = t2t()
    artifact.save(folder / "out", checkpoint_of(model, folder), plan_for(model, "clusters"))
    return torch.randn(3, 3, 64, 64)


def family(class_name: str) -> Callable[[Path], Inputs]:
    return partial(patched, class_name, num_hidden_layers=1)


MAKE: dict[str, Callable[[Path], Inputs]] = {
    "timm": patched_timm,
    "t2t-vit": patched_t2t,
    "BERT": family("BertModel"),
    "ViT": family("ViTForImageClassification"),
    "CLIP": family("CLIPModel"),
    "Llama": family("LlamaForCausalLM"),
}


def ran(form: Format, path: Path, inputs: Inputs, dtype: torch.dtype) -> np.ndarray:
    """What the file answers, without sbpatch."""
    x = moved(inputs, "cpu", dtype)
    if form is Format.pt2:
        return run(torch.export.load(path).module(), x).float().detach().numpy()
    named = x if isinstance(x, dict) else {"images": x}
    session = onnxruntime.InferenceSession(path)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}  # no custom operators
    found = session.run(None, {name: tensor.numpy() for name, tensor in named.items()})
    assert len(found) == 1
    return found[0].astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKE)
def test_every_family_gives_its_answers_after_export(name, tmp_path):
    """In both formats, in one of them as float32 and in the other as float16; on other numbers of samples too."""
    inputs = MAKE[name](tmp_path)
    others = samples({k: v.flip(0) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.flip(0), 0, 2)
    with torch.inference_mode():
        expected = run(sbpatch.load(tmp_path / "out"), others).numpy()
    largest = np.abs(expected).max()
    turned = list(MAKE).index(name) % 2
    for form, dtype in zip(Format, ("float32", "float16")[:: -1 if turned else 1], strict=False):
        path, tolerance = tmp_path / f"x.{form.value}", {"float32": 1e-4, "float16": 1e-2}[dtype] * largest
        assert export(tmp_path / "out", form, path, inputs, dtype=dtype) < tolerance
        found = ran(form, path, others, getattr(torch, dtype))
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_a_causal_model_exports_at_another_length(tmp_path):
    """As `--length` asks, of twice the one that it was calibrated at: the patch is scaled to it as it is in the model."""
    patched("LlamaForCausalLM", tmp_path, num_hidden_layers=1, max_position_embeddings=256)
    inputs = texts(200, fewer=0)
    with torch.inference_mode():
        expected = run(sbpatch.load(tmp_path / "out"), inputs).numpy()
    export(tmp_path / "out", Format.pt2, tmp_path / "x.pt2", inputs)
    np.testing.assert_allclose(ran(Format.pt2, tmp_path / "x.pt2", inputs, torch.float32), expected, atol=1e-5)


@pytest.mark.parametrize("class_name", ["ViTForImageClassification", "BertModel"])
def test_copy_of_the_directory(class_name, tmp_path):
    inputs = patched(class_name, tmp_path)
    assert export(tmp_path / "out", Format.safetensors, tmp_path / "copy", inputs) == 0
    with torch.inference_mode():
        assert torch.equal(run(sbpatch.load(tmp_path / "copy"), inputs), run(sbpatch.load(tmp_path / "out"), inputs))


@pytest.mark.slow
def test_fitted_landmarks_give_their_answers_after_export(tmp_path):
    """Their coordinates lie in the file, and their inverse is products there (see newton_inverse)."""
    images = torch.randn(3, 3, 64, 64)
    model = t2t()
    plan = sbpatch.calibrate(model, [images], budget=0.2, method="coreset", min_tokens=200, seed=0, keep_slow=True)
    artifact.save(tmp_path / "out", checkpoint_of(model, tmp_path), plan)
    assert any(key.endswith("to_key") for key in plan.tensors)
    for form, name in ((Format.pt2, "x.pt2"), (Format.onnx, "x.onnx")):
        assert export(tmp_path / "out", form, tmp_path / name, images) < 1e-4


@pytest.mark.slow
def test_what_cannot_be_exported_leaves_nothing(tmp_path):
    model = t2t()
    plan = plan_for(model, "leverage")
    artifact.save(tmp_path / "out", checkpoint_of(model, tmp_path), plan)
    before = sorted(tmp_path.iterdir())
    images = torch.randn(2, 3, 64, 64)
    text = refused(export, tmp_path / "out", Format.onnx, tmp_path / "x.onnx", images)
    assert "cannot be exported to onnx, not written" in text
    assert "eigh" in text
    assert "at least two samples" in refused(export, tmp_path / "out", Format.pt2, tmp_path / "x.pt2", images[:1])
    assert "is a directory" in refused(export, tmp_path / "out", Format.pt2, tmp_path / "out", images)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_size_and_time_beside_the_exact_model(tmp_path):
    inputs = patched("ViTForImageClassification", tmp_path, num_hidden_layers=1)
    export(tmp_path / "out", Format.pt2, tmp_path / "x.pt2", inputs)
    found = beside_exact(tmp_path / "out", Format.pt2, tmp_path / "x.pt2", inputs)
    assert list(found) == ["exact", "patched"]
    assert found["patched"]["size_bytes"] == (tmp_path / "x.pt2").stat().st_size
    assert all(figures["latency_ms"] > 0 for figures in found.values())
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert weights < found["exact"]["size_bytes"] < found["patched"]["size_bytes"]  # whose program is longer


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dtype", "bfloat16"], "float32 or float16"),
        (["--format", "onnx", "--compile"], "only pt2 is"),
        (["--format", "safetensors", "--dtype", "float16"], "a copy of the directory"),
    ],
)
def test_flags_that_a_format_does_not_have_are_refused(flags, said, tmp_path, capsys):
    assert command("export", str(tmp_path / "out"), *flags) == 1
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
