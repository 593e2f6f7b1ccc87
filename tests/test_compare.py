"""`compare`: the rows are what the contract says and what a direct computation gives."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import pytest
import tiny_text
import torch
from PIL import Image
from rich.console import Console
from tiny import process, t2t
from torch import Tensor, nn

from sbpatch.calibration.stages import calibrate
from sbpatch.data.batch import Inputs
from sbpatch.errors import SbpatchError
from sbpatch.models.checkpoint import Answer
from sbpatch.plan.patch import patch, unpatch
from sbpatch.plan.recipe import Allocation
from sbpatch.study import compare

METHODS = ["window", "naive:lsh+favor", "lsh+favor", "clusters", "auto", "nystromformer"]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return t2t()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_rows_of_a_comparison(model: torch.nn.Module, tmp_path: Path) -> None:
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
    for name, shown in (("budgets.png", rows), ("methods.png", rows[: len(METHODS) + 1])):
        compare.plot(shown, tmp_path / name, "methods")
        with Image.open(tmp_path / name) as picture:
            low, high = picture.convert("L").getextrema()
            assert high - low > 100  # something is drawn


def test_a_row_is_the_patched_model(model: torch.nn.Module) -> None:
    x = images(4)
    labels = torch.zeros(4, dtype=torch.long)
    row = compare.compare(model, [x], [(x, labels)], methods=["window"], budgets=[0.1])[1]
    plan = calibrate(model, [x], budget=0.1, method="window", allocation="measured", keep_slow=True)
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


ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "entropy", "measured", "joint")


def texts(count: int, tokens: int) -> tuple[dict[str, Tensor], Tensor]:
    """Token ids without padding, and as labels the token that comes next."""
    ids = torch.randint(3, len(tiny_text.VOCABULARY), (count, tokens + 1), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}, ids[:, 1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "quality"),
    [("classes", {"top1", "agreement"}), ("features", {"cosine"}), ("next-token", {"agreement", "perplexity"})],
)
def test_allocations_of_one_method(model: nn.Module, answer: Answer, quality: set[str]) -> None:
    x: Inputs
    if answer == "classes":
        subject, (x, labels) = model, (images(2), torch.zeros(2, dtype=torch.long))
    else:
        subject = tiny_text.bert() if answer == "features" else tiny_text.llama()
        x, labels = texts(2, 256)
    rules = [*ALLOCATIONS, "joint+refine"]
    rows = compare.compare(
        subject, [x], [(x, labels)], methods=["auto"], budgets=[0.5], allocations=rules, answer=answer
    )
    assert [row.get("allocation") for row in rows] == [None, *rules]
    assert [compare.label(row) for row in rows] == ["exact", *(f"auto ({rule})" for rule in rules)]
    assert {row["method"] for row in rows[1:]} == {"auto"}
    for row in rows[1:]:
        assert quality <= row.keys()
        assert row["budget"] <= 0.5
        rule, _, refine = row["allocation"].partition("+")
        plan = calibrate(subject, [x], budget=0.5, answer=answer, allocation=rule, refine=bool(refine), keep_slow=True)
        assert plan.allocation == rule
        assert row["budget"] == plan.budget.used
        errors = [site.output_error if site.decision == "patch" else 0 for site in plan.sites if site.method]
        assert row["output_error"] == pytest.approx(sum(errors) / len(errors))  # type: ignore[arg-type]
    assert len({row["output_error"] for row in rows[1:]}) > 1
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(compare.table(rows, "ablation"))
    assert "auto (entropy)" in console.export_text()


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
    for wrong in (
        ["compare", "t2t-vit-demo", "--dataset", "demo", "--budgets", "much"],
        ["compare", "t2t-vit-demo", "--dataset", "demo", "--allocations", "joint,fair"],
    ):
        done = sbpatch(*wrong)
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1
