"""The cost table, and what it decides: a site or a head where no patch is faster than exact attention stays exact."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Times, command, refused, t2t
from torch import Tensor, nn

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.attention.per_head import Exact, Layer
from sbpatch.calibration.costs import CostTable, default_path, device_key
from sbpatch.calibration.decide import first_decision
from sbpatch.calibration.stages import calibrate
from sbpatch.plan.plan import Plan
from sbpatch.plan.recipe import SiteSetting
from sbpatch.sites.find import find_sites

CPU = torch.device("cpu")
SHAPES = {256: "256 x 1 x 16", 64: "64 x 1 x 16", 17: "17 x 1 x 64"}  # tokens x heads x width of the three sites
BATCHES = list(torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(3)).split([3, 2]))


def only(tokens: int, share: float = 0.5) -> Times:
    """Patches pay at sites of so many tokens, and nowhere else."""
    return Times(lambda layer: share if layer.site.tokens == tokens else 2.0)


def written(path: Path, *, exact: dict[int, float]) -> Path:
    """A table of exact attention alone, by tokens; what patches take lacks."""
    device = device_key(CPU, torch.float32)
    path.write_text(json.dumps({"ms": {f"{device}: {SHAPES[n]}: exact": ms for n, ms in exact.items()}}))
    return path


def bits(plan: Plan) -> tuple[str, dict[str, bytes]]:
    return plan.to_json(), {name: t.numpy().tobytes() for name, t in plan.tensors.items()}


# ---- the guard


def test_a_site_where_nothing_pays_stays_exact_and_out_of_the_budget():
    plan = calibrate(t2t(), BATCHES, budget=0.2, costs=only(256))
    first, second, third = plan.sites
    assert [site.decision for site in plan.sites] == ["patch", "exact", "exact"]
    assert (first.exact_ms, first.patched_ms) == (2.56, 1.28)
    for site in (second, third):
        assert (site.exact_ms, site.patched_ms) == (site.tokens / 100, site.tokens / 50)
        assert site.reason == (
            f"{site.tokens} tokens: exact attention takes {site.exact_ms:.3g} ms a sample, "
            f"the fastest patch {site.patched_ms:.3g} ms"
        )
        assert site.method is None
        assert site.budget is None
    assert plan.budget.used == pytest.approx(first.budget)  # of the first alone
    assert plan.budget.used <= 0.2 < plan.budget.model


def test_a_site_that_is_set_aside_leaves_its_share_to_nobody():
    """The same plan for the first site as where the others are excluded by name."""
    guarded = calibrate(t2t(), BATCHES, budget=0.1, costs=only(256))
    alone = calibrate(t2t(), BATCHES, budget=0.1, costs=only(256), include=["*attention1*"])
    assert guarded.sites[0] == alone.sites[0]
    assert guarded.budget == alone.budget


@pytest.mark.parametrize(("share", "patched"), [(0.89, 3), (0.91, 0)])
def test_a_patch_pays_from_nine_tenths_down(share, patched):
    costs = Times(lambda _: share)
    sites = [first_decision(site, limit=costs) for site in find_sites(t2t(), BATCHES[0][:1])]
    assert [site.decision for site in sites].count("patch") == patched


def test_the_fastest_of_a_site_is_named_where_only_the_cheapest_layer_pays():
    """The first look lets the site pass; of what is tried then nothing pays, and the least of it is the reason."""

    def share(layer: Layer) -> float:
        if layer.method == "clusters" and layer.rank == 256 // 16 - 1 and "steps" not in layer.parameters_used:
            return 0.5  # what `cheapest` builds at 256 tokens
        return 1.25 if layer.method == "window2d" else 1.5

    costs = Times(share)
    plan = calibrate(
        t2t(), BATCHES, budget=0.3, method="window2d+favor", fixed={"*2*": SiteSetting(method="clusters", rank=5)}, costs=costs
    )  # fmt: skip
    first = plan.sites[0]
    assert first.decision == "exact"
    assert (first.exact_ms, first.patched_ms) == (2.56, 1.25 * 2.56)
    assert "the fastest patch 3.2 ms" in first.reason


@pytest.mark.parametrize("allocation", ["joint", "measured"])
def test_no_slow_layer_is_chosen(allocation):
    """Without the guard the choice falls on other methods than on those that pay."""
    options: dict[str, Any] = {"budget": 0.2, "allocation": allocation, "include": ["*attention1*"]}
    free = calibrate(t2t(), BATCHES, keep_slow=True, **options).sites[0]
    guarded = calibrate(
        t2t(), BATCHES, costs=Times(lambda layer: 0.5 if layer.method == "clusters" else 1.1), **options
    ).sites[0]
    assert free.method != "clusters"
    assert guarded.method == "clusters"
    assert guarded.output_error >= free.output_error
    assert free.exact_ms is free.patched_ms is None


@pytest.mark.parametrize(("share", "several"), [(1.4, True), (1.6, False)])
def test_where_the_smallest_layer_is_far_too_slow_larger_ones_are_not_timed(share, several):
    asked = set()

    def of_window(layer: Layer) -> float:
        if layer.method == "local":
            asked.add(tuple(sorted(layer.parameters_used.items())))
            return share
        return 0.5

    calibrate(t2t(), BATCHES, budget=0.1, method="local+clusters", include=["*attention1*"], costs=Times(of_window))
    assert (len(asked) > 1) == several


class TwoHeads(nn.Module):
    """Two heads over 128 tokens, one nearly uniform, one that looks for single keys: no one size fits both."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.05, 6.0]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x.roll(i, -1).unflatten(-1, (2, 8)).transpose(1, 2) for i in range(3))
        q = q * self.scale[:, None, None]
        return nn.functional.scaled_dot_product_attention(q, k, v).mean((1, 2))


