"""The patched directory: whole or not at all, and never in the place of something else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from pydantic import BaseModel, field_serializer
from tiny import checkpoint_of, plan_for, refused, t2t
from transformers_coverage import FAMILIES, plan_on

import sbpatch
from sbpatch.data.batch import run
from sbpatch.interrupts import Stopped, raising
from sbpatch.models.load import load_checkpoint
from sbpatch.plan import artifact
from sbpatch.plan.plan import PLAN_FILE
from sbpatch.writing import written_whole

FILES = ["README.md", "config.json", "model.safetensors", "report.png", "sbpatch.json", "sbpatch.safetensors"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, hidden ones and leftovers included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A directory that sbpatch wrote."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PLAN_FILE).write_text("old plan")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"old weights")
    return tmp_path / "out"


def write_files(folder: Path) -> None:
    folder.mkdir()
    (folder / PLAN_FILE).write_text("new plan")


# ---- written_whole


def test_new_directory_takes_the_place_of_the_old_one(old, tmp_path):
    with written_whole(old) as fresh:
        write_files(fresh)
        assert contents(old)[PLAN_FILE] == b"old plan"  # until the end
    assert contents(tmp_path) == {f"out/{PLAN_FILE}": b"new plan"}


def test_files_too(tmp_path):
    target = tmp_path / "result.json"
    for text in ("first", "second"):
        with written_whole(target) as fresh:
            fresh.write_text(text)
        assert contents(tmp_path) == {"result.json": text.encode()}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_leaves_the_old_one_and_nothing_else(old, tmp_path, error):
    before = contents(tmp_path)

    def fails(target: Path) -> None:
        with written_whole(target) as fresh:
            write_files(fresh)
            raise error

    for target in (old, tmp_path / "new"):
        with pytest.raises(error):
            fails(target)
        assert contents(tmp_path) == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_signal_while_the_old_one_is_removed(old, tmp_path, monkeypatch, call):
    """The new one is in its place by then, and no hidden folder stays beside it."""
    calls = []

    def remove(*args: object, **kwargs: object) -> None:
        os_rmdir(*args, **kwargs)
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)

    os_rmdir = os.rmdir
    monkeypatch.setattr(os, "rmdir", remove)

    def writes() -> None:
        with written_whole(old) as fresh:
            write_files(fresh)

    with pytest.raises(Stopped), raising():
        writes()
    assert contents(tmp_path) == {f"out/{PLAN_FILE}": b"new plan"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_signal_that_a_library_makes_an_error_of_stops_all_the_same() -> None:
    """Pydantic calls a serializer of ours, and makes an error of its own of whatever comes out of it."""

    class Plan(BaseModel):
        rank: int = 1

        @field_serializer("rank")
        def written(self, rank: int) -> int:
            signal.raise_signal(signal.SIGINT)
            return rank

    with pytest.raises(Stopped, match="stopped by SIGINT"), raising():
        Plan().model_dump_json()


KILLED = """
import sys, time
from pathlib import Path
from sbpatch.writing import written_whole
with written_whole(Path(sys.argv[1])) as fresh:
    fresh.mkdir()
    (fresh / "sbpatch.json").write_text("half")
    print("inside", flush=True)
    time.sleep(60)
