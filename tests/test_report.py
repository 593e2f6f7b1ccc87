"""What people read holds the figures of the plan, at any width."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console, RenderableType
from tiny import plan_for, t2t, vit

from sbpatch.plan import report
from sbpatch.plan.card import GREEN, model_card, plot_plan
from sbpatch.plan.hub import front_matter, metadata
from sbpatch.plan.plan import Plan

widths = pytest.mark.parametrize("width", [80, 200])


def rendered(content: RenderableType, width: int) -> str:
    console = Console(width=width, no_color=True, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(content)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    return text


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d.]*", text)


def long_plan() -> Plan:
    """Three patched sites, an exact one, an unsupported one."""
    plan = plan_for(t2t(depth=2), "window+clusters")
    exact, unsupported = plan.sites[2], plan.sites[3]
    exact.decision, exact.reason, unsupported.decision, unsupported.reason = "exact", "few", "unsupported", "a mask"
    for site in (exact, unsupported):
        site.method = site.rank = site.nnz = site.budget = site.matrix_error = site.output_error = None
    plan.settle_budget()
    return plan


def figures(site) -> list[str]:
    """What a row of the plan must say."""
    row = [str(site.tokens), f"{site.entropy_ratio:.2f}"]
    if site.decision == "patch":
        row += [f"{site.nnz:.1f}", str(site.rank), f"{site.budget:.4f}", f"{site.output_error:.4f}"]
    return row


@widths
def test_plan_table_keeps_every_figure(width):
    plan = long_plan()
    text = rendered(report.plan_table(plan), width)
    found = numbers(text)
    for site in plan.sites:
        assert set(figures(site)) <= set(found)
        assert site.reason in text
    for value in (f"{plan.budget.used:.4f}", f"{plan.budget.model:.4f}", "0.2", "87.5"):
        assert value in found
    assert "output" in text
    assert "…" not in text


def test_like_exact_sites_share_a_row_and_patched_ones_do_not():
    plan = plan_for(vit(depth=6), "window+clusters")
    for site in plan.sites[1:5]:
        site.decision, site.reason, site.method = "exact", "few tokens", None
    rows = [line for line in rendered(report.plan_table(plan), 200).splitlines() if re.match(r" *blocks.* 17 ", line)]
    assert len(rows) == 3
    assert "blocks.1.attn and 3 like it" in rows[1]
    for site in plan.sites:
        site.decision, site.reason = "patch", "same"
    assert "like it" not in rendered(report.plan_table(plan), 200)


@widths
def test_sites_table(width):
    plan = long_plan()
    text = rendered(report.sites_table(plan), width)
    for site in plan.sites:
        assert set(numbers(text)) >= {str(site.tokens), str(site.heads), str(site.head_dim)}
    assert "0 + 16x16" in text
    assert "1 + 4x4" in text
    assert "exact: few" in text
    assert "unsupported: a mask" in text
    assert "…" not in text


RESULT = {
    "model": "m", "dataset": "d", "samples": 360, "batch_size": 8, "device": "cpu", "dtype": "float32",
    "versions": {"torch": "2.14"},
    "variants": {
        name: {
            "top1": 90.28 - i, "top5": 99.17 - i, "agreement": 100.0 - i, "latency_ms": 123.4 + 1000 * i,
            "samples_per_second": 64.8 + i, "peak_memory_bytes": 123e6 * (i + 1), "attention_memory_bytes": 4.56e6 + 1e6 * i,
        }
        for i, name in enumerate(("eager", "sdpa", "patched"))
    },
}  # fmt: skip


@widths
def test_eval_table_keeps_every_figure(width):
    text = rendered(report.eval_table(RESULT), width)
    found = set(numbers(text))
    for figures in RESULT["variants"].values():
        assert {f"{figures[k]:.2f}" for k in ("top1", "top5", "agreement")} <= found
        assert f"{figures['latency_ms']:.1f}" in found
    assert {"123", "246", "369"} <= found  # MB
    assert {"9.10", "1.00", "0.53"} <= found  # SDPA's time over the variant's
    assert {"0.50", "1.50"} <= found  # memory over SDPA's
    assert "…" not in text


def test_eval_table_has_a_dash_where_eager_has_no_quality():
    variants = {name: dict(figures) for name, figures in RESULT["variants"].items()}
    assert "eager runs on" not in rendered(report.eval_table(RESULT), 100)
    for key in ("top1", "top5", "agreement"):
        del variants["eager"][key]
    text = rendered(report.eval_table(RESULT | {"variants": variants}), 100)
    row = next(line for line in text.splitlines() if line.split()[:1] == ["eager"])
    assert row.split()[:5] == ["eager", "-", "-", "-", "123.4"]
    assert "eager runs on the first batches alone" in " ".join(text.split())


def test_eval_table_without_labels_or_patch():
    variants = {k: {x: y for x, y in v.items() if x not in ("top1", "top5")} for k, v in RESULT["variants"].items()}
    del variants["patched"]
    text = rendered(report.eval_table(RESULT | {"variants": variants}), 100)
    assert "99.00" in text
    assert "patched" not in text


def text_result(**quality: float) -> dict:
    timed = ("latency_ms", "samples_per_second", "peak_memory_bytes", "attention_memory_bytes")
    variants = {k: {x: v[x] for x in timed} | quality for k, v in RESULT["variants"].items()}
    return RESULT | {"variants": variants, "length": 2048}


@widths
def test_eval_of_a_causal_model_says_when_the_first_token_comes_and_where_perplexity_is_lost(width):
    result = text_result(agreement=91.25, perplexity=17.0, perplexity_to_1k=18.5, perplexity_from_4k=16.25)
    for name, ms in {"eager": 4000.0, "sdpa": 1000.0, "patched": 625.0}.items():
        result["variants"][name] = result["variants"][name] | {"time_to_first_token_ms": ms}
    text = " ".join(rendered(report.eval_table(result), width).split())
    assert "first token: eager 4000.0 ms (0.25x), sdpa 1000.0 ms (1.00x), patched 625.0 ms (1.60x)" in text
    assert "up to the 1,024th token: eager 18.500, sdpa 18.500, patched 18.500" in text
    assert "after that: eager 16.250" in text
    assert "up to the 4,096th" not in text
    assert "left out" not in text
    del result["variants"]["eager"]
    assert "eager is left out" in " ".join(rendered(report.eval_table(result), width).split())


def test_eval_table_of_texts_has_the_columns_that_apply():
    text = rendered(report.eval_table(text_result(agreement=91.25, perplexity=17.0123)), 100)
    assert {"perplexity", "agree", "17.012", "91.25"} <= set(text.split())
    assert not {"top1", "top5", "cosine"} & set(text.split())
    assert "360 samples of 2048 tokens" in text
    text = rendered(report.eval_table(text_result(cosine=0.987654)), 100)
    assert {"cosine", "0.98765"} <= set(text.split())
    assert not {"top1", "agree", "perplexity"} & set(text.split())


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (1e3, "1 kB"), (1.5e6, "1.5 MB"), (2e9, "2 GB"), (3e13, "3e+04 GB")]
)
def test_bytes(count, said):
    assert report.readable_bytes(count) == said


# ---- files


def test_model_card_holds_the_plan():
    plan = long_plan()
    plan.base_sha256 = "c0ffee" * 8
    plan.sites[0].exact_ms, plan.sites[0].patched_ms = 12.5, 3.125
    card = model_card(plan, front_matter(metadata()))
    rows = {line.split("`")[1]: line for line in card.splitlines() if line.startswith("| `")}
    assert list(rows) == [site.name for site in plan.sites]
    for site in plan.sites:
        cells = [cell.strip() for cell in rows[site.name].split("|")[1:-1]]
        assert len(cells) == 14
        assert ("12.5" in cells[11:13]) == ("3.12" in cells[11:13]) == (site is plan.sites[0])
        assert cells[1:3] == [str(site.tokens), str(site.heads)]
        assert cells[3] == f"{site.entropy_ratio:.3f}"
        assert cells[4] == site.decision
        assert cells[-1] == site.reason
        if site.decision == "patch":
            assert cells[5] == site.method
            assert [float(c) for c in cells[6:11]] == pytest.approx(
                [site.nnz, site.rank, site.budget, site.matrix_error, site.output_error], abs=0.06
            )
            assert float(cells[10]) == pytest.approx(site.output_error, abs=1e-4)
            assert float(cells[9]) == pytest.approx(site.matrix_error, abs=1e-3)
    for value in (
        plan.base_sha256,
        f"{plan.budget.used:.4f}",
        f"{plan.budget.model:.4f}",
        "87.5",
        "8 samples of `demo`",
    ):
        assert value in card
    assert f"torch {plan.versions['torch']}" in card
    assert "None" not in card
    assert card.startswith("---\nlibrary_name: sbpatch\n")


def test_model_card_of_a_text_model():
    plan = long_plan()
    plan.input_size = [512]
    card = model_card(plan)
    assert "8 samples (512 tokens each) of `demo`" in card
    assert "agreement with the exact model 87.5 %" in " ".join(card.split())
    plan.check = {}
    assert "agreement" not in model_card(plan)
    assert "None" not in card


@pytest.mark.parametrize("patched", [1, 3, 24])
def test_plot_is_an_image_with_something_on_it(patched, tmp_path):
    plan = plan_for(vit(depth=24, embed_dim=48), "clusters")
    for site in plan.sites[patched:]:
        site.decision, site.entropy = "exact", None if patched == 3 else site.entropy
    path = tmp_path / "report.png"
    plot_plan(plan, path)
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert 1000 < image.width < 4000
        assert 200 < image.height < 4000
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert pixels.std() > 10
    green = np.array([int(GREEN[i : i + 2], 16) for i in (1, 3, 5)])
    assert (np.abs(pixels - green).sum(1) < 6).sum() > 100  # the bars of the errors
    first = path.read_bytes()
    plot_plan(plan, path)
    assert path.read_bytes() == first


def test_plot_does_not_touch_pyplot(tmp_path: Path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plot_plan(long_plan(), tmp_path / "report.png")
    assert plt.get_fignums() == before
