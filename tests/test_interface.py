"""transformers models by both doors: loaded as usual and redirected, and attn_implementation="scatterbrain"."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import refused
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from sbpatch.attention import Scatterbrain
from sbpatch.data.batch import run
from sbpatch.sites.calls import Call
from sbpatch.sites.find import find_sites
from sbpatch.sites.swap import PatchedSite, restore, swap, swapped

N = 160
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
IDS = torch.randint(3, 60, (2, N), generator=torch.Generator().manual_seed(1))


def built(cls: type[PreTrainedModel], config: object, door: str = "sdpa") -> PreTrainedModel:
    """A model with random weights, large enough that its attention is far from uniform."""
    torch.manual_seed(0)
    config._attn_implementation = door
    model = cls(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            nn.init.normal_(weight, std=0.3)
    return model


def bert(door: str = "sdpa") -> PreTrainedModel:
    return built(BertModel, BertConfig(vocab_size=60, max_position_embeddings=N, **WIDTHS), door)


def llama(door: str = "sdpa") -> PreTrainedModel:
    config = LlamaConfig(vocab_size=60, num_key_value_heads=2, max_position_embeddings=512, eos_token_id=None, **WIDTHS)
    return built(LlamaForCausalLM, config, door)


def layers(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, PatchedSite]:
    """A real approximation for every site."""
    found = {}
    for site in find_sites(model, inputs):
        assert site.unsupported is None
        method = "blocks" if site.geometry.causal else "window+clusters"
        sizes = {"near": 8, "block": 4, "blocks": 2, "tile": 8} if site.geometry.causal else {"window": 5, "rank": 6}
        found[site.name] = PatchedSite(site.name, Scatterbrain(method, site.geometry, 0, **sizes))
    return found


def answer(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        return run(model, inputs)


DOORS = pytest.mark.parametrize("door", ["sdpa", "scatterbrain"])
MODELS = pytest.mark.parametrize("make", [bert, llama])


# ---- finding


@DOORS
@pytest.mark.parametrize("padded", ["", "left", "right"])
@MODELS
def test_sites_and_their_causality(make, door, padded):
    mask = torch.ones_like(IDS)
    if padded:
        mask[1, slice(0, 30) if padded == "left" else slice(N - 30, N)] = 0
    sites = find_sites(make(door), {"input_ids": IDS, "attention_mask": mask})
    assert len(sites) == 2
    for site in sites:
        assert site.unsupported is None
        assert (site.geometry.tokens, site.geometry.heads, site.geometry.head_dim) == (N, 4, 8)
        assert site.geometry.causal == (make is llama)
        assert site.geometry.grid is None


def test_sites_of_an_image_model_have_their_grid():
    config = ViTConfig(image_size=48, patch_size=8, **WIDTHS)
    sites = find_sites(built(ViTModel, config), {"pixel_values": torch.randn(1, 3, 48, 48)})
    assert len(sites) == config.num_hidden_layers
    for site in sites:
        assert (site.geometry.grid, site.geometry.prefix, site.unsupported) == ((6, 6), 1, None)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: built(T5EncoderModel, T5Config(vocab_size=60, d_model=32, d_kv=8, num_layers=1, num_heads=4)), "bias"),
        (lambda: built(MistralForCausalLM, MistralConfig(sliding_window=32, num_key_value_heads=2, **WIDTHS)), "local"),
        (lambda: bert("eager"), "attn_implementation='sdpa'"),
    ],
)  # fmt: skip
def test_what_stays_exact_says_why(make, reason):
    """A relative bias, a sliding window, and attention by hand."""
    sites = find_sites(make(), {"input_ids": IDS})
    assert sites
    for site in sites:
        assert reason in site.unsupported


# ---- padding


@DOORS
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_the_unpadded_results(door, side):
    """Row by row, for an encoder: what lies in the padding changes nothing."""
    model = bert(door)
    real = N - 17
    kept = slice(17, N) if side == "left" else slice(0, real)
    mask = torch.zeros_like(IDS)
    mask[1, kept] = 1
    mask[0] = 1
    positions = torch.arange(N).repeat(2, 1)
    positions[1, kept] = torch.arange(real)
    inputs = {"input_ids": IDS, "attention_mask": mask, "position_ids": positions}
    # a window slides with the padding, clusters alone do not see it
    swap(model, {
        site.name: PatchedSite(site.name, Scatterbrain("clusters", site.geometry, 0, rank=12))
        for site in find_sites(model, {"input_ids": IDS})
    })  # fmt: skip
    batch = answer(model, **inputs)
    full = answer(model, input_ids=IDS[:1], position_ids=positions[:1])
    short = answer(model, input_ids=IDS[1:, kept], position_ids=positions[1:, kept])
    torch.testing.assert_close(batch[:1], full, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch[1:, kept], short, atol=1e-4, rtol=1e-4)
    other = IDS.clone()
    other[1, mask[1] == 0] = 7
    torch.testing.assert_close(answer(model, **inputs | {"input_ids": other})[mask == 1], batch[mask == 1])


@DOORS
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_of_prompts_gives_what_single_prompts_give(door, side):
    """Causal blocks, whose tiles stand in the same place of a prompt whatever is beside it; the shortest prompt is exact."""
    model, lengths = llama(door), [N, N - 17, N - 60, 12]
    swap(model, layers(model, {"input_ids": IDS[:1]}))
    ids = torch.randint(3, 60, (4, N), generator=torch.Generator().manual_seed(5))
    kept = [slice(N - n, N) if side == "left" else slice(0, n) for n in lengths]
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, one in enumerate(kept):
        mask[i, one], positions[i, one] = 1, torch.arange(lengths[i])
    found = answer(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    assert found.isfinite().all()
    plain = llama("sdpa")
    for i, one in enumerate(kept):
        alone = ids[i : i + 1, one]
        torch.testing.assert_close(found[i : i + 1, one], answer(model, input_ids=alone), atol=1e-4, rtol=1e-4)
        exact = answer(plain, input_ids=alone)
        assert torch.allclose(found[i : i + 1, one], exact, atol=1e-4) == (lengths[i] == 12)


@DOORS
def test_a_padded_batch_generates_what_single_prompts_do(door):
    model = llama(door)
    swap(model, layers(model, {"input_ids": IDS[:1]}))
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    mask[1, :43] = 0
    found = model.generate(IDS * mask, attention_mask=mask, **asked)[:, N:]
    for i, start in enumerate((0, 43)):
        assert torch.equal(found[i], model.generate(IDS[i : i + 1, start:], **asked)[0, N - start :])


@DOORS
@pytest.mark.parametrize("side", ["left", "right"])
@MODELS
def test_plain_calls_are_what_the_model_computes(make, door, side):
    """Every call of a padded batch, taken to its plain form and computed exactly, gives the model's own answer."""
    model = make(door)
    mask = torch.ones_like(IDS)
    mask[1, slice(0, 40) if side == "left" else slice(N - 40, N)] = 0
    expected = answer(make(), input_ids=IDS, attention_mask=mask)
    seen: list[Call] = []

    def replacement(call: Call) -> Tensor:
        seen.append(call.plain(make is llama))
        return seen[-1].exact()

    with swapped(model, {s.name: replacement for s in find_sites(model, {"input_ids": IDS})}):
        found = answer(model, input_ids=IDS, attention_mask=mask)
    assert len(seen) == 2
    assert torch.equal(seen[0].key_mask, mask.bool())
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], atol=1e-4, rtol=1e-4)


