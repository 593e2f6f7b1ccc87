"""Finding attention in models of many makes, and swapping it without a trace."""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Callable

import pytest
import timm
import torch
from tiny import refused, t2t, vit
from torch import Tensor, nn

from sbpatch.attention import Geometry, Scatterbrain, parse_method
from sbpatch.calibration.stages import calibrate
from sbpatch.plan.patch import patch
from sbpatch.sites.calls import Call
from sbpatch.sites.find import Site, find_sites
from sbpatch.sites.swap import PatchedSite, restore, swap, swapped

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def sites_of(model: nn.Module, *size: int) -> list[Site]:
    return find_sites(model, torch.randn(1, 3, *(size or (64, 64))))


def zeros(call: Call) -> Tensor:
    return torch.zeros_like(call.query)


def layers(model: nn.Module, method: str = "window+clusters", **change: int) -> dict[str, PatchedSite]:
    """A real approximation for every site."""
    sparse, low_rank = parse_method(method)
    parameters = ({"window": 3} if sparse else {}) | ({"rank": 3} if low_rank else {}) | change
    return {
        site.name: PatchedSite(site.name, Scatterbrain(method, site.geometry, 0, **parameters))
        for site in sites_of(model)
    }


def logits(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.inference_mode():
        return model(images).clone()


# ---- finding


@pytest.mark.parametrize(
    ("name", "change", "size", "expected"),
    [
        ("vit_tiny_patch16_224", {}, (64, 64), ("Attention", 17, 3, 64, (4, 4), 1)),
        ("vit_tiny_patch16_224", {"img_size": (48, 96)}, (48, 96), ("Attention", 19, 3, 64, (3, 6), 1)),
        ("deit_tiny_distilled_patch16_224", {}, (64, 64), ("Attention", 18, 3, 64, (4, 4), 2)),
        ("eva02_tiny_patch14_224", {"img_size": 56}, (56, 56), ("EvaAttention", 17, 3, 64, (4, 4), 1)),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, (56, 56), ("Attention", 21, 6, 64, (4, 4), 5)),
        ("vit_medium_patch16_reg4_gap_256", {"img_size": (64, 96)}, (64, 96), ("Attention", 28, 8, 64, (4, 6), 4)),
        ("vit_small_patch16_dinov3", {}, (64, 64), ("EvaAttention", 21, 6, 64, (4, 4), 5)),
    ],
)
def test_sites_of_timm_models(name, change, size, expected):
    found = sites_of(vit(name, **change), *size)
    assert [site.name for site in found] == ["blocks.0.attn", "blocks.1.attn"]
    for site in found:
        g = site.geometry
        assert (site.class_name, g.tokens, g.heads, g.head_dim, g.grid, g.prefix) == expected
        assert site.unsupported is None
        assert not g.causal


def test_sites_of_t2t_vit():
    found = {site.name: site.geometry for site in sites_of(t2t(), 64, 96)}
    assert list(found) == ["tokens_to_token.attention1.attn", "tokens_to_token.attention2.attn", "blocks.0.attn"]
    assert [(g.tokens, g.heads, g.head_dim, g.grid, g.prefix) for g in found.values()] == [
        (384, 1, 16, (16, 24), 0),
        (96, 1, 16, (8, 12), 0),
        (25, 1, 64, (4, 6), 1),
    ]


@pytest.mark.parametrize(
    ("name", "change", "size", "reasons"),
    [
        ("beit_base_patch16_224", {"depth": 1}, 64, ["a dense attention mask or bias"]),
        ("cait_xxs24_224", {"depth": 1}, 64, ["a softmax of its own over 16 x 16", *["1 query against 17 keys"] * 2]),
        ("xcit_nano_12_p16_224", {"depth": 1, "img_size": 224}, 64, [None, *["1 query against 17 keys"] * 2]),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 32, "img_size": 224},
            224,
            ["a dense attention mask or bias"] * 2,
        ),
        (
            "swinv2_tiny_window8_256",
            {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 32, "img_size": 256},
            256,
            ["a softmax of its own over 64 x 64"] * 2,
        ),
    ],
)
def test_attention_that_cannot_be_patched_says_why(name, change, size, reasons):
    """Talking heads, class attention, biases, a cosine softmax; xcit attends over channels, which is plain attention."""
    model = timm.create_model(name, **change).eval() if name.startswith("swin") else vit(name, **change)
    found = [site.unsupported for site in sites_of(model, size, size)]
    assert len(found) == len(reasons)
    assert all(text is None if reason is None else reason in text for text, reason in zip(found, reasons, strict=True))


