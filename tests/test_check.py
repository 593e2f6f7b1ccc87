"""Whole-model figures by hand, and the search for the smallest budget that keeps its word."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny import Times, refused, t2t

import sbpatch
from sbpatch.calibration.check import BUDGETS, Totals, pick, smallest_that_keeps
from sbpatch.calibration.journal import Journal

# by quality alone: nothing is faster than exact attention on models this small (see test_costs)
calibrate = partial(sbpatch.calibrate, keep_slow=True)
BATCHES = list(torch.randn(14, 3, 64, 64, generator=torch.Generator().manual_seed(3)).split(2))


def test_figures_of_classes_by_hand():
    exact = torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    found = torch.tensor([[3.0, 1.0, 0.0], [0.0, 3.5, 3.0]])
    totals = Totals("classes")
    totals.add(found, exact, torch.zeros(2, 1))
    p, q = exact.softmax(-1), found.softmax(-1)
    figures = totals.figures()
    assert figures["agreement"] == figures["drop"] == 50.0
    assert figures["divergence"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)


def test_drop_is_estimated_where_no_sample_flipped():
    """Margins of 3 and 1, shifted by -1 and +0.5: none flips, and P(shift < -margin) says how near they came."""
    exact = torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    found = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.5]])
    totals = Totals("classes")
    totals.add(found, exact, torch.zeros(2, 1))
    spread = math.sqrt((1 + 0.25) / 2)
    expected = sum(0.5 * math.erfc(m / spread / math.sqrt(2)) for m in (3, 1)) / 2
    assert totals.figures()["agreement"] == 100.0
    assert totals.figures()["drop"] == pytest.approx(100 * expected)


def test_figures_of_next_tokens_by_hand():
    exact, found = torch.randn(2, 2, 5, 7)
    ids = torch.randint(7, (2, 5))
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    totals = Totals("next-token")
    totals.add(found, exact, {"input_ids": ids, "attention_mask": real})
    pairs = [(b, t) for b in range(2) for t in range(4) if real[b, t] and real[b, t + 1]]
    nll = [[-float(x[b, t].log_softmax(-1)[ids[b, t + 1]]) for b, t in pairs] for x in (found, exact)]
    figures = totals.figures()
    assert len(pairs) == totals.count == 6
    assert figures["perplexity_ratio"] == pytest.approx(math.exp((sum(nll[0]) - sum(nll[1])) / 6), rel=1e-5)
    assert figures["drop"] == pytest.approx(100 * (figures["perplexity_ratio"] - 1))
    same = sum(int(found[b, t].argmax() == exact[b, t].argmax()) for b, t in pairs)
    assert figures["agreement"] == pytest.approx(100 * same / 6)


def test_the_plan_of_least_divergence_is_picked():
    check = SimpleNamespace(
        screen=[], figures=lambda plans, batches, description: [{"divergence": plan} for plan in plans]
    )
    assert pick([0.3, 0.1, 0.2], check) == 0.1


@pytest.mark.parametrize("wanted", [0.5, 0.04, 0.01, 0.002])
@pytest.mark.parametrize("luck", [1.0, 2.0])
def test_smallest_budget_that_keeps_its_word_on_both_halves(wanted, luck):
    """Drop falls as the budget grows; on the second half it is `luck` times as large, so that half has the last word."""

    def figures(plans, batches, description):
        return [{"drop": wanted / plan * (luck if batches == ["b"] else 1.0)} for plan in plans]

    check = SimpleNamespace(unseen=["a", "b"], screen=[], figures=figures)
    keeps = [b for b in BUDGETS if wanted * luck / b <= 1.0]
    if keeps:
        assert smallest_that_keeps(lambda budget: [budget], lambda budget: True, 1.0, check) == min(keeps)
    else:
        assert "no plan keeps" in refused(smallest_that_keeps, lambda budget: [budget], lambda budget: True, 1.0, check)


def test_no_budget_keeps_the_word():
    check = SimpleNamespace(unseen=["a"], screen=[], figures=lambda *_: [{"drop": 3.0}])
    for enough in (True, False):
        said = refused(smallest_that_keeps, lambda budget: [budget], lambda budget, enough=enough: enough, 1.0, check)
        assert "no plan keeps a drop of at most 1" in said


@pytest.mark.slow
def test_a_looser_promise_needs_less():
    plans = [calibrate(t2t(), BATCHES, max_drop=drop) for drop in (2.0, 30.0)]
    assert plans[0].check["drop"] <= plans[1].check["drop"] + 1e-9
    assert plans[1].budget.used <= plans[0].budget.used
    assert plans[0].check["unseen"] == 1
    assert plans[0].check["samples"] == 6
    assert plans[0].max_drop == 2.0


@pytest.mark.parametrize("drop", [-1.0, math.nan])
def test_a_drop_that_is_none(drop):
    assert "cannot be kept" in refused(calibrate, t2t(), BATCHES, max_drop=drop)


# ---- going on after a cut


@pytest.mark.slow
def test_a_cut_calibration_goes_on_and_ends_the_same(tmp_path):
    path = tmp_path / "journal"
    whole = calibrate(t2t(), BATCHES, budget=0.1, min_tokens=64)
    started: list[str] = []

    def cut_off(items, description):
        for item in items:
            started.append(description)
            if started.count("comparing the best") == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        calibrate(t2t(), BATCHES, budget=0.1, min_tokens=64, journal=Journal(path, "a"), progress=cut_off)
    lines = path.read_text().splitlines()
    assert len(lines) == 6  # the settings, two samples of the first look and of the closer one, one of the rest
    path.write_text("\n".join(lines) + '\n01234567 {"comparing the best, 2 samples": {"to')  # killed while it wrote
    journal = Journal(path, "a")
    assert len(journal.found) == 5
    assert calibrate(t2t(), BATCHES, budget=0.1, min_tokens=64, journal=journal).to_json() == whole.to_json()
    journal.close()
    assert not path.exists()


def test_a_journal_of_other_settings_is_begun_anew(tmp_path):
    path = tmp_path / "journal"
    first = Journal(path, "a")
    first.record("x", {})
    assert Journal(path, "a").found == {"x": {}}
    assert Journal(path, "b").found == {}
    assert path.read_text().count("\n") == 1
    assert path.read_text().endswith('"b"\n')


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b"junk\n", b'00000000 "a"\n'])
def test_a_damaged_journal_is_begun_anew_and_says_so(tmp_path, damage):
    path = tmp_path / "journal"
    Journal(path, "a").record("x", {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-6] + b"?" + whole[-5:] if not damage else whole + damage + b"\n")
    journal = Journal(path, "a")
    assert journal.found == {}
    assert "damaged" in journal.note
    assert path.read_bytes().count(b"\n") == 1


def test_a_journal_is_not_followed_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "journal").symlink_to("precious")
    journal = Journal(tmp_path / "journal", "a")
    assert "was a link" in journal.note
    journal.close()
    assert (tmp_path / "precious").read_text() == "years of work"
    (tmp_path / "journal").mkdir()
    assert "Is a directory" in refused(Journal, tmp_path / "journal", "a")


# ---- objectives and rules


def test_time_is_shared_out_instead_of_entries():
    """The method that is best by entries takes five sixths of the time of exact attention, all else a fifth."""
    costs = Times(lambda layer: 5 / 6 if layer.method.startswith("top-clusters") else 0.2)
    by_time, by_entries = (
        calibrate(t2t(), BATCHES[:2], budget=0.3, objective=objective, costs=costs, keep_slow=False)
        for objective in ("time", "memory")
    )
    assert by_time.objective == "time"
    decided = [site for site in by_time.sites if site.method is not None]
    assert len(decided) == 3
    assert by_time.patched
    assert sum(s.patched_ms for s in decided) <= 0.3 * sum(s.exact_ms for s in decided) * (1 + 1e-9)
    assert {"top-clusters"} == {site.method for site in by_entries.patched}
    assert not any(site.method.startswith("top-clusters") for site in by_time.patched)
    assert by_time.budget.used > 0.3  # entries are free
    text = refused(calibrate, t2t(), BATCHES[:1], budget=0.05, objective="time", costs=costs)
    assert "of the exact time" in text


def test_time_needs_the_exact_time():
    options = {"objective": "time", "allocation": "measured", "exclude": ["blocks.*"], "costs": Times(lambda _: 0.1)}
    assert "joint allocation" in refused(calibrate, t2t(), BATCHES[:1], budget=0.3, **options)


@pytest.mark.parametrize(("rule", "share"), [("uniform", 0.5), ("entropy", None)])
def test_rules_split_as_they_say(rule, share):
    plan = calibrate(t2t(), BATCHES[:2], budget=0.3, min_tokens=64, method="window2d+clusters", allocation=rule)
    for site in plan.patched:
        low_rank = 1 - site.nnz / site.layer().stored
        assert site.budget <= 0.3
        if site.method == "window2d+clusters":
            assert low_rank == pytest.approx(share or site.entropy_ratio, abs=0.3)
    assert len({site.method for site in plan.patched}) <= 2
