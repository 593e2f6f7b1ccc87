"""Local attention: windows and chunks are told from padding and stay exact; the sites beside them are patched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import command
from tiny_text import VOCABULARY, prose, words
from torch import Tensor
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers_coverage import plan_on

import sbpatch
from sbpatch.attention import Scatterbrain, masks
from sbpatch.calibration.decide import first_decision
from sbpatch.data.batch import run
from sbpatch.evaluation.accounting import at_length
from sbpatch.generation.cache import CompressedCache
from sbpatch.generation.generate import cache_name, patched_layers
from sbpatch.generation.settings import Settings
from sbpatch.models.load import load_checkpoint
from sbpatch.plan.plan import Budget, Plan
from sbpatch.sites.find import Site, find_sites

N, WINDOW = 96, 24
SHAPE = {
    "vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": None,
}  # fmt: skip
DECODER = SHAPE | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": WINDOW}
BERT = SHAPE | {"local_attention": 2 * (WINDOW - 1), "cls_token_id": 2, "sep_token_id": 2, "eos_token_id": 2}
EVERY_OTHER = ["sliding_attention", "full_attention"] * 2
FAMILIES = {  # how to make it, its configuration, and which of four layers are global
    "mistral": (MistralForCausalLM, MistralConfig, DECODER, ()),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, DECODER | {"use_sliding_window": True, "max_window_layers": 2}, (0, 1)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, DECODER | {"layer_types": EVERY_OTHER}, (1, 3)),
    "cohere2": (Cohere2ForCausalLM, Cohere2Config, DECODER, (3,)),
    "llama4": (
        Llama4ForCausalLM, Llama4TextConfig,
        DECODER | {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 48}, (3,),
    ),
    "modernbert": (ModernBertForMaskedLM, ModernBertConfig, BERT, (0, 3)),
}  # fmt: skip
IDS = torch.randint(3, 60, (2, N), generator=torch.Generator().manual_seed(1))


def model(name: str, door: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    cls, config, values, _ = FAMILIES[name]
    built = cls(config(**values, attn_implementation=door)).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # Llama 4 leaves its experts empty
            if not bool(parameter.isfinite().all()) or parameter.ndim > 2:
                parameter.normal_(std=0.1)
    return built


def answer(of: torch.nn.Module, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        return run(of, {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask})


# ---- masks


def local(kind: str, n: int, size: int, real: Tensor) -> Tensor:
    """A mask in which a token reads fewer than `size` others on a side, with padding (B, n) -> bool (B, 1, n, n)."""
    away = torch.arange(n)[:, None] - torch.arange(n)
    pairs = {
        "causal": (away >= 0) & (away < size),
        "both sides": away.abs() < size,
        "chunks": (away >= 0) & (torch.arange(n)[:, None] // size == torch.arange(n) // size),
    }[kind]
    return pairs & real[:, None, None, :]


KINDS = st.sampled_from(["causal", "both sides", "chunks"])


@given(
    KINDS, st.integers(2, 40), st.integers(2, 40), st.integers(0, 6), st.booleans(), st.sampled_from(["bool", "low"])
)
def test_a_local_mask_says_how_far_it_reads(kind, n, size, padding, left, form):
    """Beside a padded sample, in either form; one that reaches all the way is no local one."""
    real = torch.ones(2, n, dtype=torch.bool)
    padding = min(padding, n - 2)
    real[1, slice(0, padding) if left else slice(n - padding, n)] = False
    mask = local(kind, n, size, real)
    if form == "low":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert masks.reach(mask) == (size if size < n else None)
    for causal in (False, True):
        plain = masks.is_plain(mask, masks.real_keys(mask, 2, n), causal, n)
        assert plain == (size >= n and causal == (kind != "both sides"))


@given(st.integers(3, 12), st.integers(0, 2**31))
def test_other_masks_are_not_local(n, seed):
    make = torch.Generator().manual_seed(seed)
    away = torch.arange(n)[:, None] - torch.arange(n)
    prefix = (away >= 0) | (torch.arange(n) < 2)
    first = (away.abs() < 2) | (torch.arange(n) == 0)
    for pairs in (prefix, first | first.T, (away >= 0) & (away % 2 == 0)):
        assert masks.reach(pairs) is None
    assert masks.reach(torch.rand(1, 3, n, n, generator=make)) is None
    assert masks.reach(torch.rand(n, n, generator=make)) is None


# ---- finding


@pytest.mark.parametrize("door", ["sdpa", "scatterbrain"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_local_layers_stay_exact_and_global_ones_do_not(name, padded, door):
    mask = torch.ones_like(IDS)
    mask[1, N - 20 :] = 1 - int(padded)
    found = find_sites(model(name, door), {"input_ids": IDS, "attention_mask": mask})
    assert len(found) == 4
    for i, site in enumerate(found):
        entry = first_decision(site, limit=1)
        assert site.geometry.causal == (name != "modernbert")
        if i in FAMILIES[name][3]:
            assert (entry.decision, entry.reach) == ("patch", None)
        else:
            assert (entry.decision, entry.reach) == ("exact", WINDOW)
            assert entry.reason.startswith(f"local attention: of {N} tokens")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_window_as_long_as_the_sequence_is_not_local(name):
    ids = IDS[:, :WINDOW]
    found = find_sites(model(name), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert [first_decision(site, limit=1).decision for site in found] == ["patch"] * 4
    assert [site.reach for site in found] == [None if i in FAMILIES[name][3] else WINDOW for i in range(4)]


# ---- patched


def planned(of: PreTrainedModel, sites: list[Site]) -> Plan:
    """A real approximation for every site that can have one."""
    plan = Plan(model="hybrid", seed=0, budget=Budget(requested=0.2), sites=[])
    for site in sites:
        entry = first_decision(site, limit=1)
        if entry.decision == "patch":
            method, sizes = ("window", {"window": 5}) if site.geometry.causal else ("clusters", {"rank": 6})
            entry.use(Scatterbrain(method, site.geometry, 0, **sizes), 0)
        plan.sites.append(entry)
    return plan


@pytest.mark.parametrize(
    ("name", "door", "compiled"),
    [
        *((name, door, False) for name in ("mistral", "gemma3", "modernbert") for door in ("sdpa", "scatterbrain")),
        ("mistral", "sdpa", True),  # where masks are taken at their word
    ],
)
def test_beyond_its_window_a_patched_site_is_exact(name, door, compiled):
    """Planned where the window is the whole sequence, run where it is not: local sites give the model's own bits."""
    own = model(name, door="sdpa")
    short = {"input_ids": IDS[:, :WINDOW], "attention_mask": torch.ones_like(IDS[:, :WINDOW])}
    plan = planned(own, find_sites(own, short))
    everywhere = set(range(4)) - set(FAMILIES[name][3])
    plan.sites = [site for i, site in enumerate(plan.sites) if i in everywhere]
    exact, exact_short = answer(own), answer(own, **{"ids": short["input_ids"]})
    patched = sbpatch.patch(model(name, door=door), plan)
    assert not torch.allclose(answer(patched, IDS[:, :WINDOW]), exact_short)
    if compiled:
        torch.compiler.reset()
        patched = torch.compile(patched, backend="eager")
    torch.testing.assert_close(answer(patched), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "modernbert"])
