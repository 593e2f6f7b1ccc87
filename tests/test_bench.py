"""`bench`: the rows are what the contract says and what a direct computation gives, on random calls and on a model's."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from PIL import Image
from rich.console import Console
from tiny import refused, t2t
from torch import Tensor
from typer.testing import CliRunner, Result

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.calibration.costs import clumped
from sbpatch.cli import commands as cli
from sbpatch.errors import SbpatchError
from sbpatch.sites.calls import Call
from sbpatch.sites.fidelity import output_error
from sbpatch.sites.find import Site, find_sites
from sbpatch.sites.swap import swapped
from sbpatch.study import bench, bench_report
from sbpatch.study.bench import bench as run_bench
from sbpatch.study.bench_model import bench_model, joined

SHAPE = {"tokens", "heads", "head_dim", "batch", "causal"}
FIGURES = {"ms", "peak_memory_bytes", "speedup_vs_sdpa", "speedup_vs_eager", "output_error"}
KEYS = SHAPE | FIGURES | {"method", "budget"}


def by_method(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in rows}


def test_rows() -> None:
    rows = run_bench([300], ["clusters", "window+favor"], budget=0.2, heads=2, head_dim=16)
    assert [r["method"] for r in rows] == ["sdpa", "eager", "clusters", "window+favor"]
    assert all(row.keys() == KEYS for row in rows)
    sdpa, eager, clusters, _ = rows
    assert sdpa["speedup_vs_sdpa"] == eager["speedup_vs_eager"] == 1
    assert eager["output_error"] < 1e-5 < clusters["output_error"] < 1
    assert eager["peak_memory_bytes"] > 2 * 300 * 300 * 4 > sdpa["peak_memory_bytes"]
    assert clusters["budget"] == pytest.approx(0.2, abs=1 / 300)
    assert clusters["speedup_vs_sdpa"] == pytest.approx(sdpa["ms"] / clusters["ms"])


def test_eager_is_left_out_where_its_matrix_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "EAGER_BYTES", 2 * 100 * 100 * 4)
    rows = run_bench([100, 101], ["clusters"], budget=0.2, heads=2, head_dim=8)
    assert [(r["tokens"], r["method"]) for r in rows] == [
        *((100, m) for m in ("sdpa", "eager", "clusters")),
        *((101, m) for m in ("sdpa", "clusters")),
    ]
    assert all("speedup_vs_eager" not in row for row in rows[3:])


def test_a_causal_budget_is_of_the_keys_that_a_row_reads() -> None:
    row = by_method(run_bench([300], ["window"], budget=0.2, heads=2, head_dim=8, causal=True))["window"]
    layer = bench.budgeted_layer("window", Geometry(300, 2, 8, causal=True), 0.2, 0)
    assert layer.parameters_used == {"window": 30}  # of 150.5 keys, not of 300
    assert row["budget"] == layer.stored / 150.5 <= 0.2
    assert row["causal"]


def test_a_method_that_cannot_work_is_a_row_with_the_reason() -> None:
    rows = run_bench([40, 400], ["lsh", "clusters"], budget=0.06, heads=1, head_dim=8)
    lsh = {row["tokens"]: row for row in rows if row["method"] == "lsh"}
    assert "raise --budget" in lsh[40]["skipped"]
    assert lsh[40].keys() == SHAPE | {"method", "budget", "skipped"}
    assert lsh[40]["budget"] == 0.06
    assert lsh[400].keys() == KEYS
    causal = by_method(run_bench([300], ["coreset"], budget=0.2, heads=1, head_dim=8, causal=True))
    assert "cannot be causal" in causal["coreset"]["skipped"]


def test_what_is_wrong_at_every_length_is_refused() -> None:
    assert "unknown attention method" in refused(run_bench, [64], ["lhs"])
    assert "not a share" in refused(run_bench, [64], budget=3.0)
    assert "raise --budget" in refused(bench.budgeted_layer, "lsh", Geometry(64, 1, 8), 0.01, 0)


@pytest.mark.parametrize("causal", [False, True])
def test_default_methods_work_somewhere(causal: bool) -> None:
    rows = run_bench([512], budget=0.6, heads=1, head_dim=8, causal=causal)
    assert not [row for row in rows if "skipped" in row]
    assert rows[-1]["method"] == "auto"


def structured(tokens: int = 512) -> tuple[Call, Site]:
    call = Call(*clumped(1, 2, 2, tokens, 16))
    return call, Site("random", "", Geometry(tokens, 2, 16))


def test_auto_is_the_best_candidate_that_is_not_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    call, site = structured()
    monkeypatch.setattr(bench, "elapsed_ms", lambda work, device: (work(), 1.0))  # all are as fast as SDPA
    layer = bench.automatic(call, site, 0.1, 0)
    assert layer is not None
    assert layer.stored <= 0.1 * 512
    best = float(output_error(call.through(layer), call.exact()).mean())
    for method in ("clusters", "lsh+clusters", "window", "coreset"):
        other = bench.budgeted_layer(method, site.geometry, 0.1, 0)
        assert best <= float(output_error(call.through(other), call.exact()).mean())
    row = by_method(bench.call_rows(call, site, ["auto"], 0.1, 0))["auto"]
    assert row.keys() == KEYS | {"chosen"}
    assert (row["chosen"], row["budget"]) == (layer.method, layer.stored / 512)
    assert row["output_error"] == pytest.approx(best)


def test_auto_is_exact_where_nothing_is_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    call, site = structured(64)

    def measured(work: Any, device: torch.device) -> tuple[Tensor, float]:
        fast = getattr(work, "__func__", None) is Call.exact
        return work(), 1.0 if fast else 2.0

    monkeypatch.setattr(bench, "elapsed_ms", measured)
    assert bench.automatic(call, site, 0.3, 0) is None
    assert bench.automatic(call, site, 0.001, 0) is None  # too little for any candidate
    rows = by_method(bench.call_rows(call, site, ["auto"], 0.3, 0))
    assert rows["auto"] == rows["sdpa"] | {"method": "auto", "chosen": "exact"}


# ---- a model's calls


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def ids(tokens: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    found = torch.randint(3, len(tiny_text.VOCABULARY), (1, tokens), generator=draw)
    return {"input_ids": found, "attention_mask": torch.ones_like(found)}


@torch.inference_mode()
def test_rows_of_an_image_model_are_its_own_calls() -> None:
    model, x = t2t(depth=2), images(1, 0)
    before = model(x)
    rows = bench_model(model, [(x, images(1, 1))], ["clusters", "auto"], budget=0.2)
    assert torch.equal(model(x), before)  # left as it was
    assert [(r["tokens"], r["sites"], r["method"]) for r in rows] == [
        (tokens, sites, method)
        for tokens, sites in ((256, 1), (64, 1), (17, 2))
        for method in ("sdpa", "eager", "clusters", "auto")
    ]
    assert all(row.keys() == KEYS | {"sites"} | ({"chosen"} & row.keys()) for row in rows)
    assert all(row["speedup_vs_eager"] > 0 for row in rows)

    site = find_sites(model, x)[0]
    layer = bench.budgeted_layer("clusters", site.geometry, 0.2, 0)
    errors = []

    def observe(call: Call) -> Tensor:
        errors.append(float(output_error(call.through(layer), call.exact()).mean()))
        return call.exact()

    with swapped(model, {site.name: observe}):
        model(x)
    assert rows[2]["output_error"] == pytest.approx(errors[0])
    assert rows[2]["budget"] == layer.stored / 256


@torch.inference_mode()
def test_parts_are_fitted_to_another_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = t2t(), images(1, 0)
    fitted = []

    def layer(*args: Any) -> Scatterbrain:
        fitted.append(args[-1])
        return sized(*args)

    sized = bench.budgeted_layer
    monkeypatch.setattr(bench, "budgeted_layer", layer)
    errors = [
        bench_model(model, [(x, images(1, seed))], ["coreset"], budget=0.1, pattern="*attention1*")[-1]["output_error"]
        for seed in (1, 1, 2)
    ]
    assert errors[0] == errors[1] != errors[2]
    assert fitted[0][0].shape == (1, 16, 16)


@torch.inference_mode()
def test_rows_of_a_causal_text_model() -> None:
    samples = [(ids(tokens, 0), ids(tokens, 1)) for tokens in (96, 300)]
    rows = bench_model(tiny_text.llama(), samples, ["window", "clusters"], budget=0.2)
    assert {r["tokens"] for r in rows} == {96, 300}
    window = next(r for r in rows if r["method"] == "window" and r["tokens"] == 300)
    assert (window["sites"], window["heads"], window["head_dim"], window["causal"]) == (2, 4, 8, True)  # grouped heads
    assert window["budget"] == bench.budgeted_layer("window", Geometry(300, 4, 8, True), 0.2, 0).stored / 150.5
    assert all("cannot be causal; use blocks" in r["skipped"] for r in rows if r["method"] == "clusters")


@torch.inference_mode()
def test_rows_of_an_encoder() -> None:
    rows = bench_model(tiny_text.bert(), [(ids(96, 0), ids(96, 1))], ["coreset"], budget=0.2, pattern="*layer.1*")
    assert [(r["method"], r["sites"], r["causal"]) for r in rows] == [
        (m, 1, False) for m in ("sdpa", "eager", "coreset")
    ]


def test_sites_that_nothing_matches_are_refused() -> None:
    pair = (images(1, 0), images(1, 1))
    said = refused(bench_model, t2t(), [pair], pattern="layer*")
    assert "no attention site matches 'layer*' of --site: the sites are tokens_to_token.attention1" in said


def test_rows_of_sites_are_joined() -> None:
    shape = {"tokens": 10, "heads": 1, "head_dim": 4, "batch": 1, "causal": False}

    def site(ms: float, **auto: Any) -> list[dict[str, Any]]:
        figures = {"budget": 0.5, "ms": ms, "peak_memory_bytes": int(10 * ms), "output_error": ms / 100}
        sdpa = shape | {"method": "sdpa"} | figures | {"ms": 2 * ms}
        return [sdpa, shape | {"method": "auto"} | figures | auto]

    _, auto = joined([site(1, chosen="lsh"), site(3, chosen="exact"), site(2, chosen="exact")])
    assert auto == shape | {
        "method": "auto", "sites": 3, "chosen": "2 exact, 1 lsh", "budget": 0.5, "ms": 6, "peak_memory_bytes": 30,
        "output_error": pytest.approx(0.02), "speedup_vs_sdpa": 2,
    }  # fmt: skip
    _, auto = joined([site(1, chosen="lsh"), site(3, chosen="lsh")])
    assert auto["chosen"] == "lsh"
    _, skipped = joined([site(1), [site(1)[0], shape | {"method": "auto", "budget": 0.1, "skipped": "too few"}]])
    assert skipped == shape | {"method": "auto", "sites": 2, "budget": 0.1, "skipped": "too few"}


# ---- what is shown


def test_table_fits_80_columns_and_the_plot_draws(tmp_path: Path) -> None:
    rows = run_bench([64, 256], ["lsh+clusters", "clusters", "auto"], budget=0.1, heads=1, head_dim=8)
    wide = [row | {"sites": 30, "tokens": 65536, "ms": 12345.67} for row in rows]
    for shown in (rows, wide):
        file = io.StringIO()
        Console(width=80, file=file).print(bench_report.table(shown, "one call"))
        text = file.getvalue()
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        for row in shown:
            assert "skipped" in row or f"{row['ms']:.2f}" in text
    assert "lsh+clusters: budget 0.1 of 64 keys" in text
    bench_report.plot(rows, tmp_path / "bench.png", "one call")
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.format == "PNG"
        low, high = picture.convert("L").getextrema()
        assert high - low > 100  # something is drawn


# ---- the command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with tiny language models and a text for them."""
    monkeypatch.chdir(tmp_path)
    for name, model in (("llama", tiny_text.llama()), ("bert", tiny_text.bert())):
        model.save_pretrained(name)
        tiny_text.words().save_pretrained(name)
    Path("text.txt").write_text(tiny_text.prose(), encoding="utf-8")
    return tmp_path


