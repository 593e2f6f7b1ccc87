"""The embedded CIFAR-10 model: what it is, and that it recognises CIFAR-10 exactly and patched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import sbpatch
from sbpatch.data.loading import batches
from sbpatch.data.sources import open_images, sample_images
from sbpatch.models.checkpoint import Checkpoint
from sbpatch.models.load import load_checkpoint
from sbpatch.sites.find import find_sites

ROOT = Path(__file__).parents[1]
# By its directory: that holds whether or not it has an alias.
ASSET = ROOT / "sbpatch" / "assets" / "t2t-vit-cifar10"
SHARED = Path(os.environ.get("SBPATCH_SHARED", ROOT.parent / "shared")) / "data"


@pytest.fixture(scope="module")
def cifar10() -> Checkpoint:
    return load_checkpoint(str(ASSET))


def test_what_it_is(cifar10: Checkpoint) -> None:
    assert cifar10.family == "t2t-vit"
    assert (cifar10.config["classes"], cifar10.config["input_size"]) == (10, 224)
    assert cifar10.preprocessing.input_size == (3, 224, 224)
    assert (ASSET / "model.safetensors").stat().st_size < 12_000_000
    with torch.inference_mode():
        logits = cifar10.model(cifar10.preprocessing.probe())
    assert logits.shape == (1, 10)
    assert logits.isfinite().all()


def test_its_attention_sites(cifar10: Checkpoint) -> None:
    sites = find_sites(cifar10.model, cifar10.preprocessing.probe())
    assert [site.geometry.tokens for site in sites] == [3136, 784] + [197] * cifar10.config["depth"]
    assert not any(site.unsupported for site in sites)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason=f"no {SHARED}: set SBPATCH_SHARED")
def test_accuracy_exact_and_patched(cifar10: Checkpoint) -> None:
    images = open_images("cifar10", cifar10.preprocessing, data_dir=SHARED, limit=200)
    pairs = list(batches(images, 16))
    labels = torch.cat([y for _, y in pairs])
    assert labels.bincount(minlength=10).min() > 0

    def right() -> float:
        with torch.inference_mode():
            logits = torch.cat([cifar10.model(x) for x, _ in pairs])
        return (logits.argmax(1) == labels).float().mean().item()

    exact = right()
    assert exact >= 0.58
    sample = sample_images("cifar10", cifar10.preprocessing, 8, seed=0, data_dir=SHARED)
    plan = sbpatch.calibrate(cifar10.model, [x for x, _ in batches(sample, 8)], budget=0.1, keep_slow=True)
    sbpatch.patch(cifar10.model, plan)
    try:
        assert right() >= exact - 0.05
    finally:
        sbpatch.unpatch(cifar10.model)
