"""`compare` and `bench`: the rows are what the contract says and what a direct computation gives."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from PIL import Image
from tiny import process, t2t

from sbpatch import bench, compare
from sbpatch.attention import Geometry
from sbpatch.bench import bench as run_bench
from sbpatch.calibrate import calibrate
from sbpatch.errors import SbpatchError
from sbpatch.patch import patch, unpatch

METHODS = ["window", "naive:lsh+favor", "lsh+favor", "clusters", "auto", "nystromformer"]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return t2t()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def test_rows_of_a_comparison(model: torch.nn.Module) -> None:
    x = images(4)
    with torch.inference_mode():
        exact = model(x)
    labels = exact.argmax(-1).clone()
    labels[0] = (labels[0] + 1) % exact.shape[-1]
    rows = compare.compare(model, [x], [(x[:2], labels[:2]), (x[2:], labels[2:])], methods=METHODS, budgets=[0.1, 0.2])
    assert [r["method"] for r in rows] == ["exact", *METHODS, *METHODS]
    assert rows[0] | {"latency_ms": 0} == {
        "method": "exact",
        "budget": 1.0,
        "top1": 75.0,
        "agreement": 100.0,
        "latency_ms": 0,
    }
    for row, asked in zip(rows[1:], [0.1] * len(METHODS) + [0.2] * len(METHODS), strict=True):
        assert row["budget"] <= asked
        assert {"top1", "agreement", "matrix_error", "output_error", "latency_ms", "sites"} <= row.keys()
        assert all(site["budget"] <= asked for site in row["sites"]) or row["method"] == "auto"
        if "+" in row["method"]:
            assert all(site["method"] == row["method"] for site in row["sites"])  # joined, and naive where so asked
    with torch.inference_mode():
        assert torch.equal(model(x), exact)  # left as it was


def test_a_row_is_the_patched_model(model: torch.nn.Module) -> None:
    x = images(4)
    labels = torch.zeros(4, dtype=torch.long)
    row = compare.compare(model, [x], [(x, labels)], methods=["window"], budgets=[0.1])[1]
    plan = calibrate(model, [x], budget=0.1, method="window", uniform=True)
    patch(model, plan)
    try:
        with torch.inference_mode():
            predicted = model(x).argmax(-1)
    finally:
        unpatch(model)
    assert row["top1"] == 100 * (predicted == labels).float().mean().item()
    assert row["output_error"] == pytest.approx(sum(s.output_error or 0 for s in plan.patched) / len(plan.patched))


def test_what_a_method_cannot_do_is_said(model: torch.nn.Module) -> None:
    x = images(2)
    rows = compare.compare(model, [x], [(x, torch.zeros(2, dtype=torch.long))], methods=["lsh"], budgets=[0.001])
    assert "raise --budget" in rows[1]["skipped"]
    with pytest.raises(SbpatchError, match="unknown attention method"):
        compare.compare(model, [x], [(x, torch.zeros(2, dtype=torch.long))], methods=["lhs"], budgets=[0.1])


def test_bench_rows() -> None:
    rows = run_bench([300], ["clusters", "window+favor"], budget=0.2, heads=2, head_dim=16)
    assert [r["method"] for r in rows] == ["sdpa", "eager", "clusters", "window+favor"]
    sdpa, eager, clusters, _ = rows
    assert sdpa["speedup_vs_sdpa"] == eager["speedup_vs_eager"] == 1
    assert eager["output_error"] < 1e-5 < clusters["output_error"] < 1
    assert eager["peak_memory_bytes"] > 2 * 300 * 300 * 4 > sdpa["peak_memory_bytes"]
    assert clusters["budget"] == pytest.approx(0.2, abs=1 / 300)
    assert clusters["speedup_vs_sdpa"] == pytest.approx(sdpa["ms"] / clusters["ms"])
    with pytest.raises(SbpatchError, match="raise --budget"):
        bench.sized_layer("lsh", Geometry(64, 1, 8), 0.01, 0)


@pytest.mark.slow
def test_command_lines(tmp_path) -> None:
    sbpatch = partial(process, cwd=tmp_path)
    done = sbpatch(
        *("compare", "t2t-vit-demo", "--dataset", "demo", "--methods", "clusters,favor", "--samples", "2"),
        *("--limit", "8", "--json", "c.json", "--plot", "c.png"),
    )
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads((tmp_path / "c.json").read_text())["rows"]}
    assert rows["clusters"]["output_error"] < 0.5 * rows["favor"]["output_error"]
    assert Image.open(tmp_path / "c.png").format == "PNG"
    done = sbpatch("bench", "--lengths", "1024", "--json", "-", "--quiet")
    assert done.returncode == 0, done.stderr
    assert {"device", "dtype", "rows", "versions"} == json.loads(done.stdout).keys()
    for wrong in (
        ["bench", "--lengths", "12,x"],
        ["compare", "t2t-vit-demo", "--dataset", "demo", "--budgets", "much"],
    ):
        done = sbpatch(*wrong)
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1