def test_of_a_hybrid_only_the_global_layers_are_patched(name):
    own = model(name)
    plan = planned(own, find_sites(own, {"input_ids": IDS}))
    before = answer(own)
    sbpatch.patch(own, plan)
    assert [hasattr(layer, "sbpatch") for layer in own.modules() if hasattr(layer, "layer_type") or hasattr(layer, "q_proj")
            or hasattr(layer, "Wqkv")].count(True) == len(FAMILIES[name][3])  # fmt: skip
    assert not torch.allclose(answer(own), before)
    assert torch.equal(answer(sbpatch.unpatch(own)), before)


class Every(Settings):
    """Reads every block exactly."""

    def best(self, tokens: int, blocked: int, weight: float = 1.0) -> int:
        return blocked // self.block


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma3"])
def test_a_compressed_cache_leaves_local_layers_their_own(name):
    own = model(name)
    cache = CompressedCache(own.config, Every(block=4, recent=8, run=16, least=0))
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert [i for i, kind in enumerate(kinds) if kind == "CompressedLayer"] == list(FAMILIES[name][3])
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found = own.generate(IDS, **{cache_name(type(own)): cache}, **asked)
    assert torch.equal(found, own.generate(IDS, **asked))
    sbpatch.patch(own, planned(own, find_sites(own, {"input_ids": IDS})) if FAMILIES[name][3] else _nothing())
    assert list(patched_layers(own)) == list(FAMILIES[name][3])


