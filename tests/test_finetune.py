"""Fine-tuning: what is trained moves and lowers the loss, all else keeps its bits; seeds, resumption, processes, commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cli import fails, place  # noqa: F401
from tiny import ROOT, checkpoint_of, command, plan_for, process, refused, t2t
from tiny_text import bert, llama, words
from torch import Tensor
from transformers_coverage import plan_on

import sbpatch
from sbpatch.models.load import load_checkpoint
from sbpatch.plan import artifact
from sbpatch.plan.patch import read_plan
from sbpatch.training import Settings, Train, finetune, save, state
from sbpatch.training.finetune import schedule
from sbpatch.training.objective import distilled_loss, labelled_loss
from sbpatch.training.samples import divided

SEEN = Settings(epochs=2, batch_size=4, lr=1e-3)


class Drawn:
    """Samples drawn from a seed: images (3, 64, 64) of five classes, or 24 tokens."""

    name = "drawn"

    def __init__(self, count: int, kind: str = "images") -> None:
        generator = torch.Generator().manual_seed(5)
        self.kind = kind
        self.labels = torch.randint(5, (count,), generator=generator)
        self.images = torch.randn(count, 3, 64, 64, generator=generator)
        self.ids = torch.randint(3, 64, (count, 24), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, Tensor]:
        if self.kind == "images":
            return self.images[i], self.labels[i]
        labels = self.ids[i].roll(-1)
        labels[-1] = -1
        return {"input_ids": self.ids[i], "attention_mask": torch.ones_like(self.ids[i])}, labels

    def fingerprint(self) -> str:
        return f"{self.kind} {len(self)}"


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Path:
    """A tiny T2T-ViT whose two token stages are patched."""
    folder = tmp_path_factory.mktemp("patched")
    loaded = checkpoint_of(t2t(), folder)
    plan = plan_for(loaded.model, "clusters")
    artifact.save(folder / "model", loaded, plan)
    return folder / "model"


@pytest.fixture(scope="module", params=["llama", "bert"])
def patched_text(request, tmp_path_factory) -> tuple[Path, str]:
    """A tiny language model that predicts the next token, and one that answers with features."""
    folder = tmp_path_factory.mktemp("text")
    model = llama(tie_word_embeddings=True) if request.param == "llama" else bert()
    model.save_pretrained(folder / "plain")
    words().save_pretrained(folder / "plain")
    loaded = load_checkpoint(str(folder / "plain"), None, 24)
    plan = plan_on(loaded)
    plan.input_size, plan.data, plan.check = [24], {"source": "drawn", "samples": 1}, {}
    artifact.save(folder / "model", loaded, plan)
    return folder / "model", request.param


def tuned(folder: Path, settings: Settings = SEEN, samples: Any = None, **options: Any) -> Any:
    samples = samples or Drawn(8)
    return finetune(folder, samples, samples, settings, **options)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- gradients


@pytest.mark.parametrize("train", list(Train))
@pytest.mark.parametrize("distill", [False, True])
def test_one_step_lowers_the_loss_and_frozen_weights_keep_their_bits(patched, train, distill):
    lr = 1e-5 if distill and train is Train.all else 1e-3  # a first step of AdamW is that long for each weight
    settings = Settings(steps=1, batch_size=8, lr=lr, train=train, distill=distill)
    result = tuned(patched, settings)
    before, after = (v["loss"] for v in result.progress.validations)
    assert after < before
    assert result.losses[0] == pytest.approx(before, rel=1e-5)
    base = load_file(patched / "model.safetensors")
    assert base.keys() == result.weights.keys()  # LoRA's matrices are added to the weights they belong to
    moved = {name for name in base if not torch.equal(base[name], result.weights[name])}
    assert moved
    stages = ("tokens_to_token.attention1.", "tokens_to_token.attention2.")
    if train is Train.norms:
        assert all("norm" in name for name in moved)
    elif train is Train.attention:
        assert {f"{stage}attn.qkv.weight" for stage in stages} < moved
        assert all("norm" in name or ".attn." in name for name in moved)
    elif train is Train.lora:
        assert all(name.startswith((*stages, "blocks.")) and base[name].ndim == 2 for name in moved)
    else:
        assert "head.weight" in moved
    assert "pos_embed" not in moved  # a fixed table of the architecture


def test_text_is_trained_by_its_next_tokens_and_features_by_the_exact_ones(patched_text, tmp_path):
    folder, kind = patched_text
    settings = Settings(steps=2, batch_size=4, lr=1e-3, distill=True, checkpointing=True)
    samples = Drawn(4, "text")
    result = tuned(folder, settings, samples)
    validations = result.progress.validations
    assert validations[-1]["loss"] < validations[0]["loss"]
    save(tmp_path / "out", folder, result.weights)
    written = sbpatch.load(tmp_path / "out")
    assert same(written.state_dict(), result.weights)
    assert same(
        load_checkpoint(str(tmp_path / "out" / "base")).model.state_dict(),
        load_checkpoint(str(folder)).model.state_dict(),
    )
    if kind == "llama":
        labelled = tuned(folder, replace(settings, distill=False), samples).progress.validations
        assert labelled[-1]["perplexity"] < labelled[0]["perplexity"]
    else:
        assert validations[-1]["cosine"] > validations[0]["cosine"]
        assert "add --distill" in refused(tuned, folder, replace(settings, distill=False), samples)


def test_the_start_wins_where_every_step_makes_it_worse(patched):
    result = tuned(patched, replace(SEEN, lr=3.0))
    assert result.progress.validations[-1]["loss"] > result.progress.validations[0]["loss"]
    assert result.best["step"] == 0
    assert same(result.weights, load_file(patched / "model.safetensors"))


# ---- the same run in other ways


def test_a_seed_gives_the_same_bits_and_another_one_other_bits(patched):
    one, two = tuned(patched), tuned(patched)
    assert one.losses == two.losses
    assert same(one.weights, two.weights)
    assert not same(one.weights, tuned(patched, replace(SEEN, seed=1)).weights)
    assert same(one.weights, tuned(patched, replace(SEEN, checkpointing=True)).weights)


def test_a_batch_in_pieces_gives_the_same_curve_but_for_rounding(patched):
    one, two = tuned(patched), tuned(patched, replace(SEEN, accumulate=2))
    assert one.losses == pytest.approx(two.losses, abs=1e-4)
    line = refused(tuned, patched, replace(SEEN, accumulate=3))
    assert "multiple of 3" in line


def test_another_precision_than_that_of_the_processs_first_run_is_refused(patched):
    tuned(patched)
    assert "restart" in refused(tuned, patched, replace(SEEN, dtype="bfloat16"))


@pytest.mark.parametrize("train", [Train.all, Train.lora])
def test_a_resumed_run_gives_the_same_bits_as_one_without_interruption(patched, train, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "EVERY", 0.0)
    settings = replace(SEEN, train=train, epochs=3)
    whole = tuned(patched, settings)

    def cut(items: Sequence[int], description: str) -> Iterator[int]:
        for item in items:
            if item == 3:  # in the middle of the second epoch
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        tuned(patched, settings, state=tmp_path / "state", progress=cut)
    line = refused(tuned, patched, replace(settings, lr=0.5), state=tmp_path / "state", resume=True)
    assert "another lr" in line
    resumed = tuned(patched, settings, state=tmp_path / "state", resume=True)
    assert resumed.losses == whole.losses
    assert resumed.progress.validations == whole.progress.validations
    assert same(resumed.weights, whole.weights)
    resumed.close()
    assert "nothing to resume" in refused(tuned, patched, settings, state=tmp_path / "state", resume=True)


def test_a_damaged_state_is_refused(patched, tmp_path):
    tuned(patched, state=tmp_path / "state")
    (tmp_path / "state" / "state.pt").write_bytes(b"no state")
    assert "cannot be read" in refused(tuned, patched, state=tmp_path / "state", resume=True)


# ---- the directory


def test_the_written_directory_has_the_plan_the_tuned_weights_and_the_base(patched, tmp_path):
    result = tuned(patched)
    save(tmp_path / "out", patched, result.weights, {"steps": 4})
    before, after = read_plan(patched), read_plan(tmp_path / "out")
    assert after.sites == before.sites
    assert same(after.tensors, before.tensors)
    assert after.finetuned == {"steps": 4}
    assert same(load_file(tmp_path / "out" / "model.safetensors"), result.weights)
    assert same(load_file(tmp_path / "out" / "base" / "model.safetensors"), load_file(patched / "model.safetensors"))
    assert "fine-tuned" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    again = tuned(tmp_path / "out", replace(SEEN, lr=1e-2))  # and on from there: the base stays the first one
    save(tmp_path / "twice", tmp_path / "out", sbpatch.load(tmp_path / "out").train(), {})
    save(tmp_path / "twice", tmp_path / "out", again.weights, {})
    assert same(load_file(tmp_path / "twice" / "base" / "model.safetensors"), load_file(patched / "model.safetensors"))
    assert not same(load_file(tmp_path / "twice" / "model.safetensors"), result.weights)
    (tmp_path / "twice" / "base").rename(tmp_path / "elsewhere")
    assert "base is missing" in refused(tuned, tmp_path / "twice", replace(SEEN, distill=True))


def test_weights_of_another_model_are_refused(patched, tmp_path):
    assert "not of the model" in refused(save, tmp_path / "out", patched, t2t(width=32), {})
    assert not (tmp_path / "out").exists()


# ---- commands


TUNE = ["finetune", "out", "--dataset", "images", "--validation", "2", "--batch-size", "2", "--quiet"]


@pytest.fixture
def calibrated(patched, place) -> Path:  # noqa: F811
    """`out`, of a model of three classes, beside the images of three classes."""
    loaded = checkpoint_of(t2t(classes=3), place)
    artifact.save(place / "out", loaded, plan_for(loaded.model, "clusters"))
    return place / "out"


def test_finetune_writes_what_the_other_commands_take(calibrated, capsys):
    assert command(*TUNE, "--epochs", "2", "--json", "tuned.json") == 0
    found = json.loads(Path("tuned.json").read_text())
    assert len(found["losses"]) == 2 * (found["samples"] // 2)
    assert found["validation_samples"] == 2
    assert found["best"] in found["validation"]
    assert sorted(p.name for p in Path("out-finetuned").iterdir()) == [
        "README.md", "base", "config.json", "model.safetensors", "report.png", "sbpatch.json", "sbpatch.safetensors",
    ]  # fmt: skip
    assert not list(Path().glob(".out*"))
    assert command("inspect", "out-finetuned", "--quiet") == 0
    assert command("export", "out-finetuned", "--format", "safetensors", "-o", "copied", "--quiet") == 0


def test_images_that_workers_decode_give_the_same_bits(calibrated, monkeypatch):
    """Over two epochs, each step's batch in two pieces."""
    found = []
    for few in (64, 1):  # from more images than that on there are workers
        monkeypatch.setattr("sbpatch.data.loading.FEW", few)
        assert command(*TUNE, "--epochs", "2", "--accumulate", "2", "--json", "tuned.json") == 0
        result = json.loads(Path("tuned.json").read_text())
        found.append((result["losses"], result["validation"], Path("out-finetuned/model.safetensors").read_bytes()))
    assert found[0] == found[1]
    assert len(found[0][0]) > 2


