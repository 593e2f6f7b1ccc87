"""Exported files: images or named tokens in, any number of samples, the patched model's answers out, or one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tiny import checkpoint_of, plan_for, refused, t2t
from transformers_coverage import FAMILIES, plan_on

import sbpatch
from sbpatch.data.batch import Inputs, run, samples
from sbpatch.evaluation.export import Format, export
from sbpatch.models.load import load_checkpoint
from sbpatch.plan import artifact


def texts(tokens: int, count: int = 3) -> dict[str, torch.Tensor]:
    """Token ids and masks, of a third fewer tokens from one sample to the next."""
    ids = torch.randint(3, 60, (count, tokens))
    mask = torch.stack([torch.arange(tokens) < tokens * (3 - i) // 3 for i in range(count)]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def patched(class_name: str, folder: Path) -> Inputs:
    """A patched directory `folder`/out of a tiny model, and inputs for it."""
    next(f for f in FAMILIES if f.class_name == class_name).save(folder / "base")
    loaded = load_checkpoint(str(folder / "base"))
    artifact.save(folder / "out", loaded, plan_on(loaded))
    probe = loaded.preprocessing.probe()
    return torch.randn(3, *probe.shape[1:]) if isinstance(probe, torch.Tensor) else texts(loaded.preprocessing.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("class_name", ["ViTForImageClassification", "BertModel", "LlamaForCausalLM"])
def test_transformers_models_give_their_answers_after_export(class_name, tmp_path):
    inputs = patched(class_name, tmp_path)
    others = samples({k: v.flip(0) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.flip(0), 0, 2)
    with torch.inference_mode():
        expected = run(sbpatch.load(tmp_path / "out"), others)
    assert export(tmp_path / "out", Format.pt2, tmp_path / "x.pt2", inputs) < 1e-4
    module = torch.export.load(tmp_path / "x.pt2").module()
    torch.testing.assert_close(run(module, others), expected, atol=1e-5, rtol=1e-4)
    assert export(tmp_path / "out", Format.onnx, tmp_path / "x.onnx", inputs) < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    named = others if isinstance(others, dict) else {"images": others}
    found = session.run(None, {name: tensor.numpy() for name, tensor in named.items()})
    np.testing.assert_allclose(found[0], expected, atol=1e-5, rtol=1e-4)
    assert len(found) == 1


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
