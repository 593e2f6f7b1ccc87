"""The command line: what users type, what they get back, and one clear line where it cannot be."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import onnxruntime
import pytest
import torch
from PIL import Image
from tiny import ROOT, command, process, t2t
from tiny_text import bert, llama, prose, words

import sbpatch
from sbpatch.calibration.costs import default_path
from sbpatch.data.sources import batches, open_images
from sbpatch.data.texts import open_text
from sbpatch.data.tokens import windows
from sbpatch.evaluation import variants
from sbpatch.models.load import load_checkpoint

CALIBRATED = ["README.md", "config.json", "model.safetensors", "report.png", "sbpatch.json", "sbpatch.safetensors"]
QUICK = ["--samples", "3", "--budget", "0.2", "--data", "images", "--quiet", "--keep-slow"]


def jpeg(level: int) -> bytes:
    file = BytesIO()
    Image.radial_gradient("L").resize((80, 64)).point(lambda v: (v + level) % 256).convert("RGB").save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with a tiny model, images of three classes, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sbpatch.data.hub.answers", lambda url: False)
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    torch.save({"state_dict_ema": t2t().state_dict()}, "tiny.pth")
    for i in range(9):
        folder = Path("images", "abc"[i % 3])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(jpeg(25 * i))
    return tmp_path


def files() -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(Path().rglob("*"))}


def fails(capsys, *args: str) -> str:
    """The only line on standard error of a refused command; nothing on standard output, nothing written."""
    before = files()
    assert command(*args) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sbpatch: ")
    assert printed.err.count("\n") == 1
    assert files() == before
    return printed.err


@pytest.fixture
def patched(place) -> Path:
    assert command("calibrate", "tiny.pth", "-o", "out", *QUICK) == 0
    return Path("out")


# ---- what comes back


def test_inspect(capsys, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    assert command("inspect", "tiny.pth", "--json", "-", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "tiny.pth"
    assert [(s["name"], s["tokens"], s["decision"]) for s in found["sites"]] == [
        ("tokens_to_token.attention1.attn", 256, "exact"),
        ("tokens_to_token.attention2.attn", 64, "exact"),
        ("blocks.0.attn", 17, "exact"),
    ]
    assert all(0 < s["exact_ms"] <= s["patched_ms"] / 0.9 for s in found["sites"])
    costs = json.loads(default_path().read_text())
    slow = {key: 1e6 if key.endswith(": exact") and ": 256 x" in key else ms for key, ms in costs["ms"].items()}
    assert len(slow) == 6  # exact attention and the cheapest patch of three sites
    default_path().write_text(json.dumps({"ms": slow}))
    assert command("inspect", "tiny.pth", "--json", "-", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["decision"] for s in found["sites"]] == ["patch", "exact", "exact"]
    assert command("inspect", "tiny.pth", "--input-size", "128") == 0
    assert {"1024", "256"} <= set(capsys.readouterr().out.split())
    assert [str(p) for p in Path().iterdir() if p.name not in ("images", "tiny.pth")] == []


def test_a_drop_in_place_of_a_budget(capsys):
    """The smallest budget that keeps a loose promise; settings reach the plan, and nothing of the run is left beside it."""
    before = files()
    quick = ["--samples", "6", "--data", "images", "--quiet", "--keep-slow", "--method", "clusters", "--json", "-"]
    assert command("calibrate", "tiny.pth", "-o", "out", "--max-drop", "60", "--refine", *quick) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["max_drop"] == 60
    assert plan["check"]["drop"] <= 60
    assert {name.split("/")[0] for name in files().keys() - before.keys()} == {"out"}
    assert command("calibrate", "tiny.pth", "--budget", "0.2", "--max-drop", "60", *quick) == 2
    assert "not both" in capsys.readouterr().err


def test_calibrate_writes_a_directory_that_loads(capsys):
    assert command("calibrate", "tiny.pth", "-o", "out", *QUICK, "--json", "plan.json", "--method", "clusters") == 0
    assert capsys.readouterr().out == ""
    assert sorted(p.name for p in Path("out").iterdir()) == CALIBRATED
    plan = json.loads(Path("plan.json").read_text())
    assert plan == json.loads(Path("out/sbpatch.json").read_text())
    assert plan.keys() >= {"model", "seed", "versions", "sites", "budget", "base_sha256"}
    assert plan["budget"].keys() == {"requested", "used", "model"}
    assert plan["budget"]["requested"] == 0.2
    assert 0 < plan["budget"]["used"] <= 0.2 < plan["budget"]["model"] < 1
    assert plan["base_sha256"] == load_checkpoint("tiny.pth").sha256
    assert plan["data"]["samples"] == 3
    (site,) = [s for s in plan["sites"] if s["decision"] == "patch"]
    assert site.keys() >= {
        "method",
        "rank",
        "nnz",
        "budget",
        "entropy",
        "entropy_ratio",
        "matrix_error",
        "output_error",
    }
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.isfinite(sbpatch.load("out")(x)).all()


def test_calibrate_prints_a_table_and_the_next_command(capsys):
    assert command("calibrate", "tiny.pth", "-o", "out", *[a for a in QUICK if a != "--quiet"]) == 0
    printed = capsys.readouterr()
    assert "tokens_to_token.attention1.attn" in printed.out
    assert "sbpatch eval out" in printed.out
    assert "Traceback" not in printed.err


def test_two_runs_write_the_same_files(patched):
    first = {p.name: p.read_bytes() for p in patched.iterdir()}
    assert command("calibrate", "tiny.pth", "-o", "out", *QUICK) == 0
    assert {p.name: p.read_bytes() for p in patched.iterdir()} == first
    assert command("calibrate", "tiny.pth", "-o", "out", *QUICK, "--seed", "1") == 0
    assert (patched / "sbpatch.json").read_bytes() != first["sbpatch.json"]


def test_dry_run_writes_nothing(capsys):
    before = files()
    assert command("calibrate", "tiny.pth", *QUICK, "--dry-run", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["budget"]["used"] <= 0.2
    assert files() == before


def test_recipe_and_the_flags_before_it(capsys):
    Path("r.yaml").write_text(
        "budget: 0.3\nmin_tokens: 64\nsites:\n"
        "  '*attention1*': {method: window, window: 11}\n  '*2*': {method: clusters, rank: 5}"
    )
    run = ["calibrate", "tiny.pth", "--data", "images", "--samples", "3", "--quiet", "--dry-run", "--json", "-"]
    run.append("--keep-slow")
    assert command(*run, "--recipe", "r.yaml") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["budget"]["requested"] == 0.3
    assert [s.get("window", s.get("rank")) for s in plan["sites"] if s["decision"] == "patch"] == [11, 5]
    assert command(*run, "--recipe", "r.yaml", "--budget", "0.25", "--exclude", "*2*") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["budget"]["requested"] == 0.25
    assert [s["decision"] for s in plan["sites"]] == ["patch", "exact", "exact"]


@torch.inference_mode()
def test_evaluated_model_is_the_one_that_loads(patched):
    checkpoint = load_checkpoint(str(patched))
    x, _ = next(batches(open_images("images", checkpoint.preprocessing), 9))
    logits = {v: variants.build(variants.Subject(str(patched)), v, x[:1])(x) for v in variants.VARIANTS}
    assert torch.equal(logits["patched"], sbpatch.load(patched)(x))
    assert torch.equal(logits["sdpa"], t2t()(x))
    assert not torch.equal(logits["patched"], logits["sdpa"])
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-4, rtol=1e-4)


# ---- text models


@pytest.fixture
def texts(place) -> Path:
    """Tiny language models in Hugging Face layout, and a text for them."""
    for name, model in (("llama", llama()), ("bert", bert())):
        model.save_pretrained(name)
        words().save_pretrained(name)
    Path("text.txt").write_text(prose(), encoding="utf-8")
    return place


TEXT = ["--samples", "3", "--budget", "0.3", "--data", "text.txt", "--length", "300", "--quiet"]


@pytest.mark.parametrize(
    ("model", "length", "sites"),
    [
        ("llama", None, [("model.layers.0.self_attn", 512, True), ("model.layers.1.self_attn", 512, True)]),
        ("llama", "300", [("model.layers.0.self_attn", 300, True), ("model.layers.1.self_attn", 300, True)]),
        ("bert", "300", [(f"encoder.layer.{i}.attention.self", 300, False) for i in range(2)]),
    ],
)
def test_inspect_of_text_models(texts, capsys, model, length, sites):
    options = [] if length is None else ["--length", length]
    assert command("inspect", model, *options, "--json", "-", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)["sites"]
    assert [(s["name"], s["tokens"], s["causal"]) for s in found] == sites
    for site in found:  # as it was timed on this machine
        pays = site["patched_ms"] < 0.9 * site["exact_ms"]
        assert site["decision"] == ("patch" if pays else "exact")


@pytest.mark.slow
@torch.inference_mode()
def test_perplexity(texts):
    """Windows of 64 with 40 new tokens each, against the sum by hand."""
    args = ("--length", "64", "--stride", "40", "--limit", "5", "--json", "eval.json", "--quiet")
    assert command("eval", "llama", "--dataset", "text.txt", *args) == 0
    result = json.loads(Path("eval.json").read_text())
    assert (result["dataset"], result["samples"], result["length"]) == ("text.txt, last 3/4", 5, 64)
    assert result["batch_size"] == 1
    checkpoint = load_checkpoint("llama", None, 64)
    nll = []
    for inputs, labels in windows(open_text("text.txt"), checkpoint.preprocessing, stride=40, limit=5):
        logits = checkpoint.model(input_ids=inputs["input_ids"][None]).logits[0].double()
        nll += (-logits.log_softmax(-1)[labels >= 0, labels[labels >= 0]]).tolist()
    measured = {
        "latency_ms",
        "samples_per_second",
        "peak_memory_bytes",
        "attention_memory_bytes",
        "time_to_first_token_ms",
    }
    assert result["variants"]["eager"].keys() == measured  # of five batches it ran three
    exact = result["variants"]["sdpa"]
    assert exact.keys() == measured | {"perplexity", "agreement"}
    assert exact["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert exact["agreement"] == 100


@pytest.mark.slow
@pytest.mark.parametrize(("model", "figure"), [("llama", "perplexity"), ("bert", "cosine")])
def test_text_models_from_calibration_to_evaluation(texts, capsys, model, figure):
    Path("r.yaml").write_text("sites: {'*': {method: window, window: 31}}")
    assert command("calibrate", model, *TEXT, "--recipe", "r.yaml", "--json", "plan.json") == 0
    plan = json.loads(Path("plan.json").read_text())
    assert plan["input_size"] == [300]
    assert plan["data"]["source"] == "text.txt, first 1/4"
    assert {s["decision"] for s in plan["sites"]} == {"patch"}
    assert command("eval", "--dataset", "text.txt", "--limit", "3", "--json", "eval.json") == 0
    assert figure in capsys.readouterr().out
    result = json.loads(Path("eval.json").read_text())
    assert (result["model"], result["length"]) == (model, 300)
    assert result["variants"].keys() == {"eager", "sdpa", "patched"}
    eager, exact, patched = (result["variants"][name] for name in ("eager", "sdpa", "patched"))
    assert eager[figure] == pytest.approx(exact[figure], rel=1e-3)
    assert patched[figure] != exact[figure]
    assert patched["attention_memory_bytes"] < eager["attention_memory_bytes"]


@pytest.mark.slow
def test_a_causal_plan_at_four_times_its_length(texts, capsys):
    """The share of the keys stays; an encoder's plan, which no rule scales, is refused."""
    at = ["--data", "text.txt", "--samples", "2", "--quiet", "--length", "128", "--recipe"]
    Path("blocks.yaml").write_text(
        "budget: 0.7\nsites: {'*': {method: blocks, near: 16, block: 16, blocks: 1, tile: 16}}"
    )
    Path("window.yaml").write_text("budget: 0.7\nsites: {'*': {method: window, window: 31}}")
    assert command("calibrate", "llama", *at, "blocks.yaml") == 0
    assert command("eval", "--dataset", "text.txt", "--length", "512", "--limit", "2", "--json", "eval.json") == 0
    assert "(calibrated at 128, the same share of the keys read)" in " ".join(capsys.readouterr().out.split())
    result = json.loads(Path("eval.json").read_text())
    assert (result["length"], result["calibrated_length"]) == (512, 128)
    exact, patched = result["variants"]["sdpa"], result["variants"]["patched"]
    assert 0.5 * exact["perplexity"] < patched["perplexity"] != exact["perplexity"]
    assert 100 > patched["agreement"] > 50
    assert command("calibrate", "bert", *at, "window.yaml", "-o", "encoder") == 0
    said = fails(capsys, "eval", "encoder", "--dataset", "text.txt", "--length", "256")
    assert "encoder was calibrated at 128 tokens: calibrate again for a --length of 256" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["eval", "llama", "--dataset", "nowhere.txt"], "no such file: nowhere.txt"),
        (["eval", "llama", "--dataset", "demo"], "demo holds images, and this model takes text"),
        (["eval", "llama", "--dataset", "images"], "images is a directory"),
        (["eval", "llama", "--dataset", "wikitext-2", "--data-dir", "images"], "none of wiki.valid.raw"),
        (["eval", "llama", "--dataset", "text.txt", "--length", "600"], "512"),
        (["eval", "llama", "--dataset", "text.txt", "--length", "60", "--stride", "61"], "a stride of 61"),
        (["eval", "bert", "--dataset", "text.txt", "--stride", "40"], "--stride is for models that predict"),
        (["calibrate", "llama", "--data", "cifar10", "-o", "new"], "cifar10 holds images"),
        (["calibrate", "llama", "--data", "short.txt", "-o", "new"], "too few for a window of 512"),
        (["calibrate", "llama", "--input-size", "64", "-o", "new"], "llama takes text: give --length"),
        (["calibrate", "bert", "--data", "text.txt", "--samples", "64", "-o", "new"], "paragraphs of at least 200"),
        (["inspect", "tiny.pth", "--length", "64"], "tiny.pth takes no text: give --input-size"),
        (["calibrate", "tiny.pth", "--data", "text.txt", "-o", "new"], "text.txt is text, and this model takes images"),
        (["eval", "tiny.pth", "--dataset", "wikitext-2"], "wikitext-2 is text, and this model takes images"),
    ],
)
def test_texts_and_models_that_do_not_go_together(texts, capsys, args, said):
    Path("short.txt").write_text("w1 w2 w3\n" * 20)
    assert said in fails(capsys, *args, "--quiet")


