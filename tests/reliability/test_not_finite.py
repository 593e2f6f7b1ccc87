"""A NaN, an infinity or a huge value in one weight or one figure: the step that meets it names where, and ends."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cases import bounded, one_line_of, refused_line
from safetensors.torch import load_file, save_file
from tiny import Times, t2t

from sbpatch.calibration.allocate import allocate
from sbpatch.calibration.stages import calibrate
from sbpatch.models.answers import Scores
from sbpatch.models.weights import read_tensors
from sbpatch.sites.observe import check_finite
from sbpatch.writing import json_text

WRONG = [math.nan, math.inf, -math.inf]
TENSORS = [name for name, tensor in t2t().state_dict().items() if tensor.is_floating_point()]
COSTS = Times(lambda layer: 0.5)
HUGE = "tokens_to_token.attention1.attn.qkv.weight"


def spoil(value: float, name: str, file: str = "tiny.pth") -> None:
    state = torch.load(file, weights_only=True)["state_dict_ema"]
    state[name].flatten()[state[name].numel() // 2] = value
    torch.save({"state_dict_ema": state}, file)


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_a_weight_is_named_as_the_file_is_read(name, value, tmp_path):
    state = t2t().state_dict()
    state[name].view(-1)[-1] = value
    save_file(state, tmp_path / "x.safetensors")
    assert f"tensor '{name}' holds {'NaN' if value != value else 'an infinite value'}" in one_line_of(
        read_tensors, tmp_path / "x.safetensors"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["weight", "attn_mask"])
def test_in_every_type_and_in_masks(name, dtype, tmp_path):
    tensor = torch.zeros(9).to(dtype)
    tensor[3] = math.nan
    torch.save({name: tensor}, tmp_path / "x.pth")
    assert f"tensor '{name}' holds NaN" in one_line_of(read_tensors, tmp_path / "x.pth")


def test_a_mask_may_hide_by_minus_infinity(tmp_path):
    torch.save({"attn_mask": torch.full((3,), -math.inf)}, tmp_path / "x.pth")
    assert read_tensors(tmp_path / "x.pth")["attn_mask"].isinf().all()


COMMANDS = {
    "inspect": [],
    "calibrate": ["-o", "new", "--data", "images", "--samples", "2"],
    "compare": ["--dataset", "images", "--data", "images", "--samples", "2"],
    "analyze": ["-o", "new", "--data", "images", "--samples", "2"],
    "bench": ["--data", "images"],
    "eval": ["--dataset", "images"],
}


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("verb", COMMANDS)
def test_every_command_names_the_tensor(place, capfd, verb, value):
    spoil(value, "blocks.0.attn.qkv.weight")
    said = refused_line(capfd, verb, "tiny.pth", *COMMANDS[verb], "--quiet")
    assert "tensor 'blocks.0.attn.qkv.weight'" in said


@pytest.mark.parametrize("model", ["llama", "bert", "vit", "timm"])
@pytest.mark.parametrize("value", WRONG, ids=str)
def test_every_family_names_the_tensor(place, capfd, model, value):
    state = load_file(f"{model}/model.safetensors")
    name = sorted(state)[len(state) // 2]
    state[name].view(-1)[0] = value
    save_file(state, f"{model}/model.safetensors", metadata={"format": "pt"})
    assert f"tensor '{name}'" in refused_line(capfd, "inspect", model, "--quiet")


@pytest.mark.parametrize("value", [3e38, -3e38, 1e30])
@pytest.mark.parametrize("verb", ["calibrate", "compare", "analyze", "bench"])
def test_values_that_overflow_on_the_way_name_the_site(place, capfd, verb, value):
    """Finite as a weight, infinite where it is multiplied."""
    state = torch.load("tiny.pth", weights_only=True)["state_dict_ema"]
    state[HUGE][:] = value
    torch.save({"state_dict_ema": state}, "tiny.pth")
    said = refused_line(capfd, verb, "tiny.pth", *COMMANDS[verb], "--quiet", *(["--keep-slow"] * (verb == "calibrate")))
    assert "not finite" in said


@pytest.mark.slow
def test_evaluation_does_not_answer_nan(place, capfd):
    state = torch.load("tiny.pth", weights_only=True)["state_dict_ema"]
    state["head.weight"][:] = 3e38
    torch.save({"state_dict_ema": state}, "tiny.pth")
    said = refused_line(capfd, "eval", "tiny.pth", "--dataset", "images", "--quiet")
    assert "not finite" in said


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("where", ["cost", "damage", "limit"])
def test_no_budget_is_shared_out_over_what_is_not_finite(where, value):
    curve = [(1.0, 2.0), (2.0, 1.0)]
    if where != "limit":
        curve[1] = (value, 1.0) if where == "cost" else (2.0, value)
    said = one_line_of(allocate, [curve, [(1.0, 2.0)]], value if where == "limit" else 5.0)
    assert "not a finite number" in said


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize(
    ("shape", "where"),
    [
        (lambda x: x, "value"),
        (lambda x: {"a": x}, "a"),
        (lambda x: {"rows": [{"ms": 1.0}, {"ms": x}]}, "rows.1.ms"),
        (lambda x: {"variants": {"sdpa": {"top1": (1.0, x)}}}, "variants.sdpa.top1.1"),
    ],
)
def test_json_holds_finite_numbers_alone(shape, where, value):
    assert f"the result's {where} is not" in one_line_of(json_text, shape(value))
    assert json.loads(json_text(shape(1.5))) is not None


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_value_is_found_among_many(value, dtype):
    values = torch.zeros(3, 5, 7, dtype=dtype)
    check_finite(values, "site", "its output")
    check_finite(values[:0], "site", "its output")
    values[1, 2, 3] = value
    assert "site: its output is not finite" in one_line_of(check_finite, values, "site", "its output")


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("objective", ["memory", "time"])
@pytest.mark.parametrize("allocation", ["joint", "measured"])
def test_inputs_that_are_not_finite_end_a_calibration(value, objective, allocation):
    images = torch.randn(2, 3, 64, 64)
    images[1, 0, 5, 5] = value
    said = one_line_of(calibrate, t2t(), [images], budget=0.2, objective=objective, allocation=allocation, costs=COSTS)
    assert "site 'tokens_to_token.attention1.attn'" in said


@pytest.mark.parametrize("nll", [701.0, 1e6, 1e300])
def test_a_perplexity_beyond_all_numbers(nll):
    with bounded():
        assert "predicts nothing" in one_line_of(Scores({"nll": nll}, {"nll": 1}).figures)