def test_a_head_that_stays_exact_takes_exact_time():
    model, batches = TwoHeads(), [torch.randn(6, 128, 16)]
    costs = Times(lambda layer: 0.25 if layer.method == "clusters" else 3.0)
    plan = calibrate(model, batches, budget=0.9, method="clusters", costs=costs)
    (site,) = plan.sites
    assert site.per_head is not None
    methods = {head: group.method for group in site.per_head for head in group.heads}
    assert sorted(methods.values()) == ["clusters", "exact"]
    assert site.exact_ms == pytest.approx(2.56)
    assert site.patched_ms == pytest.approx(1.28 * 0.25 + 1.28)


def test_keep_slow_asks_no_clock(monkeypatch):
    def never(*_: Any) -> None:
        raise AssertionError("a time was asked for")

    monkeypatch.setattr("sbpatch.calibration.costs.elapsed_ms", never)
    plan = calibrate(t2t(), BATCHES, budget=0.2, keep_slow=True)
    assert [site.decision for site in plan.sites] == ["patch", "exact", "exact"]
    assert "under 256" in plan.sites[1].reason
    assert all(site.exact_ms is site.patched_ms is None for site in plan.sites)


def test_fixed_settings_are_taken_slow_or_not():
    fixed = {"*attention2*": SiteSetting(method="window", window=9)}
    plan = calibrate(t2t(), BATCHES, budget=0.3, fixed=fixed, costs=only(0))
    assert [site.decision for site in plan.sites] == ["exact", "patch", "exact"]
    second = plan.sites[1]
    assert (second.parameters["window"], second.exact_ms, second.patched_ms) == (9, 0.64, 1.28)


def test_nothing_pays():
    text = refused(calibrate, t2t(), BATCHES, costs=only(0))
    assert "nothing to patch among 3 attention sites" in text
    assert "exact attention takes 2.56 ms a sample, the fastest patch 5.12 ms" in text
    assert "--keep-slow" in text
    assert "--keep-slow" not in refused(calibrate, t2t(), BATCHES, costs=only(0), objective="time")
    assert "--keep-slow" not in refused(calibrate, t2t(), BATCHES, costs=only(256), exclude=["*"])


# ---- the table and its file


