"""Generation with a compressed cache: the step, the cache under all that transformers asks of it, and `generate`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import refused
from tiny_text import llama, words
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM
from transformers_coverage import plan_on

import sbpatch
from sbpatch.attention import Scatterbrain
from sbpatch.generation import with_compressed_cache
from sbpatch.generation.cache import CompressedCache
from sbpatch.generation.generate import cache_name, patched_layers
from sbpatch.generation.layer import CompressedLayer
from sbpatch.generation.partition import halves
from sbpatch.generation.settings import Settings
from sbpatch.generation.shares import shared_out
from sbpatch.models.load import load_checkpoint
from sbpatch.plan import artifact
from sbpatch.sites.find import find_sites
from sbpatch.sites.swap import PatchedSite, swap

SMALL = Settings(budget=0.5, block=4, recent=8, run=16, least=0)
NAME = cache_name(LlamaForCausalLM)


class Every(Settings):
    """Reads every block exactly, so that what comes out is exact attention by the way of the blocks."""

    def best(self, tokens: int, blocked: int, weight: float = 1.0) -> int:
        return blocked // self.block


def tensors(tokens: int, batch: int = 2, heads: int = 2, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, tokens, width, generator=make) for _ in range(2))


def filled(
    tokens: int, how: Settings = SMALL, steps: int = 1, mask: Tensor | None = None
) -> tuple[CompressedLayer, Tensor, Tensor]:
    """A layer after a prompt and so many steps, with all its keys and values in the order of time."""
    layer, (k, v) = CompressedLayer(how), tensors(tokens + steps)
    layer.update(k[:, :, :tokens], v[:, :, :tokens])
    for i in range(tokens, tokens + steps):
        held = layer.update(k[:, :, i : i + 1], v[:, :, i : i + 1])
        F.scaled_dot_product_attention(
            k[:, :, :1], *held, attn_mask=None if mask is None else mask[:, None, None, : i + 1]
        )
    return layer, k, v


# ---- blocks of alike keys


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 13), st.integers(2, 5), st.integers(0, 99))
def test_every_token_is_in_one_block(count, block, seed):
    k, _ = tensors(count * block, seed=seed)
    order = halves(k, block)
    assert (order.sort(-1).values == torch.arange(count * block)).all()


def test_blocks_hold_alike_keys_wherever_they_stand():
    """Sixteen distant groups of four keys each, scattered over the sequence: every block is one group."""
    centres = 50 * torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    group = torch.arange(16).repeat(4)[torch.randperm(64, generator=torch.Generator().manual_seed(4))]
    keys = centres[group] + 0.01 * torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
    order = halves(keys[None, None], 4)
    found = group[order.view(16, 4)]
    assert (found == found[:, :1]).float().mean() > 0.9


def test_padding_gathers_in_the_first_blocks():
    k, _ = tensors(32)
    real = torch.ones(2, 2, 32, dtype=torch.bool)
    real[1, :, 5:17] = False
    order = halves(k, 4, real)
    assert not real[1].gather(-1, order[1])[:, :12].any()
    assert (halves(k, 4)[0] == order[0]).all()


# ---- the step


def attention(layer: CompressedLayer, q: Tensor, new: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, *layer.update(*new), attn_mask=mask, enable_gqa=True)


def by_hand(layer: CompressedLayer, q: Tensor) -> Tensor:
    """The definition of a step, for one head at a time, from what lies in blocks and in the order of time."""
    s, out = layer.settings, torch.empty(*q.shape)
    group = q.shape[1] // layer.keys.shape[1]
    best = s.best(layer.tokens, layer.blocked, layer.reads)
    for b in range(q.shape[0]):
        for h in range(layer.keys.shape[1]):
            key, value = layer.keys[b, h], layer.values[b, h]
            inside = [x[: layer.blocked].view(-1, s.block, x.shape[1]) for x in (key, value)]
            point, mean = (x.mean(1) for x in inside)
            queries = q[b, h * group : (h + 1) * group, 0] * q.shape[-1] ** -0.5
            rank = (queries @ point.T).softmax(-1).sum(0)
            rank[0] = torch.inf
            chosen = rank.argsort(descending=True)[:best].tolist()
            others = [i for i in range(len(point)) if i not in chosen]
            keys = torch.cat([point[others], *(inside[0][i] for i in chosen), key[layer.blocked :]])
            values = torch.cat([mean[others], *(inside[1][i] for i in chosen), value[layer.blocked :]])
            bias = torch.zeros(len(keys))
            bias[: len(others)] = torch.tensor(float(s.block)).log()
            out[b, h * group : (h + 1) * group, 0] = ((queries @ keys.T) + bias).softmax(-1) @ values
    return out


@pytest.mark.parametrize("tokens", [80, 97, 200])
def test_a_step_is_what_its_definition_says(tokens):
    layer, *_ = filled(tokens)
    q = torch.randn(2, 6, 1, 8, generator=torch.Generator().manual_seed(1))
    out = attention(layer, q, tensors(1, seed=9))
    assert layer.blocked > 0
    torch.testing.assert_close(out, by_hand(layer, q), atol=1e-5, rtol=1e-5)


def test_alike_keys_cost_no_error():
    """Where the keys of every block are the same, points say all there is to say."""
    layer = CompressedLayer(Settings(budget=0.4, block=4, recent=8, run=16, least=0))
    keys, values = torch.ones(1, 1, 160, 8), torch.randn(1, 1, 160, 8, generator=torch.Generator().manual_seed(1))
    layer.update(keys, values)
    new = (2 * keys[:, :, :1], values[:, :, :1])
    q = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(2))
    out = attention(layer, q, new)
    exact = F.scaled_dot_product_attention(
        q, *(torch.cat(x, 2) for x in zip((keys, values), new, strict=True)), enable_gqa=True
    )
    assert layer.read < 0.4 * layer.offered
    torch.testing.assert_close(out, exact)


def test_grouped_heads_in_both_forms_give_the_same():
    """transformers hands a step's heads over as (B, H, 1, d), or packed by groups as (B, H_k, g, d)."""
    layer, *_ = filled(100)
    other = copy.deepcopy(layer)
    q, new = torch.randn(2, 6, 1, 8), tensors(1, seed=9)
    packed = attention(other, q.view(2, 2, 3, 8), new)
    assert torch.equal(attention(layer, q, new).view(2, 2, 3, 8), packed)