def command(*args: str) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *args])


def test_command_on_random_calls(place: Path) -> None:
    done = command("--lengths", "64,256", "--methods", "clusters", "--json", "-", "--quiet", "--plot", "b.png")
    assert done.exit_code == 0, done.output
    assert {"device", "dtype", "rows", "versions"} == json.loads(done.stdout).keys()
    assert Image.open("b.png").format == "PNG"


def test_command_on_an_image_model(place: Path) -> None:
    args = ("--methods", "clusters,auto", "--site", "tokens*", "--json", "m.json", "--plot", "b.png")
    done = command("t2t-vit-demo", *args)
    assert done.exit_code == 0, done.output
    assert "1 x 3136" in done.stdout
    result = json.loads(Path("m.json").read_text())
    assert result.keys() == {"device", "dtype", "rows", "versions", "model"}
    assert result["model"] == "t2t-vit-demo"
    assert [(row["tokens"], row["method"]) for row in result["rows"]] == [
        (tokens, method) for tokens in (3136, 784) for method in ("sdpa", "eager", "clusters", "auto")
    ]
    assert Image.open("b.png").format == "PNG"


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_command_on_text_models(place: Path, model: str) -> None:
    args = ("--data", "text.txt", "--lengths", "64,150", "--methods", "window", "--budget", "0.2")
    done = command(model, *args, "--quiet", "--json", "-")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [(r["tokens"], r["sites"]) for r in rows if r["method"] == "window"] == [(64, 2), (150, 2)]
    assert {r["causal"] for r in rows} == {model == "llama"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--lengths", "12,x"], "not positive numbers"),
        (["--methods", "auto,lhs"], "unknown attention method 'lhs'"),
        (["--site", "x", "--data", "demo"], "--data, --site without a MODEL"),
        (["t2t-vit-demo", "--causal"], "--causal with a MODEL"),
        (["t2t-vit-demo", "--lengths", "1000"], "give --input-size, not --lengths"),
        (["t2t-vit-demo", "--site", "x"], "no attention site matches 'x' of --site"),
        (["llama", "--data", "text.txt", "--lengths", "64,900"], "positions for 512 tokens, not 900"),
        (["--plot", "nowhere/x.png"], "cannot write"),
    ],
)
def test_command_refuses(place: Path, args: list[str], said: str) -> None:
    done = command(*args)
    assert isinstance(done.exception, SbpatchError)
    assert said in str(done.exception)
    assert "\n" not in str(done.exception)
    assert done.stdout == ""