def test_a_model_without_attention_is_refused():
    text = refused(sites_of, timm.create_model("resnet18").eval(), 64, 64)
    assert "no attention found" in text
    assert "nothing to patch" in text


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_fused_attention_switched_off(name):
    """timm's switch: what is plain attention by hand is patched through the fused call, and the switch set back."""
    torch.manual_seed(0)
    if name.startswith("swin"):
        model, size = timm.create_model(name, depths=(1, 1), num_heads=(2, 4), embed_dim=32).eval(), 224
    else:
        model, size = vit(name), 64
    attention = [m for m in model.modules() if hasattr(m, "fused_attn")]
    for module in attention:
        module.fused_attn = False
    images = torch.randn(1, 3, size, size)
    before = logits(model, images)
    sites = sites_of(model, size, size)
    assert len(sites) == 2
    assert not any(module.fused_attn for module in attention)
    seen: list[Call] = []
    with swapped(model, {site.name: lambda call: seen.append(call) or call.exact() for site in sites}):
        torch.testing.assert_close(logits(model, images), before, atol=1e-4, rtol=1e-4)
    assert len(seen) == 2
    assert not any(module.fused_attn for module in attention)
    assert torch.equal(logits(model, images), before)


def test_a_fused_form_that_differs_is_not_taken():
    class Wrong(nn.Module):
        fused_attn = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fused_attn:
                return sdpa(x, x, -x)
            return ((x @ x.mT) / 8**0.5 + 0).softmax(-1) @ x

    model = nn.Sequential(Wrong())
    (site,) = find_sites(model, torch.randn(1, 2, 9, 8))
    assert "a softmax of its own" in site.unsupported
    assert site.by_hand
    assert "fused_attn" not in vars(model[0]) or model[0].fused_attn is False


class Odd(nn.Module):
    """One site whose call is `attend` of (B, 2, 9, 8) tokens."""

    def __init__(self, attend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.forward = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


sdpa = nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (lambda x: sdpa(x, x, x) + sdpa(x, x, -x), "2 attention calls"),
        (lambda x: sdpa(x, x, x[..., :4]), None),
        (lambda x: sdpa(x, x, x[..., :4], is_causal=True), "values 4 wide and queries 8"),
        (lambda x: sdpa(x, x[:, :, :4], x[:, :, :4]), None),
        (lambda x: sdpa(x, x[:, :, :4], x[:, :, :4], is_causal=True), "causal attention of 9 queries against 4 keys"),
        (lambda x: sdpa(x[:, :, :1], x, x), "1 query against 9 keys"),
        (lambda x: torch.bmm(torch.bmm(x[:, 0], x[:, 1].mT).softmax(-1), x[:, 1]), None),
        (lambda x: torch.bmm(x[0], x[0].mT).softmax(-1) @ x[0], "a softmax of its own"),
        (lambda x: sdpa(x[:, 0], x[:, 0], x[:, 0]), "3-D queries"),
        (lambda x: sdpa(x[0], x[0], x[0]) + sdpa(x[:1, None], x[:1, None], x[:1, None])[0, 0], "3-D queries"),
        (lambda x: sdpa(x[:, None], x[:, None], x[:, None])[:, 0], "windows of 9 tokens"),
        (lambda x: sdpa(x, x, x, torch.rand(9, 9)), "mask or bias"),
        (lambda x: sdpa(x, x, x, torch.rand(1, 2, 9, 9) > 0.5), "mask or bias"),
        (lambda x: sdpa(x, x, x, torch.ones(9, 9, dtype=torch.bool)), None),
        (lambda x: sdpa(x, x[:, :1], x[:, :1], enable_gqa=True), None),
        (lambda x: sdpa(query=x, key=x, value=x, scale=0.3), None),
    ],
)
def test_calls_of_every_kind(attend, reason):
    (site,) = find_sites(Odd(attend), torch.randn(1, 2, 9, 8))
    assert site.name == "inner"
    assert site.unsupported is None if reason is None else reason in site.unsupported