@DOORS
@pytest.mark.parametrize("padded", [False, True])
def test_grouped_heads_come_unrepeated(door, padded):
    model, seen = llama(door), []
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    names = [site.name for site in find_sites(model, {"input_ids": IDS})]
    with swapped(model, dict.fromkeys(names, lambda call: seen.append(call.key.shape[1]) or call.exact())):
        answer(model, input_ids=IDS, **({"attention_mask": mask} if padded else {}))
    assert seen == [2, 2]


def test_a_redirected_module_has_a_configuration_of_its_own():
    """Only what is patched is told; the model's configuration, which its other layers share, stays as it was."""
    model = llama()
    first, second = (layer.self_attn for layer in model.model.layers)
    shared = first.config
    swap(model, {"model.layers.0.self_attn": Call.exact})
    assert (first.config._attn_implementation, second.config._attn_implementation) == ("scatterbrain", "sdpa")
    assert second.config is shared is model.config
    restore(model)
    assert first.config is shared


def test_a_module_that_asks_its_configuration_for_more_is_swapped_by_class():
    """What it does beside the attention could change with the name."""

    class Asking(LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            assert self.config._attn_implementation == "sdpa"
            return super().forward(*args, **kwargs)

    model, exact, seen = llama(), llama(), []
    model.model.layers[0].self_attn.__class__ = Asking
    names = [site.name for site in find_sites(model, {"input_ids": IDS})]
    swap(model, dict.fromkeys(names, lambda call: seen.append(call) or call.exact()))
    torch.testing.assert_close(answer(model, input_ids=IDS), answer(exact, input_ids=IDS))
    assert len(seen) == 2
    assert [hasattr(layer.self_attn, "sbpatch_original") for layer in model.model.layers] == [True, False]


# ---- decoding


@DOORS
def test_prefill_is_patched_and_decoding_is_exact(door):
    """With a cache: the prompt's logits are the patched model's, each new token attends to all of the cache exactly."""
    model = llama(door)
    exact = llama()
    swap(model, layers(model, {"input_ids": IDS}))
    patched = answer(model, input_ids=IDS)
    assert (patched - answer(exact, input_ids=IDS)).abs().max() > 1e-3
    with torch.inference_mode():
        prefill = model(input_ids=IDS, use_cache=True)
        torch.testing.assert_close(prefill.logits, patched)
        cache = copy.deepcopy(prefill.past_key_values)
        token = prefill.logits[:, -1:].argmax(-1)
        step = model(input_ids=token, past_key_values=prefill.past_key_values).logits
        reference = exact(input_ids=token, past_key_values=cache).logits  # the exact model on the same cache
    torch.testing.assert_close(step, reference)


@DOORS
@pytest.mark.parametrize("padded", [False, True])
def test_generation(door, padded):
    """Greedy generation is prefill once and exact steps after it."""
    model, exact = llama(door), llama()
    swap(model, layers(model, {"input_ids": IDS}))
    mask = torch.ones_like(IDS)
    if padded:
        mask[1, :25] = 0
    arguments = {
        "attention_mask": mask,
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
    }
    found = model.generate(IDS, **arguments)
    with torch.inference_mode():
        out = model(input_ids=IDS, attention_mask=mask, use_cache=True, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        cache, tokens = out.past_key_values, [out.logits[:, -1].argmax(-1)]
        for _ in range(4):
            mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
            positions = mask.sum(-1, keepdim=True) - 1
            step = exact(
                input_ids=tokens[-1][:, None], attention_mask=mask, past_key_values=cache, position_ids=positions
            )
            tokens.append(step.logits[:, -1].argmax(-1))
    assert torch.equal(found[:, N:], torch.stack(tokens, dim=1))
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **arguments)
    if not padded:  # a padded prompt in a longer cache is read exactly, see PatchedSite
        assert torch.equal(static, found)


def test_gpt2_too():
    model = built(GPT2LMHeadModel, GPT2Config(vocab_size=60, n_positions=N + 8, n_embd=32, n_layer=2, n_head=4))
    swap(model, layers(model, {"input_ids": IDS}))
    assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape == (2, N + 3)


# ---- both doors, and PyTorch's other machinery


@MODELS
def test_both_doors_give_the_same(make):
    ours, theirs = make("scatterbrain"), make()
    planned = layers(theirs, {"input_ids": IDS})
    expected = answer(theirs, input_ids=IDS)
    swap(theirs, planned)
    swap(ours, copy.deepcopy(planned))
    patched = answer(theirs, input_ids=IDS)
    assert not torch.equal(patched, expected)
    torch.testing.assert_close(answer(ours, input_ids=IDS), patched)
    assert not any(hasattr(type(m), "sbpatch_original") for m in ours.modules())
    assert not any(hasattr(type(m), "sbpatch_original") for m in theirs.modules())
    restore(theirs)
    assert torch.equal(answer(theirs, input_ids=IDS), expected)


@MODELS
def test_without_a_plan_the_implementation_refuses(make):
    """Before patch and after unpatch; one site patched is a plan, and the others are exact then."""
    model, exact = make("scatterbrain"), make()
    assert "has no plan" in refused(answer, model, input_ids=IDS)
    names = [site.name for site in find_sites(model, {"input_ids": IDS})]
    assert "has no plan" in refused(answer, model, input_ids=IDS)
    swap(model, {names[0]: Call.exact})
    torch.testing.assert_close(answer(model, input_ids=IDS), answer(exact, input_ids=IDS))
    restore(model)
    assert "has no plan" in refused(answer, model, input_ids=IDS)
    model.set_attn_implementation("sdpa")
    assert torch.equal(answer(model, input_ids=IDS), answer(exact, input_ids=IDS))


@pytest.mark.slow
def test_a_saved_model_loads_plainly(tmp_path):
    """transformers does not write the implementation down, and the patch adds nothing to the weights."""
    model = llama("scatterbrain")
    keys = list(model.state_dict())
    swap(model, layers(model, {"input_ids": IDS}))
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert "scatterbrain" not in (tmp_path / "config.json").read_text()
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "print(model.config._attn_implementation, 'sbpatch' in sys.modules)"
    )
    plain = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert plain.stdout.split() == ["sdpa", "False"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="scatterbrain")
    assert "has no plan" in refused(answer, again, input_ids=IDS)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import sbpatch, transformers", "import transformers.modeling_utils, sbpatch"])