# ---- export


@pytest.mark.parametrize("form", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("pt2", "onnx")), "safetensors"])
@torch.inference_mode()
def test_exported_model_gives_the_same_logits(patched, form, capsys):
    assert command("export", "out", "--format", form, "--quiet", "--json", "-") == 0
    result = json.loads(capsys.readouterr().out)
    path = Path(result["path"])
    assert path.name == {"pt2": "out.pt2", "onnx": "out.onnx", "safetensors": "out-export"}[form]
    assert result["difference"] < 1e-4
    x = torch.randn(4, 3, 64, 64)  # another batch size than it was exported with
    expected = sbpatch.load("out")(x)
    if form == "pt2":
        found = torch.export.load(path).module()(x)
    elif form == "onnx":
        found = torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"images": x.numpy()})[0])
    else:
        found = sbpatch.load(path)(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert {p.name for p in Path().iterdir()} == {"images", "tiny.pth", "out", path.name}


def test_version_and_help(capsys):
    assert command("--version") == 0
    assert sbpatch.__version__ in capsys.readouterr().out
    for name in ("inspect", "calibrate", "eval", "export"):
        assert command(name, "--help") == 0
        assert "--json" in capsys.readouterr().out


# ---- what is refused


def odd_checkpoint(change) -> str:
    state = dict(t2t().state_dict())
    change(state)
    torch.save(state, "odd.pth")
    return "odd.pth"


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda: "~nobody-here/model", "no such file or directory"),
        (lambda: "nowhere.pth", "no such file or directory: nowhere.pth"),
        (lambda: Path("cut.pth").write_bytes(Path("tiny.pth").read_bytes()[:9000]) and "cut.pth", "damaged"),
        (lambda: odd_checkpoint(lambda s: s.pop("norm.bias")), "lacks norm.bias"),
        (lambda: odd_checkpoint(lambda s: s.update(extra=torch.zeros(1))), "has unknown extra"),
        (lambda: odd_checkpoint(lambda s: s.update({"norm.bias": torch.zeros(3)})), "wrong shape for norm.bias"),
        (lambda: "vit_tinny_patch16_224", "did you mean"),
        (lambda: "t2t-vit-dmo", "t2t-vit-demo"),
        (lambda: "images", "config.json"),
        (lambda: "timm/test_vit.r160_in1k", "--checkpoint FILE"),
    ],
)
@pytest.mark.parametrize("verb", ["inspect", "calibrate", "eval"])
def test_models_that_cannot_be_had(capsys, verb, prepare, said, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options = {"inspect": [], "calibrate": ["-o", "new"], "eval": ["--dataset", "images"]}[verb]
    assert said in fails(capsys, verb, prepare(), *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "dem0"], "did you mean demo"),
        (["--data", "empty"], "one folder of images per class"),
        (["--data", "hollow"], "one folder of images per class"),
        (["--data", "nowhere/at/all"], "no such file or directory"),
        (["--data", "broken", "--samples", "2"], "cannot be read as an image"),
        (["--data", "images", "--samples", "10"], "has 9 images, 10 were asked for"),
        (["--budget", "0.0001"], "budget 0.0001"),
        (["--budget", "0"], "budget 0 is not a share"),
        (["--budget", "1.5"], "budget 1.5 is not a share"),
        (["--method", "clusers"], "did you mean clusters"),
        (["--method", "window+lsh"], "two sparse parts"),
        (["--exclude", "*"], "nothing to patch"),
        (["--include", "typo*"], "no attention site matches 'typo*' of --include"),
        (["--include", "*attention1*", "--include", "typo*"], "'typo*' of --include"),
        (["--recipe", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["--recipe", "tiny.pth"], "tiny.pth"),
        (["--recipe", "bad.yaml"], "budgte"),
        (["--recipe", "site.yaml"], "window"),
        (["--recipe", "list.yaml"], "list.yaml"),
        (["-o", "images"], "holds something else"),
        (["-o", "tiny.pth"], "is a file"),
        (["-o", "no/where"], "no directory"),
        (["-o", "."], "the current directory"),
        (["--data", "~nobody-here/images"], "no such file or directory"),
        (["--input-size", "100"], "multiple of 16"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_calibrations_that_cannot_be(capsys, options, said):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    for folder in ("empty", "hollow/a", "hollow/b", "broken/a", "broken/b"):
        Path(folder).mkdir(parents=True)
    Path("broken/a/1.jpg").write_bytes(jpeg(1)[:200])
    Path("broken/b/2.jpg").write_bytes(jpeg(1))
    Path("bad.yaml").write_text("budgte: 0.3")
    Path("site.yaml").write_text("sites: {'*': {method: window, window: wide}}")
    Path("list.yaml").write_text("- 1\n- 2")
    assert said in fails(capsys, "calibrate", "tiny.pth", "-o", "new", *QUICK, *options)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["eval", "--dataset", "images"], "sbpatch calibrate MODEL -o sbpatch-out"),
        (["eval", "out", "--dataset", "dem0"], "did you mean demo"),
        (["eval", "out", "--dataset", "broken"], "1 of 2 images cannot be read, the first is broken/a/1.jpg"),
        (["eval", "out", "--dataset", "imagenet-val", "--data-dir", "images"], "neither class folders"),
        (["export"], "sbpatch calibrate MODEL -o sbpatch-out"),
        (["export", "images"], "no plan at images/sbpatch.json"),
        (["export", "out", "-o", "images"], "images"),
        (["export", "out", "-o", "no/where.pt2"], "cannot write no/where.pt2"),
        (["export", "out", "--format", "safetensors", "-o", "images"], "holds something else"),
        (["export", "out", "--format", "safetensors", "-o", "out/copy"], "into itself"),
        (["export", "damaged"], "damaged/sbpatch.json is not a plan"),
    ],
)
def test_evaluations_and_exports_that_cannot_be(patched, capsys, args, said):
    for name in ("broken/a", "broken/b", "damaged"):
        Path(name).mkdir(parents=True)
    Path("broken/a/1.jpg").write_bytes(jpeg(1)[:200])
    Path("broken/b/2.jpg").write_bytes(jpeg(1))
    Path("damaged/sbpatch.json").write_text("{")
    assert said in fails(capsys, *args, "--quiet")