def test_what_lacks_is_measured_once_and_added(tmp_path, monkeypatch):
    path = written(tmp_path / "costs.json", exact={256: 1e6})
    (site, *_) = find_sites(t2t(), BATCHES[0][:1])
    layer = Scatterbrain("clusters", site.geometry, 0, rank=15)
    table = CostTable(path, CPU)
    assert table.exact_ms(site.geometry) == 1e6  # as it was given
    measured = table.ms(layer)
    assert 0 < measured < 1e5
    rows = json.loads(path.read_text())["ms"]
    assert len(rows) == 2
    assert sorted(rows.values()) == [measured, 1e6]
    assert [p.name for p in tmp_path.iterdir()] == ["costs.json"]

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("sbpatch.calibration.costs.elapsed_ms", never)
    again = CostTable(path, CPU)
    assert again.ms(layer) == measured
    assert again.pays(layer)
    assert again.ms(Exact(site.geometry)) == 1e6
    with pytest.raises(AssertionError, match="measured again"):
        again.ms(Scatterbrain("clusters", site.geometry, 0, rank=16))


def test_a_table_in_memory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = CostTable(None, CPU)
    assert table.exact_ms(Geometry(40, 2, 8)) > 0
    assert list(table.rows) == [f"{device_key(CPU, torch.float32)}: 40 x 2 x 8: exact"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Geometry(40, 4, 8), Geometry(40, 4, 8, causal=True)),
        (Geometry(40, 4, 8), Geometry(40, 4, 8, key_heads=2)),
        (Geometry(40, 4, 8), Geometry(40, 4, 16)),
        (Geometry(40, 4, 8), Geometry(40, 2, 8)),
        (Geometry(40, 4, 8), Geometry(41, 4, 8)),
    ],
)
def test_shapes_have_times_of_their_own(one, other):
    table = CostTable(None, CPU)
    table.exact_ms(one)
    table.exact_ms(other)
    assert len(table.rows) == 2
    assert len(CostTable(None, CPU, torch.bfloat16).rows | table.rows) == 2