def test_finding_leaves_the_model_as_it_was():
    model = vit().train()
    hooks = [dict(m._forward_pre_hooks) | dict(m._forward_hooks) for m in model.modules()]
    sites_of(model)
    assert model.training
    assert [dict(m._forward_pre_hooks) | dict(m._forward_hooks) for m in model.modules()] == hooks
    assert "doesn't match model (64)" in refused(sites_of, model, 32, 32)  # timm's own refusal of another image size
    assert [dict(m._forward_pre_hooks) | dict(m._forward_hooks) for m in model.modules()] == hooks


# ---- swapping


@pytest.mark.parametrize("make", [t2t, vit, lambda: vit("eva02_tiny_patch14_224", patch_size=16)])
def test_swap_and_restore_leave_no_trace(make):
    model = make()
    before, keys, classes = logits(model), list(model.state_dict()), [type(m) for m in model.modules()]
    swap(model, layers(model))
    assert not torch.equal(logits(model), before)
    assert list(model.state_dict()) == keys
    restore(model)
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes


def test_replacing_attention_by_itself_changes_no_bit():
    model = vit()
    before = logits(model)
    with swapped(model, {site.name: Call.exact for site in sites_of(model)}):
        assert torch.equal(logits(model), before)


def test_replacement_gets_the_call_as_the_model_made_it():
    seen: list[Call] = []
    model = t2t()
    with swapped(model, {"tokens_to_token.attention1.attn": lambda call: seen.append(call) or call.exact()}):
        logits(model)
    (call,) = seen
    assert call.query.shape == (2, 1, 256, 16)
    assert call.softmax_scale == 147**-0.5
    assert (call.attn_mask, call.is_causal, call.dropout_p) == (None, False, 0.0)


def test_only_the_named_site_is_swapped():
    model = vit()
    with swapped(model, {"blocks.1.attn": zeros}):
        sequence = model.forward_features(IMAGES)
    model.blocks[1].attn.qkv.weight.data[-192:] = 0  # the values of the last block, and their bias
    model.blocks[1].attn.qkv.bias.data[-192:] = 0
    torch.testing.assert_close(model.forward_features(IMAGES), sequence)


def test_swapped_restores_after_an_exception():
    model = vit()
    before = logits(model)
    with pytest.raises(KeyboardInterrupt), swapped(model, {"blocks.0.attn": zeros}):
        raise KeyboardInterrupt

    def fails(call: Call) -> Tensor:
        raise ValueError("from inside")

    with pytest.raises(ValueError, match="from inside"), swapped(model, {"blocks.0.attn": fails}):
        model(IMAGES)
    assert torch.equal(logits(model), before)


def test_refused_swaps_change_nothing():
    model = vit()
    before = logits(model)
    assert "no module 'blocks.9.attn'" in refused(swap, model, {"blocks.0.attn": zeros, "blocks.9.attn": zeros})
    assert torch.equal(logits(model), before)
    swap(model, {"blocks.0.attn": zeros})
    patched = logits(model)
    assert "patched already" in refused(swap, model, {"blocks.1.attn": zeros, "blocks.0.attn": zeros})
    assert torch.equal(logits(model), patched)
    restore(model)
    restore(model)  # once more is nothing
    assert torch.equal(logits(model), before)


def test_two_models_and_a_copy_do_not_disturb_each_other():
    one, two = vit(), vit(seed=1)
    exact = logits(one), logits(two)
    swap(one, layers(one))
    swap(two, layers(two))
    patched = logits(one), logits(two)
    restore(one)
    assert torch.equal(logits(one), exact[0])
    assert torch.equal(logits(two), patched[1])
    twin = copy.deepcopy(two)
    restore(two)
    assert torch.equal(logits(two), exact[1])
    assert torch.equal(logits(twin), patched[1])
    restore(twin)
    assert torch.equal(logits(twin), exact[1])


def test_two_threads_patched_and_not():
    """The redirection is the thread's own."""
    plain, patched = vit(), vit()
    swap(patched, layers(patched))
    expected = {id(model): logits(model) for model in (plain, patched)}
    wrong: list[int] = []

    def work(model: nn.Module) -> None:
        wrong.extend(i for i in range(30) if not torch.equal(logits(model), expected[id(model)]))

    threads = [threading.Thread(target=work, args=(model,)) for model in (plain, patched)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(expected[id(plain)], expected[id(patched)])
    assert wrong == []


# ---- under PyTorch's other machinery


@pytest.fixture
def patched() -> nn.Module:
    model = vit()
    swap(model, layers(model))
    return model


@pytest.mark.parametrize("method", ["window+clusters", "window+favor", "clusters", "window"])
# Layer norms give float32 under autocast, values are bfloat16.
@pytest.mark.parametrize("change", [{}, {"qk_norm": True}])
def test_autocast(method, change):
    model = vit(**change)
    swap(model, layers(model, method))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = model(IMAGES)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), logits(model), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moving_the_model_moves_the_patch(patched, dtype):
    exact = logits(patched)
    torch.testing.assert_close(logits(patched.to(dtype), IMAGES.to(dtype)).float(), exact, atol=0.05, rtol=0.05)