@pytest.mark.parametrize("target", ["images", "no/where.json"])
def test_json_has_a_place_to_go(capsys, target):
    """And is refused before the work, not after it."""
    assert f"cannot write {target}" in fails(capsys, "calibrate", "tiny.pth", *QUICK, "-o", "new", "--json", target)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["calibrat", "tiny.pth"],
        ["calibrate"],
        ["calibrate", "tiny.pth", "--samples", "0"],
        ["calibrate", "tiny.pth", "--budget", "much"],
        ["calibrate", "tiny.pth", "--seed", "-1"],
        ["calibrate", "tiny.pth", "--device", "tpu"],
        ["calibrate", "tiny.pth", "--nonsense"],
        ["eval", "tiny.pth"],
        ["eval", "tiny.pth", "--dataset", "images", "--limit", "0"],
        ["export", "out", "--format", "exe"],
    ],
)
def test_wrong_use_is_code_2(args, capsys):
    before = files()
    assert command(*args) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert files() == before


# ---- as users run it


def test_help_waits_for_no_slow_import():
    """What lists the commands, and what a program imports before it asks for something."""
    script = "import sys, sbpatch, sbpatch.cli; print({'torch', 'timm', 'transformers', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_the_package_has_the_names_that_it_lists():
    assert all(getattr(sbpatch, name) is not None for name in sbpatch.__all__)
    assert {*sbpatch.__all__} <= {*dir(sbpatch)}
    with pytest.raises(AttributeError, match="no attribute 'calibrated'"):
        sbpatch.calibrated  # noqa: B018