def test_dtypes_have_times_of_their_own():
    assert device_key(CPU, torch.float32) != device_key(CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a cost table"),
        (b"{", "is not a cost table"),
        (b"[]", "is not a cost table"),
        (b"{}", "is not a cost table"),
        (b"\xff\xfe", "is not a cost table"),
        (b"[" * 100_000, "is not a cost table"),
        (b'{"ms": 3}', "is not a cost table"),
        (b'{"ms": {"a": null}}', "is not a cost table"),
        (b'{"ms": {"a": "much"}}', "is not a cost table"),
        (b'{"ms": {"a": NaN}}', "times that are not positive numbers"),
        (b'{"ms": {"a": 1, "b": -1}}', "times that are not positive numbers"),
        (b'{"ms": {"a": 0}}', "times that are not positive numbers"),
        (b'{"ms": {"a": Infinity}}', "times that are not positive numbers"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, content, said):
    path = tmp_path / "costs.json"
    path.write_bytes(content)
    text = refused(CostTable, path, CPU)
    assert str(path) in text
    assert said in text
    assert path.read_bytes() == content


def test_tables_that_cannot_be_written(tmp_path):
    assert "is not a cost table" in refused(CostTable, tmp_path, CPU)  # a directory
    (tmp_path / "file").write_text("")
    table = CostTable(tmp_path / "file" / "costs.json", CPU)
    assert "cannot write the cost table" in refused(table.exact_ms, Geometry(40, 2, 8))


def test_where_it_is_kept(monkeypatch):
    assert str(default_path()) == os.environ["XDG_CACHE_HOME"] + "/sbpatch/costs.json"
    assert not default_path().is_relative_to(Path.home() / ".cache")  # these tests have their own
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_path() == Path.home() / ".cache" / "sbpatch" / "costs.json"


# ---- the same table, the same plan


@pytest.mark.parametrize("objective", ["memory", "time"])
def test_one_seed_and_one_table_give_one_plan(tmp_path, objective):
    """Also where the first run measures what the others find in the file."""
    path = written(tmp_path / "costs.json", exact={256: 1e6, 64: 1e6, 17: 1e-6})

    def plan(seed: int) -> Plan:
        options: dict[str, Any] = {"budget": 0.3, "objective": objective, "method": "lsh+favor"}
        return calibrate(t2t(), BATCHES, seed=seed, costs=CostTable(path, CPU), **options)

    plans = [plan(4), plan(4), plan(4)]
    assert plans[0].sites[0].decision == "patch"
    assert plans[0].sites[2].decision == "exact"
    assert bits(plans[0]) == bits(plans[1]) == bits(plans[2])
    assert bits(plan(5)) != bits(plans[0])


def test_another_table_gives_another_plan():
    """Time shared out: a method that takes more time gets less of it."""
    plans = [
        calibrate(t2t(), BATCHES, budget=0.3, objective="time", include=["*attention1*"], costs=costs)
        for costs in (
            Times(lambda layer: 0.1 if "clusters" in layer.method else 0.8),
            Times(lambda layer: 0.1 if layer.method in ("clusters", "coreset") else 0.8),
        )
    ]
    for plan in plans:
        (site,) = plan.patched
        assert site.patched_ms <= 0.3 * site.exact_ms
    assert plans[0].sites != plans[1].sites


# ---- the command line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.save({"state_dict_ema": t2t().state_dict()}, tmp_path / "tiny.pth")
    (tmp_path / "r.yaml").write_text("sites: {'*attention1*': {method: clusters, rank: 9}}")
    return tmp_path


@pytest.fixture
def calibration(folder: Path, monkeypatch, capsys) -> Callable[..., tuple[int, str, Any]]:
    """Runs `sbpatch calibrate tiny.pth` in the folder: exit code, standard error and plan."""
    arguments = ("calibrate", "tiny.pth", "--samples", "3", "--budget", "0.2", "--quiet", "--dry-run", "--json", "-")
    monkeypatch.chdir(folder)

    def calibration(*flags: str) -> tuple[int, str, Any]:
        code = command(*arguments, *flags)
        out, said = capsys.readouterr()
        return code, said, json.loads(out) if out else None

    return calibration


def test_the_commands_flags(folder, calibration):
    table = written(folder / "t.json", exact={256: 1e6, 64: 1e-6, 17: 1e-6})
    code, said, plan = calibration("--cost-table", "t.json")
    assert code == 0, said
    assert [site["decision"] for site in plan["sites"]] == ["patch", "exact", "exact"]
    assert plan["sites"][0]["exact_ms"] == 1e6
    assert plan["sites"][1]["exact_ms"] == 1e-6 < plan["sites"][1]["patched_ms"]
    found = CostTable(table, CPU)  # valid
    assert len(found.rows) > 6
    assert sorted(found.rows.values())[:2] == [1e-6, 1e-6]
    assert calibration("--cost-table", "t.json") == (code, said, plan)

    written(folder / "slow.json", exact={256: 1e-6, 64: 1e-6, 17: 1e-6})
    code, said, plan = calibration("--cost-table", "slow.json")
    assert (code, plan) == (1, None)
    assert said.startswith("sbpatch: nothing to patch among 3 attention sites (")
    assert "exact attention takes 1e-06 ms a sample, the fastest patch" in said
    assert "--keep-slow patches all the same" in said
    assert said.count("\n") == 1
    code, said, plan = calibration("--cost-table", "slow.json", "--keep-slow")
    assert code == 0, said
    assert [site["decision"] for site in plan["sites"]] == ["patch", "exact", "exact"]
    assert "exact_ms" not in plan["sites"][0]


def test_a_damaged_table_is_one_line_and_exit_code_1(folder, calibration):
    (folder / "bad.json").write_text('{"ms": {"a": NaN}}')
    code, said, plan = calibration("--cost-table", "bad.json")
    assert (code, plan) == (1, None)
    assert said.startswith("sbpatch: cost table bad.json has times that are not positive numbers")
    assert said.count("\n") == 1