def test_tables_of_the_patch_stay_float32():
    """Those that calibration fits too, which are read beside keys made float32."""
    model = t2t()
    plan = calibrate(model, [IMAGES], budget=0.2, method="coreset", min_tokens=200, seed=0, keep_slow=True)
    expected = logits(patch(model, plan))
    before = {name: tensor.clone() for name, tensor in model.named_buffers() if ".sbpatch." in name}
    assert any(name.endswith("to_key") for name in before)
    torch.testing.assert_close(
        logits(model.to(torch.bfloat16), IMAGES.bfloat16()).float(), expected, atol=0.05, rtol=0.05
    )
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("make", [vit, t2t])
def test_compile_without_a_graph_break(make):
    model = make()
    swap(model, layers(model))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile generates C++ here, and there is no g++")
def test_compile_by_inductor():
    model = vit(depth=1)
    swap(model, layers(model))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(IMAGES).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["window+clusters", "window+favor", "clusters"])
def test_gradients_in_training_mode(method):
    model = vit().train()
    exact = gradients(model)
    swap(model, layers(model, method))
    found = gradients(model)
    assert found.keys() == exact.keys()
    assert all(torch.isfinite(g).all() for g in found.values())
    assert found["blocks.0.attn.qkv.weight"].abs().max() > 0
    model.set_grad_checkpointing(True)
    for name, again in gradients(model).items():
        torch.testing.assert_close(again, found[name], msg=name)


def test_gradients_are_the_models_own_where_the_patch_is_exact():
    model = vit()
    exact = gradients(model)
    with swapped(model, layers(model, "window", window=2 * 17)):
        for name, found in gradients(model).items():
            torch.testing.assert_close(found, exact[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "change",
    [
        {"attn_mask": torch.randn(17, 17)},
        {"attn_mask": torch.ones(17, 17, dtype=torch.bool).tril()},
        {"is_causal": True},
        {"dropout_p": 0.1},
        {"query": torch.zeros(1, 6, 17, 64)},
        {"key": torch.zeros(1, 3, 9, 64), "value": torch.zeros(1, 3, 9, 64)},
    ],
)
def test_a_call_of_another_kind_is_refused(change):
    x = torch.randn(1, 3, 17, 64)
    site = layers(vit())["blocks.0.attn"]
    assert "blocks.0.attn" in refused(site, Call(**{"query": x, "key": x, "value": x} | change))


def test_few_keys_are_attended_exactly():
    """No more keys than the layer stores: then the exact call is the cheaper one."""
    site = layers(vit(), window=5, rank=9)["blocks.0.attn"]
    assert 14 < site.layer.stored < 15
    for tokens, exact in [(13, True), (14, True), (15, False)]:
        call = Call(*torch.randn(3, 1, 3, tokens, 64))
        assert torch.equal(site(call), call.exact()) == exact


@pytest.mark.parametrize(("queries", "keys"), [(1, 80), (3, 80), (80, 200)])
def test_a_causal_site_decodes_exactly(queries, keys):
    """One token, a piece of a prompt, a static cache: exact. And heads of a group that come as queries of one head."""
    geometry = Geometry(128, 4, 8, causal=True)
    site = PatchedSite("s", Scatterbrain("sinks", geometry, 0, window=8, first=1))
    q, (k, v) = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 4, keys, 8)
    mask = torch.rand(2, 1, queries, keys) > 0.5
    for call in (Call(q, k, v), Call(q, k, v, mask), Call(q, k, v, is_causal=True)):
        assert torch.equal(site(call), call.exact())
    packed = Call(torch.randn(2, 2, 80, 8), k[:, :2, :80], v[:, :2, :80], mask[:, :, :1, :80])
    assert torch.equal(site(packed), packed.exact())


def test_dropout_is_refused_only_where_it_is_active():
    model = vit(attn_drop_rate=0.1)
    swap(model, layers(model))
    logits(model)
    assert "dropout" in refused(model.train(), IMAGES)