@pytest.mark.parametrize("hidden", [13, 40])
def test_padding_changes_nothing(hidden):
    """A padded sample beside a full one: whatever stands in the padding, the same bits; nothing of it is read."""
    mask = torch.ones(2, 122, dtype=torch.bool)
    mask[1, :hidden] = False
    outputs = []
    for content in (0.0, 100.0):
        layer, (k, v) = CompressedLayer(SMALL), tensors(122)
        k[1, :, :hidden], v[1, :, :hidden] = content, content
        layer.update(k[:, :, :120], v[:, :, :120])
        for i in (120, 121):
            q = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(i))
            new = (k[:, :, i : i + 1], v[:, :, i : i + 1])
            outputs.append(attention(layer, q, new, mask[:, None, None, : i + 1]))
        assert layer.read < 0.6 * layer.offered
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], enable_gqa=True)
        assert (outputs[-1] - exact).norm() < 0.5 * exact.norm()
    torch.testing.assert_close(outputs[1], outputs[3])


def test_a_mask_that_hides_more_than_padding_reads_all():
    layer, k, v = filled(100, steps=2)
    q, new = torch.randn(2, 2, 1, 8), tensors(1, seed=9)
    bias = torch.randn(1, 2, 1, 103)
    k, v = (torch.cat(pair, 2) for pair in zip((k, v), new, strict=True))
    torch.testing.assert_close(attention(layer, q, new, bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


# ---- what transformers asks of a cache layer


def test_what_is_held_comes_back_in_the_order_of_time():
    layer, k, v = filled(120, steps=40)
    assert layer.blocked > 100
    assert torch.equal(layer.in_time(layer.keys), k)
    more = tensors(3, seed=9)
    back = layer.update(*more)  # several tokens on top of a past: all in their order, for exact attention
    assert torch.equal(back[0], torch.cat([k, more[0]], 2))
    assert torch.equal(back[1], torch.cat([v, more[1]], 2))


def test_anything_but_attention_sees_keys_in_the_order_of_time():
    layer, k, v = filled(120)
    new = tensors(1, seed=9)
    key, value = layer.update(*new)
    assert key.shape == (2, 2, 122, 8)
    assert torch.equal(key.mT, torch.cat([k, new[0]], 2).mT)
    assert torch.equal(torch.cat([value, value], 2)[:, :, 122:], torch.cat([v, new[1]], 2))


@pytest.mark.parametrize("gone", [1, 5, 60, 200])
def test_crop_is_as_if_the_tokens_had_never_come(gone):
    layer, k, v = filled(120, steps=10)
    layer.crop(-gone)
    left = max(130 - gone, 0)
    assert layer.get_seq_length() == left
    assert torch.equal(layer.in_time(layer.keys), k[:, :, :left])
    again = layer.update(k[:, :, left:], v[:, :, left:])
    assert torch.equal(again[0], k)
    assert "negative" in refused(layer.crop, 3)


def test_reset_and_the_choice_of_samples():
    layer, *_ = filled(120)
    q, new = torch.randn(2, 2, 1, 8), tensors(1, seed=9)
    turned = copy.deepcopy(layer)
    turned.reorder_cache(torch.tensor([1, 0]))
    out = attention(layer, q, new)
    torch.testing.assert_close(attention(turned, q.flip(0), tuple(x.flip(0) for x in new)).flip(0), out)
    turned.batch_select_indices(torch.tensor([1]))
    turned.batch_repeat_interleave(3)
    assert turned.keys.shape == (3, 2, 122, 8)
    turned.reset()
    assert turned.get_seq_length() == 0
    k, v = tensors(30)
    assert torch.equal(turned.update(k, v)[0], k)


@pytest.mark.parametrize(
    "wrong", [{"budget": 0}, {"budget": 1.5}, {"block": 1}, {"recent": -1}, {"least": -1}, {"run": 40}, {"run": 0}]
)
def test_settings_out_of_range_are_refused(wrong):
    assert "budget must be" in refused(Settings, **wrong)


def test_a_short_past_is_read_whole():
    layer, *_ = filled(120, Settings(budget=0.25, block=4, recent=8, run=16, least=200))
    key, _ = layer.update(*tensors(1, seed=9))
    assert type(key) is Tensor
    assert layer.read == layer.offered > 0


# ---- whole models


IDS = torch.randint(3, 60, (2, 150), generator=torch.Generator().manual_seed(1))
PLAIN = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


def model() -> LlamaForCausalLM:
    return llama()


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_read_whole_generates_what_the_exact_one_does(way, padded):
    """With every block read exactly, the way by the blocks gives the exact cache's tokens."""
    mask = torch.ones_like(IDS)
    if padded:
        mask[1, :37] = 0
    found = []
    for cache in (
        DynamicCache(config=model().config),
        CompressedCache(model().config, Every(block=4, recent=8, run=16, least=0)),
    ):
        torch.manual_seed(0)
        found.append(model().generate(IDS, attention_mask=mask, **{NAME: cache}, **PLAIN | WAYS[way]))
    assert torch.equal(*found)
    assert min(layer.blocked for layer in cache.layers) > 100


def test_a_small_budget_reads_that_much_and_stores_little_more():
    cache = CompressedCache(model().config, SMALL)
    model().generate(IDS, **{NAME: cache}, **PLAIN)
    assert 0.3 < cache.read_share <= 0.5
    assert 1.0 < cache.stored_share < 4.0
    assert cache.get_seq_length() == 173
    chosen = CompressedCache(model().config, SMALL, [1])
    model().generate(IDS, **{NAME: chosen}, **PLAIN)
    assert [type(layer).__name__ for layer in chosen.layers] == ["DynamicLayer", "CompressedLayer"]
    assert chosen.read_share == pytest.approx((1 + cache.layers[1].read / cache.layers[1].offered) / 2)


def test_layers_read_in_proportion_to_their_weights_and_the_budget_on_average():
    alike, apart = (CompressedCache(model().config, SMALL, chosen) for chosen in ([0, 1], {0: 0.2, 1: 0.3}))
    for cache in (alike, apart):
        model().generate(IDS, **{NAME: cache}, **PLAIN)
    few, many = (layer.read / layer.offered for layer in apart.layers)
    assert few < alike.read_share < many
    assert 1.25 < many / few < 1.65  # 1.5, in whole blocks
    assert apart.read_share <= 0.5


@given(
    weights=st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=30).map(tuple),
    bounds=st.lists(st.integers(1, 10_000), min_size=3, max_size=3).map(sorted),
)
def test_layers_read_within_bounds_by_weight_and_the_budget_on_average(weights, bounds):
    least, mean, most = bounds
    found = shared_out(weights, mean, least, most)
    assert mean * len(weights) - len(weights) <= sum(found) <= mean * len(weights)  # whole tokens
    assert least <= min(found)
    assert max(found) <= most
    between = [(w, read) for w, read in zip(weights, found, strict=True) if least < read < most - 1]
    for weight, read in between:
        assert all(abs(read / weight - other / w) <= 1 / weight + 1 / w for w, other in between)


def test_no_blocks_are_made_of_a_past_of_which_over_half_would_be_read():
    for budget, blocks in ((0.5, True), (0.6, False)):
        layer = CompressedLayer(Settings(budget=budget, block=4, recent=8, run=16, least=0))
        layer.update(*(x[:1] for x in tensors(150)))  # of one sample, whose blocks are made with the prompt
        assert (layer.order is not None) == (layer.blocked > 0) == blocks


def test_a_layer_that_reads_all_is_exact_however_it_lies():
    layer = CompressedLayer(SMALL, reads=lambda mean, least, most: most)
    layer.update(*tensors(150))
    q, new = torch.randn(2, 6, 1, 8, generator=torch.Generator().manual_seed(1)), tensors(1, seed=9)
    past = [torch.cat(x, 2) for x in zip(tensors(150), new, strict=True)]
    torch.testing.assert_close(attention(layer, q, new), F.scaled_dot_product_attention(q, *past, enable_gqa=True))
    assert layer.blocked > 0
    assert layer.read == layer.offered


def test_generate_uses_the_compressed_cache_unless_told_otherwise():
    plain = model().generate(IDS, **PLAIN)
    patched = with_compressed_cache(model(), settings=SMALL)
    asked = {"return_dict_in_generate": True}
    found = patched.generate(IDS, **asked, **PLAIN)
    assert isinstance(found[NAME], CompressedCache)
    assert found[NAME].read_share < 0.6
    for exact in ({"cache": "exact"}, {NAME: DynamicCache(config=patched.config)}, {"use_cache": False}):
        assert torch.equal(patched.generate(IDS, **exact, **PLAIN), plain), exact
    never = GenerationConfig(**PLAIN, use_cache=False, return_dict_in_generate=True)
    assert patched.generate(IDS, generation_config=never).get(NAME) is None
    assert "compressed or exact" in refused(patched.generate, IDS, cache="small", **PLAIN)
    sbpatch.unpatch(patched)
    assert type(patched) is LlamaForCausalLM
    assert "does not generate" in refused(with_compressed_cache, torch.nn.Linear(2, 2))


def test_the_same_bits_twice():
    runs = []
    for _ in range(2):
        cache = CompressedCache(model().config, SMALL)
        runs.append(model().generate(IDS, **{NAME: cache}, output_logits=True, return_dict_in_generate=True, **PLAIN))
    assert torch.equal(torch.stack(runs[0].logits), torch.stack(runs[1].logits))


def test_a_cache_made_in_inference_mode_goes_on_outside_of_it():
    cache, own = CompressedCache(model().config, SMALL), model()
    for mode, more in ((torch.inference_mode, 0), (torch.no_grad, 2)):
        ids = torch.cat([IDS, IDS[:, :more]], 1)
        with mode():
            assert own.generate(ids, **{NAME: cache}, max_new_tokens=2, pad_token_id=0).shape == (2, 152 + more)


# ---- patched models


@pytest.mark.parametrize("door", ["sdpa", "scatterbrain"])
def test_a_patched_prompt_and_the_blocks_go_together(door):
    """By both doors, with every block read exactly: what the patched model generates with an exact cache."""
    own = llama(attn_implementation=door)
    sites = find_sites(own, {"input_ids": IDS})
    sizes = {"near": 8, "block": 4, "blocks": 2, "tile": 8}
    swap(own, {s.name: PatchedSite(s.name, Scatterbrain("blocks", s.geometry, 0, **sizes)) for s in sites})
    caches = DynamicCache(config=own.config), CompressedCache(own.config, Every(block=4, recent=8, run=16, least=0))
    assert torch.equal(*(own.generate(IDS, **{NAME: cache}, **PLAIN) for cache in caches))
    assert min(layer.blocked for layer in caches[1].layers) > 100


def test_a_loaded_directory_compresses_the_layers_that_are_patched(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    loaded = load_checkpoint(str(tmp_path / "base"), input_size=150)
    plan = plan_on(loaded)
    plan.sites[1].decision, plan.sites[1].reason = "exact", "left out"
    artifact.save(tmp_path / "out", loaded, plan)
    own = sbpatch.load(tmp_path / "out")
    found = own.generate(IDS, return_dict_in_generate=True, **PLAIN)[NAME]
    assert [type(layer).__name__ for layer in found.layers] == ["CompressedLayer", "DynamicLayer"]
    assert patched_layers(sbpatch.unpatch(own)) == {}
