"""Numbers out of range, in flags, recipes, plans and configurations: refused before anything of that size is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cases import command, one_line_of, refused_line, works_or_refuses

import sbpatch
from sbpatch import bounds
from sbpatch.data.preprocessing import Preprocessing
from sbpatch.models.load import load_checkpoint
from sbpatch.plan.recipe import read_recipe

# ---- flags

TYPED = [
    "1e12",
    "1000000000000",
    "18446744073709551616",
    "-1",
    "inf",
    "nan",
    "１２",
    "²",
    "1_000",
    "0x10",
    "",
    "1" * 5000,
]
WHOLE = {
    "calibrate": ["--samples", "--seed", "--input-size", "--length"],
    "inspect": ["--seed", "--input-size", "--length"],
    "eval": ["--limit", "--batch-size", "--stride", "--length", "--seed"],
    "bench": ["--heads", "--head-dim", "--batch", "--input-size"],
    "analyze": ["--samples", "--length"],
}
FLAGS = [(verb, flag, value) for verb, flags in WHOLE.items() for flag in flags for value in TYPED]


@pytest.mark.parametrize(("verb", "flag", "value"), FLAGS, ids=lambda x: x[:22])
def test_integers_that_are_none_or_too_large_are_wrong_use(empty, capfd, verb, flag, value):
    model = [] if verb == "bench" else ["tiny.pth"]
    more = {"eval": ["--dataset", "images"], "analyze": ["-o", "new"]}.get(verb, [])
    refused_line(capfd, verb, *model, *more, f"{flag}={value}", code=2)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-1e400", "０.5", "0,5", "", "1_0", "1e1_0", "half"])
@pytest.mark.parametrize("flag", ["--budget", "--max-drop"])
def test_shares_that_are_none_are_wrong_use(empty, capfd, flag, value):
    refused_line(capfd, "calibrate", "tiny.pth", f"{flag}={value}", code=2)


@pytest.mark.parametrize("value", ["0", "1", "1.5", "1e9"])
def test_budgets_that_are_no_share(place, capfd, value):
    said = refused_line(capfd, "calibrate", "tiny.pth", "--data", "images", "--samples", "2", f"--budget={value}")
    assert "is not a share" in said


@pytest.mark.parametrize("value", ["1e12", "²", "0", "-4", "1048577", "64,,64", "nan", "64;64", "１２", "1" * 5000])
def test_lengths(empty, capfd, value):
    assert "lengths" in refused_line(capfd, "bench", f"--lengths={value}")


@pytest.mark.parametrize("value", ["nan", "0.1,inf", "-1", "1e400", "2", "a", "0.1,,", "０.1"])
def test_budgets_of_a_comparison(empty, capfd, value):
    assert "budget" in refused_line(capfd, "compare", "tiny.pth", "--dataset", "images", f"--budgets={value}")


def test_bounds_are_within_what_is_computed():
    assert bounds.SEED * 10_007 + 2 * bounds.HEADS < 2**63
    assert bounds.SEED * 1000 + 10_000 < 2**63


# ---- recipes

RECIPES = {
    "budget": ["-1e400", ".nan", ".inf", "1e400", "'0.1x'", "[0.1]", "{}"],
    "min_tokens": ["0", "-1", "1e12", "1099511627776", "18446744073709551616", "'12a'", "true", ".nan", "1.5"],
    "max_drop": [".nan", ".inf", "[]"],
    "include": ["3", "{a: 1}", "[[a]]", "[1]"],
    "sites": ["3", "[]", "{'*': 3}", "{'*': {}}", "{'*': {method: 3}}"],
}
PARAMETERS = ["rank: -1", "rank: 1e12", "rank: 18446744073709551616", "rank: .nan", "rank: .inf", "rank: true"]
PARAMETERS += [
    "rank: '８'",
    "rank: 2.5",
    "rank: [4]",
    "rank: 1048577",
    "steps: 65",
    "steps: 1000000000000",
    "steps: -1",
]
NAMES = [
    "seed",
    "site",
    "self",
    "layer",
    "method_",
    "moments",
    "__class__",
    "args",
    "kwargs",
    "parameters",
    "budget",
    "x",
]


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in RECIPES.items() for v in values])
def test_values_of_a_recipe(tmp_path, key, value):
    (tmp_path / "r.yaml").write_text(f"{key}: {value}\n")
    assert "r.yaml" in one_line_of(read_recipe, tmp_path / "r.yaml")


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_parameters_of_a_recipe(tmp_path, parameter):
    (tmp_path / "r.yaml").write_text(f"sites:\n  '*': {{method: clusters, {parameter}}}\n")
    assert "r.yaml" in one_line_of(read_recipe, tmp_path / "r.yaml")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["clusters", "window2d+favor"])
def test_names_that_are_no_parameters_never_reach_a_constructor(tmp_path, method, name):
    (tmp_path / "r.yaml").write_text(f"sites:\n  '*': {{method: {method}, {name}: 4}}\n")
    assert f"'{name}'" in one_line_of(read_recipe, tmp_path / "r.yaml")


@pytest.mark.parametrize("rank", ["0", "257", "100000", "1048576"])
def test_a_rank_is_at_most_n(place, capfd, rank):
    Path("r.yaml").write_text(f"sites:\n  '*attention1*': {{method: clusters, rank: {rank}}}\n")
    quick = ["--quiet", "--data", "images", "--samples", "2", "--keep-slow", "--include", "*attention1*"]
    assert "rank" in refused_line(capfd, "calibrate", "tiny.pth", "--recipe", "r.yaml", *quick)


@pytest.mark.parametrize("depth", [100_000, 1_000_000])
@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_nested_recipes(tmp_path, opening, depth):
    (tmp_path / "r.yaml").write_text("include: " * opening.startswith(("[", "{")) + opening * (depth // len(opening)))
    assert "r.yaml" in one_line_of(read_recipe, tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch planted']", "a: &a [*a]", "budget: 2001-99-99", "\t- x", "%YAML 9.9\n---\n",
        "a: " + "9" * 5000, "&a [&b [*a, *b]]", "{" * 50, "budget: 1:99:99", "\x00", "include: !!binary x", "? ? ?",
        "--- 1\n--- 2",
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_recipes_that_are_no_settings(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text)
    one_line_of(read_recipe, Path("r.yaml"))
    assert not Path("planted").exists()


# ---- plans

HUGE: list[Any] = [10**12, 2**64, 0, -1, 1e400, "12", "１２", True, 1.5, None, [], {}, 10**400]
OF_A_SITE = [
    "tokens",
    "heads",
    "head_dim",
    "key_heads",
    "prefix",
    "seed",
    "rank",
    "nnz",
    "budget",
    "grid",
    "steps",
    "per_head",
]
OF_A_PLAN = ["seed", "input_size", "budget", "format", "sites", "max_drop", "check", "agreement"]


def changed(path: Path, keys: list[Any], value: Any) -> None:
    """Set one value, which JSON itself may not be able to say, deep in a JSON file."""
    whole = json.loads(path.read_text())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(whole))


def patched_site() -> int:
    return next(
        i for i, s in enumerate(json.loads(Path("out/sbpatch.json").read_text())["sites"]) if s["decision"] == "patch"
    )


@pytest.mark.parametrize("value", HUGE, ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize("key", OF_A_SITE)
def test_numbers_of_a_site(place, key, value):
    changed(Path("out/sbpatch.json"), ["sites", patched_site(), key], value)
    works_or_refuses(sbpatch.load, "out")


@pytest.mark.parametrize("value", HUGE, ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize("key", OF_A_PLAN)
def test_numbers_of_a_plan(place, key, value):
    changed(Path("out/sbpatch.json"), [key], value)
    works_or_refuses(sbpatch.load, "out")


@pytest.mark.parametrize(
    "size", [[10**12], [3, 10**12, 64], [3, 64, 10**9], [0], [3, 0, 64], [3, -64, 64], [], [3, 1, 1]]
)
def test_sizes_of_a_plan(place, capfd, size):
    changed(Path("out/sbpatch.json"), ["input_size"], size)
    refused_line(capfd, "eval", "out", "--dataset", "images", "--quiet")


@pytest.mark.parametrize("name", ["layer", "self", "site", "method_", "window", "q"])
@pytest.mark.parametrize("value", [3, 10**12])
def test_further_keys_of_a_site(place, name, value):
    changed(Path("out/sbpatch.json"), ["sites", patched_site(), name], value)
    works_or_refuses(sbpatch.load, "out")


@pytest.mark.parametrize("text", ["[" * 10**6, '{"sites":' * 10**5, '{"a":' * 10**4 + "1" + "}" * 10**4, "9" * 10**5])
def test_nested_plans(place, text):
    Path("out/sbpatch.json").write_text(text)
    one_line_of(sbpatch.load, "out")


# ---- configurations

PICTURES: list[tuple[str, Any]] = [
    ("input_size", v) for v in ([3, 10**12, 10**12], [3, 0, 64], [3, -64, 64], [10**9, 64, 64], [], [3, 64], 64, "64", None,
                                [3, "64", 64], [3, 64.5, 64], [3, True, 64], [3, 2**64, 64], [[3], 64, 64])
]  # fmt: skip
PICTURES += [("crop_pct", v) for v in (0, -1, 1e-9, 1e12, "0.9", None, True, [])]
PICTURES += [(key, v) for key in ("mean", "std") for v in ([0, 0], [], 0.5, ["a"] * 3, None, [1e300] * 3, [True] * 3)]
PICTURES += [
    ("std", [0, 0, 0]),
    ("interpolation", "x"),
    ("interpolation", 3),
    ("crop_mode", "x"),
    ("interpolation", None),
]
NAN = [("crop_pct", float("nan")), ("mean", [float("inf")] * 3), ("std", [float("nan")] * 3)]


@pytest.mark.parametrize(("key", "value"), PICTURES + NAN, ids=lambda v: repr(v)[:24])
def test_preprocessing_of_a_file(key, value):
    right = Preprocessing().to_dict()
    one_line_of(Preprocessing.from_dict, right | {key: value})


@pytest.mark.parametrize(("key", "value"), PICTURES[:6] + PICTURES[14:18], ids=lambda v: repr(v)[:24])
@pytest.mark.parametrize("model", ["timm", "out"])
def test_preprocessing_of_a_directory(place, model, key, value):
    changed(Path(model, "config.json"), ["pretrained_cfg", key], value)
    works_or_refuses(load_checkpoint, model)  # timm takes zero and nothing for its own default


ARGUMENTS: list[tuple[str, Any]] = [
    (key, v) for key in ("depth", "img_size", "embed_dim", "num_heads", "patch_size", "mlp_ratio", "reg_tokens")
    for v in (10**12, 2**64, 10**6, 0, -1, 1e30, "２")
]  # fmt: skip
FOREIGN = ["checkpoint_path", "pretrained", "cache_dir", "scriptable", "features_only", "pretrained_cfg", "exportable"]


@pytest.mark.parametrize(("key", "value"), ARGUMENTS, ids=lambda v: repr(v)[:20])
def test_arguments_of_timm(place, key, value):
    changed(Path("timm/config.json"), ["model_args", key], value)
    works_or_refuses(load_checkpoint, "timm")


@pytest.mark.parametrize("name", FOREIGN)
def test_arguments_that_are_not_the_models(place, name):
    changed(Path("timm/config.json"), ["model_args", name], "planted")
    assert name in one_line_of(load_checkpoint, "timm")


@pytest.mark.parametrize("value", [10**12, 2**64, -1, "5", 2.5, [], True], ids=repr)
def test_classes_of_timm(place, value):
    changed(Path("timm/config.json"), ["num_classes"], value)
    one_line_of(load_checkpoint, "timm")


OF_LLAMA = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
OF_LLAMA += ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "pad_token_id", "initializer_range"]
OF_BERT = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "layer_norm_eps",
]
OF_VIT = ["image_size", "patch_size", "num_channels", "num_hidden_layers", "hidden_size", "encoder_stride"]
WRONG: list[Any] = [10**12, 2**64, 0, -1, 1e30, "１２", None, [], 10**7, 1.5]
CONFIGURATIONS = [
    (m, k, v) for m, keys in {"llama": OF_LLAMA, "bert": OF_BERT, "vit": OF_VIT}.items() for k in keys for v in WRONG
]


@pytest.mark.parametrize(("model", "key", "value"), CONFIGURATIONS, ids=lambda v: repr(v)[:24])
def test_configurations_of_transformers(place, model, key, value):
    changed(Path(model, "config.json"), [key], value)
    works_or_refuses(command, "inspect", model, "--quiet")


PROCESSOR: list[tuple[str, Any]] = [
    ("size", v) for v in ({"height": 10**12, "width": 10**12}, {"height": 0, "width": 0}, {"height": -1, "width": 5}, {},
                          {"shortest_edge": 10**9}, {"height": "32", "width": 32}, 3, None, {"height": 32.5, "width": 32},
                          {"longest_edge": 2**64}, [])
]  # fmt: skip
PROCESSOR += [
    ("crop_size", {"height": 10**12, "width": 1}),
    ("do_center_crop", True),
    ("resample", 99),
    ("resample", "x"),
]
PROCESSOR += [("image_mean", v) for v in ([], [1], None, ["a"] * 3, 3, [1e300] * 3)]
PROCESSOR += [("image_std", v) for v in ([0, 0, 0], [], None, 0)]
PROCESSOR += [("rescale_factor", v) for v in (0, 1e400, -1, "x", None)]


@pytest.mark.parametrize(("key", "value"), PROCESSOR, ids=lambda v: repr(v)[:24])
def test_image_processors(place, key, value):
    changed(Path("vit/preprocessor_config.json"), [key], value)
    works_or_refuses(load_checkpoint, "vit")


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**5, "", "{", "3", "null", "[]", '{"model_type": ' + "1" * 5000 + "}"]
)
@pytest.mark.parametrize("model", ["timm", "llama", "out"])
def test_configurations_that_are_none(place, model, text):
    Path(model, "config.json").write_text(text)
    one_line_of(load_checkpoint, model)
