"""The plan and its file: what is written is what is read, what does not fit is refused, what is loaded is what was made."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import PARAMETERS, checkpoint_of, plan_for, refused, t2t, vit

from sbpatch.errors import SbpatchError
from sbpatch.plan import artifact
from sbpatch.plan.patch import TENSORS_FILE, load, patch, read_plan, unpatch
from sbpatch.plan.plan import PLAN_FILE, Budget, Plan, SitePlan
from sbpatch.sites.find import find_sites

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))

finite = st.floats(allow_nan=False, allow_infinity=False)
share = st.floats(0, 1)
optional = {
    "entropy": st.lists(share, max_size=4),
    "entropy_ratio": share,
    "method": st.sampled_from(["window", "lsh+clusters"]),
    "seed": st.integers(0, 2**60),
    "rank": st.integers(0, 999),
    "nnz": st.floats(0, 1e9),
    "budget": share,
    "matrix_error": finite,
    "output_error": finite,
    "queries": st.integers(1, 10**6),
    "value_dim": st.integers(1, 512),
    "window": st.integers(1, 99),  # a parameter: a further key
}
site_fields = st.fixed_dictionaries(
    {
        "name": st.text(max_size=20),
        "class": st.text(max_size=20),
        "tokens": st.integers(1, 10**6),
        "heads": st.integers(1, 64),
        "head_dim": st.integers(1, 512),
        "key_heads": st.just(0),
        "causal": st.booleans(),
        "prefix": st.integers(0, 9),
        "decision": st.sampled_from(["patch", "exact", "unsupported"]),
        "reason": st.text(max_size=40),
    },
    optional=optional,
)


@st.composite
def site_on_a_grid(draw):
    rows, cols, fields = draw(st.integers(1, 99)), draw(st.integers(1, 99)), draw(site_fields)
    return fields | {"grid": (rows, cols), "tokens": rows * cols + fields["prefix"]}


@settings(max_examples=100)
@given(fields=st.lists(site_fields | site_on_a_grid(), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_plan_survives_its_file(fields, seed, tmp_path_factory):
    plan = Plan(model="m", seed=seed, budget=Budget(requested=0.03), sites=[SitePlan.model_validate(f) for f in fields])
    path = tmp_path_factory.mktemp("plan") / PLAN_FILE
    path.write_text(plan.to_json(), encoding="utf-8")
    assert Plan.read(path) == plan
    for site, wanted in zip(json.loads(plan.to_json())["sites"], fields, strict=True):
        assert {k: tuple(v) if k == "grid" else v for k, v in site.items()} == wanted


def test_json_has_the_keys_of_the_contract():
    plan = plan_for(t2t(), "window+clusters")
    written = json.loads(plan.to_json())
    assert written.keys() >= {"model", "seed", "versions", "sites", "budget"}
    assert written["budget"].keys() == {"requested", "used", "model"}
    assert written["versions"].keys() >= {"sbpatch", "torch"}
    for site in written["sites"]:
        assert site.keys() >= {
            *("name", "class", "tokens", "heads", "head_dim", "causal", "entropy", "entropy_ratio", "decision"),
            *("reason", "method", "window", "rank", "nnz", "budget", "matrix_error", "output_error"),
        }
    assert "tensors" not in written


# ---- the budget


@settings(max_examples=60)
@given(
    sites=st.lists(
        st.tuples(st.integers(1, 4000), st.integers(1, 16), share, st.sampled_from(["patch", "exact", "unsupported"])),
        min_size=1,
        max_size=6,
    )
)
def test_budget_is_the_weighted_share_of_the_entries(sites):
    plan = Plan(model="m", seed=0, budget=Budget(requested=0.5), sites=[])
    for n, heads, budget, decision in sites:
        fields = {"name": "s", "class": "C", "tokens": n, "heads": heads, "head_dim": 8, "reason": "", "budget": budget}
        plan.sites.append(SitePlan.model_validate(fields | {"decision": decision}))
    plan.settle_budget()
    full = stored = patched_full = patched_stored = 0.0
    for n, heads, budget, decision in sites:
        full += heads * n**2
        stored += heads * n**2 * (budget if decision == "patch" else 1)
        if decision == "patch":
            patched_full += heads * n**2
            patched_stored += heads * n**2 * budget
    assert plan.budget.model == pytest.approx(stored / full)
    assert plan.budget.used == pytest.approx(patched_stored / patched_full if patched_full else 0.0)


@pytest.mark.parametrize(("method", "low_rank"), [("window+clusters", 7 + 1), ("window2d+favor", 2 * 6), ("lsh", 0)])
def test_site_budget_is_by_the_definition(method, low_rank):
    """(nnz + m + 1) / n for clusters, (nnz + 2 m) / n for feature maps, nnz counted on the support itself."""
    plan = plan_for(t2t(), method)
    for site in plan.sites:
        q = k = torch.randn(1, site.heads, site.tokens, site.head_dim)
        support = site.layer().support.dense(q, k, None).expand(1, site.heads, -1, -1)
        nnz = float(support.sum()) / (site.heads * site.tokens)
        if method == "lsh":  # its buckets overlap from round to round; what is stored is counted before
            assert site.nnz >= nnz
        else:
            assert site.nnz == pytest.approx(nnz)
        assert site.budget == pytest.approx((site.nnz + low_rank) / site.tokens)


# ---- layers and tensors


@pytest.mark.parametrize("method", PARAMETERS)
def test_same_seed_same_bits(method):
    def bits(seed: int) -> list[torch.Tensor]:
        return [t for layer in plan_for(t2t(), method, seed=seed).layers().values() for t in layer.buffers()]

    assert all(torch.equal(a, b) for a, b in zip(bits(3), bits(3), strict=True))
    if "favor" in method or "lsh" in method:
        assert not all(torch.equal(a, b) for a, b in zip(bits(3), bits(4), strict=True))


def test_saved_tensors_win_over_the_seed():
    plan = plan_for(t2t())
    plan.tensors = {name: torch.randn_like(t) for name, t in plan.tensors.items()}
    assert plan.tensors
    layers = plan.layers()
    for name, tensor in plan.tensors.items():
        site = next(site for site in layers if name.startswith(f"{site}."))
        assert torch.equal(layers[site].get_buffer(name.removeprefix(f"{site}.")), tensor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(next(iter(t))), "missing or left over"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra' is missing or left over"),
        (lambda t: t.update({next(iter(t)): torch.zeros(3)}), "has shape (3,)"),
        (lambda t: t.update({next(iter(t)): torch.zeros(())}), "has shape ()"),
    ],
)
def test_tensors_must_fit_the_plan(change, said):
    plan = plan_for(t2t())
    change(plan.tensors)
    assert said in refused(plan.layers)


def test_a_patch_without_method_or_seed_is_refused():
    plan = plan_for(t2t())
    plan.sites[0].method = None
    assert "names no method" in refused(plan.layers)


def test_plan_of_another_width_is_refused():
    """The same site names, other heads: a broadcast would hide it."""
    model = patch(vit(num_heads=6, embed_dim=192), plan_for(vit()))
    assert "3 heads of width 64" in refused(model, IMAGES)


def test_plan_of_another_model_is_refused_and_changes_nothing():
    model = vit()
    before = model(IMAGES)
    assert "tokens_to_token.attention1.attn" in refused(patch, model, plan_for(t2t()))
    assert torch.equal(model(IMAGES), before)


@torch.inference_mode()
def test_patch_and_unpatch():
    model = t2t()
    before, plan = model(IMAGES), plan_for(model)
    assert patch(model, plan) is model
    patched = model(IMAGES)
    assert not torch.equal(patched, before)
    assert "patched already" in refused(patch, model, plan)
    assert unpatch(model) is model
    assert torch.equal(model(IMAGES), before)
    assert torch.equal(patch(model, plan)(IMAGES), patched)


# ---- the directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = t2t()
    checkpoint = checkpoint_of(model, tmp_path)
    artifact.save(tmp_path / "out", checkpoint, plan_for(model))
    return tmp_path / "out"


@pytest.mark.parametrize("method", PARAMETERS)
@torch.inference_mode()
def test_loaded_model_gives_the_same_logits(method, tmp_path):
    model = t2t()
    plan = plan_for(model, method)
    artifact.save(tmp_path / "out", checkpoint_of(model, tmp_path), plan)
    expected = patch(model, plan)(IMAGES)
    assert torch.equal(load(tmp_path / "out")(IMAGES), expected)
    again = read_plan(tmp_path / "out")
    assert again.model_dump() == plan.model_dump()
    assert again.tensors.keys() == plan.tensors.keys()
    assert (tmp_path / "out" / TENSORS_FILE).exists() == bool(plan.tensors)


def test_base_weights_are_untouched(directory):
    state = t2t().state_dict()
    stored = load_file(directory / "model.safetensors")
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)


def test_directories_that_are_none(directory, tmp_path):
    assert "sbpatch calibrate MODEL -o" in refused(load, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no plan at" in refused(load, tmp_path / "empty")
    (directory / TENSORS_FILE).write_bytes(b"no tensors")
    assert TENSORS_FILE in refused(load, directory)


def test_weights_of_another_model_are_refused(directory):
    save_file(t2t(width=128, heads=2).state_dict(), directory / "model.safetensors")
    assert "config.json says width 64, but the weights say 128" in refused(load, directory)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"3", b'{"model": "m"}', b'"' + b"x" * 5000 + b'"', b"[" * 10000,
        b'{"model": 3, "seed": 0, "budget": {"requested": 1}, "sites": []}',
        b'{"model": "m", "seed": 0, "budget": {"requested": "much"}, "sites": []}',
        b'{"model": "m", "seed": 0, "budget": {"requested": 1}, "sites": [{"name": "a"}]}',
        b'{"model": "m", "seed": 0, "budget": {"requested": 1}, "sites": 3}',
        b'{"model": "m", "seed": 0, "budget": {"requested": 1}, "sites": [{"name": "a", "class": "A", "tokens": 17,'
        b' "heads": 1, "head_dim": 8, "decision": "exact", "reason": "", "grid": [4, 4]}]}',
    ],
)  # fmt: skip
def test_damaged_plans_give_one_line(directory, content):
    (directory / PLAN_FILE).write_bytes(content)
    assert f"{directory / PLAN_FILE} is not a plan" in refused(load, directory)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: plan.pop("format"), "an older version of sbpatch (format 1, this one reads 2): calibrate again"),
        (
            lambda plan: plan.update(format=1),
            "an older version of sbpatch (format 1, this one reads 2): calibrate again",
        ),
        (
            lambda plan: plan.update(format=3),
            "a newer version of sbpatch (format 3, this one reads 2): calibrate again",
        ),
    ],
)
def test_plans_of_another_format_are_refused(directory, change, said):
    path = directory / PLAN_FILE
    plan = json.loads(path.read_text())
    assert plan["format"] == 2
    change(plan)
    path.write_text(json.dumps(plan))
    assert refused(load, directory) == f"{path} was written by {said}"


def test_a_plan_cut_or_changed_anywhere_is_refused_or_read(directory):
    """Nothing but SbpatchError escapes, whatever bytes stand in sbpatch.json; seeded, so that a failure repeats."""
    path = directory / PLAN_FILE
    whole, random_bytes = path.read_bytes(), random.Random(0)
    digits = [i for i, byte in enumerate(whole) if chr(byte).isdigit()]
    for i in range(240):
        damaged = bytearray(whole)
        if i < 60:
            del damaged[random_bytes.randrange(len(whole)) :]
        elif i < 120:  # numbers turn into other numbers: tokens, heads, ranks that fit nothing
            for place in random_bytes.sample(digits, 3):
                damaged[place] = random_bytes.choice(b"0123456789-e.")
        else:
            for place in random_bytes.sample(range(len(whole)), 2):
                damaged[place] = random_bytes.randrange(256)
        path.write_bytes(damaged)
        with suppress(SbpatchError):
            read_plan(directory).layers()


def test_key_heads_come_back_and_must_share_the_heads(tmp_path):
    fields = {"name": "s", "class": "C", "tokens": 9, "heads": 6, "head_dim": 8, "decision": "exact", "reason": ""}
    plan = Plan(model="m", seed=0, budget=Budget(requested=0.5), sites=[])
    plan.sites.append(SitePlan.model_validate(fields | {"key_heads": 2}))
    (tmp_path / PLAN_FILE).write_text(plan.to_json())
    (site,) = Plan.read(tmp_path / PLAN_FILE).sites
    assert (site.geometry.key_heads, site.geometry.group) == (2, 3)
    (tmp_path / PLAN_FILE).write_text(plan.to_json().replace('"key_heads": 2', '"key_heads": 4'))
    assert "6 heads do not share 4 key heads evenly" in refused(Plan.read, tmp_path / PLAN_FILE)


def test_a_patched_model_is_not_probed_again():
    assert "patched already" in refused(find_sites, patch(t2t(), plan_for(t2t())), IMAGES)
