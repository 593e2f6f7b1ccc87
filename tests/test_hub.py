"""A patched directory on the hub: its metadata, uploaded, found again; against a local stand-in of the hub's interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hub import TOKEN, served
from PIL import Image
from tiny import ROOT, checkpoint_of, plan_for, refused, t2t
from transformers_coverage import FAMILIES

import sbpatch
from sbpatch.data.sources import batches, open_images
from sbpatch.models.checkpoint import Checkpoint
from sbpatch.models.load import load_checkpoint
from sbpatch.plan import artifact
from sbpatch.plan.hub import front_matter, metadata
from sbpatch.training import save

# The library reads where the hub is once, as it is imported: so all of it in one process of its own.
SCRIPT = """
import sys, torch, sbpatch
first, second, images, answer = sys.argv[1:]
for directory in (first, second):
    print(sbpatch.push_to_hub(directory, "me/patched", private=True))
with torch.inference_mode():
    torch.save(sbpatch.load("me/patched")(torch.load(images, weights_only=True)), answer)
for refused in (lambda: sbpatch.load("me/none"), lambda: sbpatch.push_to_hub(first, "me/patched", token="hf_wrong")):
    try:
        refused()
    except sbpatch.SbpatchError as error:
        print(error)
"""


@pytest.mark.slow
def test_pushed_and_loaded_again(tmp_path):
    """The repository holds the directory's files, without those that an earlier push had and this one has not."""
    images = torch.randn(2, 3, 64, 64)
    torch.save(images, tmp_path / "images.pt")
    for name, method in (("first", "window2d+favor"), ("second", "window")):
        artifact.save(tmp_path / name, checkpoint_of(t2t(), tmp_path), plan_for(t2t(), method))
    assert (tmp_path / "first" / "sbpatch.safetensors").exists()
    assert not (tmp_path / "second" / "sbpatch.safetensors").exists()
    arguments = [tmp_path / name for name in ("first", "second", "images.pt", "found.pt")]
    with served() as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *map(str, arguments)],
            env=os.environ | own | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        *pushed, missing, wrong = done.stdout.splitlines()
        assert pushed == [f"{hub.url}/me/patched/commit/{i:040x}" for i in (1, 2)]
        assert hub.private == {"me/patched": True}
        files = {path: data for path, data in hub.repositories["me/patched"].items() if path != ".gitattributes"}
        assert files == {p.name: p.read_bytes() for p in (tmp_path / "second").iterdir()}
        assert "me/none: no such directory" in missing
        assert f"is not uploaded: {hub.url}/me/patched: " in wrong
        assert hub.commits == 2
    with torch.inference_mode():
        expected = sbpatch.load(tmp_path / "second")(images)
    assert torch.equal(torch.load(tmp_path / "found.pt", weights_only=True), expected)


@pytest.mark.slow
def test_eval_of_a_repository_is_that_of_the_directory(tmp_path):
    """Patched, and fine-tuned with its base beside it; the second one's base is found though it lies in a folder."""
    model = checkpoint_of(t2t(), tmp_path)
    artifact.save(tmp_path / "patched", model, plan_for(model.model, "clusters"))
    weights = {name: tensor + 0.01 for name, tensor in model.model.state_dict().items()}
    save(tmp_path / "tuned", tmp_path / "patched", weights, {"steps": 1})
    folders = tmp_path / "images"
    for i, name in enumerate("abcde"):
        (folders / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), (50 * i, 9 * i, 200)).save(folders / name / "0.png")
    data = open_images(str(folders), model.preprocessing)
    ((images, labels),) = batches(data, 8)
    with torch.inference_mode():
        exact = model.model(images).argmax(-1)
        tops = {name: sbpatch.load(tmp_path / name)(images).argmax(-1) for name in ("patched", "tuned")}
    tops = {"sdpa": exact, "patched": tops["patched"], "finetuned": tops["tuned"]}
    with served() as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        environment = os.environ | own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for name, count in (("patched", 2), ("tuned", 3)):
            whole = tmp_path / name
            files = [path for path in whole.rglob("*") if path.is_file()]
            hub.repositories[f"me/{name}"] = {str(path.relative_to(whole)): path.read_bytes() for path in files}
            arguments = ["eval", f"me/{name}", "--dataset", str(folders), "--device", "cpu", "--json", "-", "--quiet"]
            done = subprocess.run(
                [sys.executable, "-m", "sbpatch.cli", *arguments],
                env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)["variants"]
            assert found.keys() == {"eager", *list(tops)[:count]}
            for variant in list(tops)[:count]:
                top = tops[variant]
                assert found[variant]["top1"] == pytest.approx(100 * float((top == labels).double().mean()))
                assert found[variant]["agreement"] == pytest.approx(100 * float((top == exact).double().mean()))


def test_what_cannot_be_pushed_is_refused(tmp_path):
    artifact.save(tmp_path / "out", checkpoint_of(t2t(), tmp_path), plan_for(t2t(), "window"))
    assert "give owner/name" in refused(sbpatch.push_to_hub, tmp_path / "out", "name")
    assert "no directory" in refused(sbpatch.push_to_hub, tmp_path / "none", "me/name")
    assert "no plan" in refused(sbpatch.push_to_hub, tmp_path, "me/name")


def checkpoint(class_name: str, folder: Path) -> Checkpoint:
    next(f for f in FAMILIES if f.class_name == class_name).save(folder)
    return load_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("class_name", "task"),
    [
        ("ViTForImageClassification", "image-classification"),
        ("Dinov2Model", "image-feature-extraction"),
        ("BertModel", "feature-extraction"),
        ("BertForMaskedLM", "fill-mask"),
        ("LlamaForCausalLM", "text-generation"),
    ],
)
def test_metadata_of_transformers_models(class_name, task, tmp_path):
    local = checkpoint(class_name, tmp_path)
    about = yaml.safe_load(front_matter(metadata(local)).split("---\n")[1])
    assert about["pipeline_tag"] == task
    assert about["library_name"] == "sbpatch"
    assert {"sbpatch", "transformers"} <= {*about["tags"]}
    assert not {"base_model", "license"} & about.keys()  # a local directory has none that is known
    assert metadata(replace(local, name="owner/name"))["base_model"] == "owner/name"


def test_metadata_of_timm_and_embedded_models():
    demo = load_checkpoint("t2t-vit-demo")
    about = metadata(demo)
    assert about["license"] == "apache-2.0"
    assert "base_model" not in about
    config = {"pretrained_cfg": {"license": "bsd-3-clause"}}
    about = metadata(replace(demo, name="vit_tiny_patch16_224.augreg_in21k", family="timm", config=config))
    assert about["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k"
    assert about["license"] == "bsd-3-clause"


def test_the_card_begins_with_its_metadata(tmp_path):
    artifact.save(tmp_path / "out", checkpoint_of(t2t(), tmp_path), plan_for(t2t(), "window"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\n")
    assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "image-classification"
    assert text.split("---\n")[2].startswith("\n# ")