def test_registered_whichever_is_imported_first(order):
    script = (
        f"{order}; from transformers import AttentionInterface; "
        "from transformers.masking_utils import AttentionMaskInterface, sdpa_mask; import sbpatch.sites.interface; "
        "assert AttentionInterface()['scatterbrain'] is sbpatch.sites.interface.attention; "
        "assert AttentionMaskInterface()['scatterbrain'] is sdpa_mask"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


@DOORS
@MODELS
def test_copies_threads_and_types(make, door):
    model = make(door)
    swap(model, layers(model, {"input_ids": IDS}))
    patched = answer(model, input_ids=IDS)
    twin = copy.deepcopy(model)
    restore(model)
    assert torch.equal(answer(twin, input_ids=IDS), patched)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = answer(twin, input_ids=IDS)
    assert torch.isfinite(rounded).all()
    assert torch.linalg.vector_norm(rounded - patched) < 0.2 * torch.linalg.vector_norm(patched)
    assert answer(twin.to(torch.bfloat16), input_ids=IDS).dtype == torch.bfloat16


@DOORS
@MODELS
def test_compile_without_a_graph_break(make, door):
    model = make(door)
    swap(model, layers(model, {"input_ids": IDS}))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    arguments = {"input_ids": IDS} | ({"use_cache": False} if make is llama else {})
    torch.testing.assert_close(answer(compiled, **arguments), answer(model, **arguments), atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


@DOORS
@MODELS
def test_gradients_and_checkpointing(make, door):
    model = make(door)
    swap(model, layers(model, {"input_ids": IDS}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        run(model, {"input_ids": IDS}).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    assert all(torch.isfinite(g).all() for g in plain.values())
    model.gradient_checkpointing_enable()
    again = gradients()
    assert again.keys() == plain.keys()
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, plain[name], msg=name)