@pytest.mark.slow
def test_eval_compares_base_patched_and_finetuned(calibrated):
    assert command(*TUNE, "--lr", "0.01", "--distill") == 0
    for folder in ("out", "out-finetuned"):
        assert command("eval", folder, "--dataset", "images", "--quiet", "--json", f"{folder}.json") == 0
    before, after = (json.loads(Path(f"{name}.json").read_text())["variants"] for name in ("out", "out-finetuned"))
    assert list(after) == ["eager", "sdpa", "patched", "finetuned"]
    for variant in ("sdpa", "patched"):  # of the base's weights
        for figure in ("top1", "agreement"):
            assert before[variant][figure] == after[variant][figure]
    assert after["finetuned"]["attention_memory_bytes"] == after["patched"]["attention_memory_bytes"]


def test_what_cannot_be_tuned_is_refused_with_one_line(calibrated, capsys):
    assert "no directory nowhere" in fails(capsys, "finetune", "nowhere", "--dataset", "images")
    assert "set aside" in fails(capsys, "finetune", "out", "--dataset", "images", "--validation", "9")
    assert "nothing to resume" in fails(capsys, *TUNE, "--resume")
    assert "smaller --batch-size" in fails(capsys, "finetune", "out", "--dataset", "images", "--validation", "4")
    Path("taken").mkdir()
    Path("taken", "file").write_text("mine")
    assert "holds something else" in fails(capsys, *TUNE, "-o", "taken")
    assert command(*TUNE, "--epochs", "1", "--steps", "1") == 2