@pytest.mark.slow
def test_refusal_of_the_real_process():
    run = process("calibrate", "t2t-vit-dmeo", "-o", "new")
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("sbpatch: unknown model 't2t-vit-dmeo': did you mean t2t-vit-demo")
    assert run.stderr.count("\n") == 1
    assert not Path("new").exists()


@pytest.mark.slow
def test_demo_from_calibration_to_evaluation():
    Path("fixed.yaml").write_text(
        "sites:\n  '*attention1*': {method: clusters, rank: 90}\n"
        "  '*attention2*': {method: window2d+clusters, window: 3, rank: 20}"
    )
    run = process(
        "calibrate",
        "t2t-vit-demo",
        "--samples",
        "2",
        "--budget",
        "0.05",
        "--recipe",
        "fixed.yaml",
        "--json",
        "plan.json",
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert json.loads(Path("plan.json").read_text())["data"]["source"] == "demo"
    assert sorted(p.name for p in Path("sbpatch-out").iterdir()) == CALIBRATED

    run = process("eval", "--dataset", "demo", "--limit", "8", "--json", "eval.json")
    assert run.returncode == 0, run.stderr
    result = json.loads(Path("eval.json").read_text())
    assert result.keys() >= {"model", "dataset", "samples", "device", "dtype", "versions", "variants"}
    assert (result["model"], result["dataset"], result["samples"]) == ("t2t-vit-demo", "demo", 8)
    eager, exact, patched = (result["variants"][name] for name in ("eager", "sdpa", "patched"))
    for figures in (eager, exact, patched):
        assert figures.keys() == {
            *(
                "top1",
                "top5",
                "agreement",
                "latency_ms",
                "samples_per_second",
                "peak_memory_bytes",
                "attention_memory_bytes",
            )
        }
    assert exact["agreement"] == eager["agreement"] == 100
    assert exact["top1"] == eager["top1"] > 80
    assert patched["agreement"] > 70
    # one 3136 x 3136 matrix a sample, twice, in float32, against the few entries that the patch holds
    assert eager["peak_memory_bytes"] > 8 * 2 * 4 * 3136**2 > 4 * patched["peak_memory_bytes"]
    assert eager["attention_memory_bytes"] == 4 * (3136**2 + 784**2 + 4 * 2 * 197**2)