def _nothing() -> Plan:
    return Plan(model="hybrid", seed=0, budget=Budget(requested=0.2), sites=[])


# ---- end to end


def save(folder: Path, name: str, **change: object) -> None:
    torch.manual_seed(0)
    cls, config, values, _ = FAMILIES[name]
    cls(config(**values | change)).save_pretrained(folder)
    words().save_pretrained(folder)


def calibrated(tmp_path: Path, length: int) -> list[dict[str, Any]]:
    """inspect and calibrate an encoder with local layers -> the sites of its plan, in `out`."""
    change = {"max_position_embeddings": length, "local_attention": 128, "num_attention_heads": 1}
    save(tmp_path / "model", "modernbert", **change)
    (tmp_path / "text.txt").write_text(prose(max(40, length // 16)))
    (tmp_path / "recipe.yaml").write_text("budget: 0.3\nsites:\n  '*':\n    method: clusters\n    rank: 24\n")
    where = [str(tmp_path / "model"), "--length", str(length), "--device", "cpu", "--quiet"]
    results = [tmp_path / f"{name}.json" for name in ("inspect", "calibrate")]
    assert command("inspect", *where, "--json", str(results[0])) == 0
    options = ["-o", str(tmp_path / "out"), "--data", str(tmp_path / "text.txt"), "--samples", "1"]
    options += ["--recipe", str(tmp_path / "recipe.yaml"), "--keep-slow"]
    assert command("calibrate", *where, *options, "--json", str(results[1])) == 0
    for path in results:
        sites = json.loads(path.read_text())["sites"]
        assert [site.get("reach") for site in sites] == [None, 65, 65, None]
        assert all(("local attention" in site["reason"]) == (i in (1, 2)) for i, site in enumerate(sites))
    return sites


def test_calibrate_patches_the_global_layers_of_an_encoder(tmp_path):
    sites = calibrated(tmp_path, 256)
    assert [site["decision"] for site in sites] == ["patch", "exact", "exact", "patch"]
    assert "local attention" in (tmp_path / "out" / "README.md").read_text()
    inputs = {"ids": IDS.repeat(1, 3)[:, :256]}
    own = sbpatch.load(tmp_path / "out")
    found = answer(own, **inputs)
    assert not torch.allclose(found, answer(sbpatch.unpatch(own), **inputs))


@pytest.mark.slow
def test_an_encoder_of_4096_tokens_end_to_end(tmp_path):
    calibrated(tmp_path, 4096)
    options = ["--dataset", str(tmp_path / "text.txt"), "--limit", "1", "--batch-size", "1", "--device", "cpu"]
    assert command("eval", str(tmp_path / "out"), *options, "--quiet", "--json", str(tmp_path / "eval.json")) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["length"] == 4096
    variants = found["variants"]
    assert variants["patched"]["attention_memory_bytes"] < 0.6 * variants["eager"]["attention_memory_bytes"]


def test_what_is_local_at_a_length_is_counted_as_exact_there():
    own = model("qwen2")
    found = find_sites(own, {"input_ids": IDS[:, :WINDOW]})
    plan = planned(own, found)
    sites = at_length(plan.sites, N)
    assert [site.decision for site in sites] == ["patch", "patch", "exact", "exact"]
    assert all(site.tokens == N for site in sites)
    assert [site.decision for site in at_length(plan.sites, WINDOW)] == ["patch"] * 4


def test_plans_keep_the_reach(tmp_path):
    save(tmp_path, "qwen2")
    loaded = load_checkpoint(str(tmp_path), input_size=N)
    plan = plan_on(loaded)
    (tmp_path / "sbpatch.json").write_text(plan.to_json())
    assert [site.reach for site in Plan.read(tmp_path / "sbpatch.json").sites] == [None, None, WINDOW, WINDOW]