@pytest.mark.slow
def test_activations_may_be_bfloat16_while_weights_stay_float32(calibrated):
    done = process(*TUNE, "--dtype", "bfloat16", "--json", "half.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    half = json.loads(Path("half.json").read_text())["losses"]
    assert command(*TUNE, "--json", "whole.json", "-o", "whole") == 0
    whole = json.loads(Path("whole.json").read_text())["losses"]
    assert whole != half
    assert whole == pytest.approx(half, rel=0.1)
    weights = load_file("out-finetuned/model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values() if tensor.is_floating_point())


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(calibrated):
    arguments = [*TUNE, "--epochs", "2", "--lr", "0.001"]
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name, start in (("one", [sys.executable, "-m"]), ("two", launched)):
        done = subprocess.run(
            [*start, "sbpatch.cli", *arguments, "-o", name, "--json", f"{name}.json", "--device", "cpu"],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-4)
    assert [v["loss"] for v in one["validation"]] == pytest.approx([v["loss"] for v in two["validation"]], abs=1e-4)


# ---- the parts


@given(total=st.integers(1, 500))
def test_the_step_size_rises_then_falls_to_nothing(total):
    shares = [schedule(step, total) for step in range(total)]
    top = shares.index(max(shares))
    assert max(shares) == pytest.approx(1, abs=1e-2)
    assert all(a < b for a, b in pairwise(shares[: top + 1]))
    assert all(a > b for a, b in pairwise(shares[top + 1 :]))
    assert min(shares) > 0


@given(count=st.integers(2, 40), aside=st.integers(1, 39), seed=st.integers(0, 5))
def test_no_sample_is_both_trained_on_and_validated_on(count, aside, seed):
    whole = Drawn(count, "text")
    if aside >= count:
        assert "smaller --validation" in refused(divided, whole, aside, seed)
        return
    training, validation = divided(whole, aside, seed)
    assert len(validation) == aside
    assert sorted(training.indices + validation.indices) == list(range(count))


@given(batch=st.integers(1, 5), n=st.integers(2, 9), seed=st.integers(0, 100))
def test_losses_are_a_samples_own_and_vanish_at_the_exact_answer(batch, n, seed):
    generator = torch.Generator().manual_seed(seed)
    output, exact = torch.randn(2, batch, n, 7, generator=generator)
    labels = torch.randint(-1, 7, (batch, n), generator=generator)
    inputs = {"attention_mask": torch.rand(batch, n, generator=generator) < 0.7}
    for answer in ("next-token", "tokens", "features"):
        whole = distilled_loss(answer, output, exact, inputs, labels)
        assert (whole >= 0).all()
        assert torch.allclose(distilled_loss(answer, exact, exact, inputs, labels), torch.zeros(batch), atol=1e-5)
        last = {"attention_mask": inputs["attention_mask"][-1:]}
        alone = distilled_loss(answer, output[-1:], exact[-1:], last, labels[-1:])
        assert torch.allclose(whole[-1:], alone, atol=1e-6)
    whole = labelled_loss("next-token", output, labels)
    scored = labels[-1] >= 0
    expected = -output[-1].log_softmax(-1)[scored, labels[-1][scored]].sum() / max(1, int(scored.sum()))
    assert torch.allclose(whole[-1], expected, atol=1e-5)