"""


def killed_inside(target: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "inside\n"
        os.kill(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_killed_process_leaves_the_old_one(old, tmp_path):
    before = contents(old)
    killed_inside(old)
    assert contents(old) == before
    killed_inside(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    artifact.check_output(old)  # and the next run may go on
    artifact.check_output(tmp_path / "new")


# ---- check_output


def test_output_directories(old, tmp_path):
    artifact.check_output(old)
    artifact.check_output(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    artifact.check_output(tmp_path / "empty")


def test_something_else_is_refused_and_left(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("also")
    before = contents(tmp_path)
    for name, said in (("thesis", "holds something else"), ("file", "is a file"), ("no/where", "no directory")):
        assert said in refused(artifact.check_output, tmp_path / name)
    model = t2t()
    assert "holds something else" in refused(artifact.save, tmp_path / "thesis", None, plan_for(model))
    assert "holds something else" in refused(artifact.copy, tmp_path / "file", tmp_path / "thesis")
    assert contents(tmp_path) == before


# ---- save and copy


def test_saved_directory_is_complete_and_repeats(tmp_path):
    model = t2t()
    checkpoint, plan = checkpoint_of(model, tmp_path), plan_for(model)
    for name in ("one", "two"):
        artifact.save(tmp_path / name, checkpoint, plan)
    artifact.save(tmp_path / "one", checkpoint, plan)  # over itself
    assert sorted(contents(tmp_path / "one")) == FILES
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    artifact.copy(tmp_path / "one", tmp_path / "three")
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert all(
        os.access(file, os.R_OK) and file.stat().st_mode & 0o044 == 0o044 for file in (tmp_path / "one").iterdir()
    )


BASE = {"model.safetensors", "config.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("class_name", "auto", "beside"),
    [
        ("BertModel", "AutoModel", TOKENIZER),
        ("BertForMaskedLM", "AutoModelForMaskedLM", TOKENIZER),
        ("GPT2LMHeadModel", "AutoModelForCausalLM", {"generation_config.json", *TOKENIZER}),
        ("ViTForImageClassification", "AutoModelForImageClassification", {"preprocessor_config.json"}),
        ("CLIPModel", "AutoModel", {"preprocessor_config.json"}),
        ("ViTMAEForPreTraining", "AutoModel", {"preprocessor_config.json"}),
    ],
)
def test_transformers_directory_is_one_for_transformers_too(class_name, auto, beside, tmp_path):
    next(f for f in FAMILIES if f.class_name == class_name).save(tmp_path / "base")
    loaded = load_checkpoint(str(tmp_path / "base"))
    plan = plan_on(loaded)
    artifact.save(tmp_path / "out", loaded, plan)
    drawn = {"sbpatch.safetensors"} if plan.tensors else set()
    assert set(contents(tmp_path / "out")) == BASE | beside | drawn | {"README.md", "report.png", PLAN_FILE}
    config = (tmp_path / "out" / "config.json").read_text()
    assert "attn_implementation" not in config
    assert "sdpa" not in config
    probe = loaded.preprocessing.probe()
    inputs = torch.randn_like(probe) if isinstance(probe, torch.Tensor) else probe
    with torch.inference_mode():
        exact = run(loaded.model, inputs)
        assert torch.equal(run(load_checkpoint(str(tmp_path / "out")).model, inputs), exact)
        theirs = getattr(transformers, auto).from_pretrained(tmp_path / "out", attn_implementation="sdpa")
        assert torch.equal(run(theirs, inputs), exact)
        patched = run(sbpatch.patch(loaded.model, plan), inputs)
        assert not torch.equal(patched, exact)
        assert torch.equal(run(sbpatch.load(tmp_path / "out"), inputs), patched)


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    next(f for f in FAMILIES if f.class_name == "GPT2LMHeadModel").save(tmp_path / "base")
    loaded = load_checkpoint(str(tmp_path / "base"))
    artifact.save(tmp_path / "out", loaded, plan_on(loaded))
    once = sum(t.numel() * 4 for t in loaded.model.parameters())  # parameters() names a tied tensor once
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < once + 8 * loaded.model.config.n_embd * 32
    again = load_checkpoint(str(tmp_path / "out")).model
    assert again.lm_head.weight is again.transformer.wte.weight


def test_settings_of_sampling_do_not_stand_in_the_way(tmp_path):
    """Files from older versions hold them where nothing is sampled; transformers refuses to save such a configuration."""
    next(f for f in FAMILIES if f.class_name == "LlamaForCausalLM").save(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5]}'
    )
    loaded = load_checkpoint(str(tmp_path / "base"))
    artifact.save(tmp_path / "out", loaded, plan_on(loaded))
    assert load_checkpoint(str(tmp_path / "out")).model.generation_config.eos_token_id == [2, 5]


def test_tensors_of_the_patch_are_not_redrawn(tmp_path):
    model = t2t()
    artifact.save(tmp_path / "out", checkpoint_of(model, tmp_path), plan_for(model))
    (tmp_path / "out" / "sbpatch.safetensors").unlink()
    text = refused(sbpatch.load, tmp_path / "out")
    assert f"{tmp_path / 'out' / 'sbpatch.safetensors'} is missing" in text
    artifact.save(tmp_path / "none", checkpoint_of(model, tmp_path), plan_for(model, "window"))
    assert not (tmp_path / "none" / "sbpatch.safetensors").exists()
    sbpatch.load(tmp_path / "none")


def test_a_model_that_cannot_be_saved_leaves_the_old_one(old):
    class Broken(torch.nn.Module):
        def state_dict(self, *args, **kwargs):
            raise RuntimeError("disk full")

    before = contents(old)
    checkpoint = type("C", (), {"model": Broken(), "family": "timm"})()
    with pytest.raises(RuntimeError, match="disk full"):
        artifact.save(old, checkpoint, plan_for(t2t()))
    assert contents(old) == before
