"""Masks in plain form, attention inside nn.MultiheadAttention, and attention written out as products."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import refused
from torch import Tensor, nn

from sbpatch.attention import Scatterbrain
from sbpatch.attention.masks import allowed
from sbpatch.sites.calls import Call, Redirect
from sbpatch.sites.find import find_sites
from sbpatch.sites.swap import PatchedSite, swapped

B, H, N, D = 3, 2, 7, 4
FORMS = ("bool", "-inf", "lowest", "-1e4")


def call(mask: Tensor | None = None, causal: bool = False, kv_heads: int = H) -> Call:
    q = torch.randn(B, H, N, D)
    k, v = torch.randn(2, B, kv_heads, N, D)
    return Call(q, k, v, mask, is_causal=causal, enable_gqa=kv_heads != H)


def written(pairs: Tensor, form: str) -> Tensor:
    """A bool mask in the form that some library would hand over."""
    if form == "bool":
        return pairs
    hidden = {"-inf": -torch.inf, "lowest": torch.finfo(torch.float32).min, "-1e4": -1e4}[form]
    return torch.zeros(pairs.shape).masked_fill(~pairs, hidden)


padding = st.lists(st.lists(st.booleans(), min_size=N, max_size=N), min_size=B, max_size=B).map(
    lambda rows: torch.tensor(rows)
)


@given(padding, st.booleans(), st.sampled_from(FORMS), st.booleans(), st.sampled_from([1, 2]))
def test_plain_form_says_what_the_mask_said(key_mask, causal, form, one_row, kv_heads):
    key_mask[:, 3] = True  # every sample has a real key
    pairs = allowed(key_mask, causal, N, N)
    mask = written(pairs if one_row and not causal else pairs.expand(B, 1, N, N), form)
    asked = call(mask, kv_heads=kv_heads)
    plain = asked.plain(causal)
    assert plain.attn_mask is None
    assert plain.is_causal == causal
    assert torch.equal(key_mask, torch.ones_like(key_mask) if plain.key_mask is None else plain.key_mask)
    reads = pairs.expand(B, 1, N, N).any(-1)[..., None]  # a row that may read nothing is nobody's
    torch.testing.assert_close(plain.exact() * reads, asked.exact().nan_to_num(0) * reads)
    assert asked.causality() == causal


@given(padding, st.booleans(), st.sampled_from(FORMS), st.integers(0, N - 2), st.integers(0, N - 1))
def test_any_other_mask_is_refused(key_mask, causal, form, row, key):
    """One pair of any row but the last says something else than padding and causality do."""
    key_mask[:, 0] = True  # and no row is empty
    pairs = allowed(key_mask, causal, N, N).expand(B, 1, N, N).clone()
    pairs[1, 0, row, key] ^= True
    if not pairs[1, 0, row].any():
        pairs[1, 0, row, :2] ^= True
    asked = call(written(pairs, form))
    assert "mask or bias" in refused(asked.plain, causal)
    assert asked.causality() != causal


@pytest.mark.parametrize("empty", [True, False])
def test_rows_without_any_key_may_say_anything(empty):
    """Left padding of a causal call leaves such rows; some libraries open them."""
    key_mask = torch.tensor([[False] * 3 + [True] * 4]).expand(B, N)
    pairs = allowed(key_mask, True, N, N).clone()
    pairs[:, :, :3] = not empty
    plain = call(pairs).plain(True)
    assert torch.equal(plain.key_mask, key_mask)
    assert torch.isfinite(plain.exact()).all()


@pytest.mark.parametrize("bias", [torch.randn(1, H, N, N), torch.zeros(1, H, N, N), torch.randn(N, N)])
def test_a_bias_is_no_mask(bias):
    """Not even one that begins as zeros: it differs by head."""
    asked = call(bias)
    assert asked.causality() is None
    assert "mask or bias" in refused(asked.plain, False)


def test_causality_must_be_what_it_was():
    assert "not causal" in refused(call().plain, True)
    assert "called causal" in refused(call(causal=True).plain, False)
    assert call(causal=True).plain(True).is_causal


def test_the_last_row_is_taken_at_its_word_under_compilation():
    """No branch on the mask's values: one graph, with the same answer."""
    key_mask = torch.rand(B, N) > 0.4
    key_mask[:, 0] = True

    def plain(q: Tensor, mask: Tensor) -> Tensor:
        return Call(q, q, q, mask).plain(False).exact()

    q = torch.randn(B, H, N, D)
    mask = allowed(key_mask, False, N, N).expand(B, 1, N, N)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, mask), plain(q, mask))
    exported = torch.export.export(_Module(plain), (q, mask)).module()
    torch.testing.assert_close(exported(q, mask), plain(q, mask))


class _Module(nn.Module):
    def __init__(self, forward: object) -> None:
        super().__init__()
        self.forward = forward


# ---- nn.MultiheadAttention


class Encoder(nn.Module):
    """Two layers of PyTorch's own encoder, whose fast path runs a layer as one operation."""

    def __init__(self, **change: object) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **change)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not change)

    def forward(self, x: Tensor, padding: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.layers(x, src_key_padding_mask=padding, mask=mask)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("padded", "causal"), itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("change", [{}, {"norm_first": True}, {"bias": False}])
def test_every_path_of_pytorchs_encoder(training, grad, padded, causal, change):
    model = Encoder(dropout=0.0, **change).train(training) if training else Encoder(**change).eval()
    x = torch.randn(2, 9, 16)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(9).isinf() if causal else None
    arguments = {"padding": padding if padded else None, "mask": mask}
    seen: list[Call] = []

    def replacement(asked: Call) -> Tensor:
        seen.append(asked.plain(causal))
        return seen[-1].exact()

    with torch.set_grad_enabled(grad):
        before = model(x, **arguments)
        names = [f"layers.layers.{i}.self_attn" for i in range(2)]
        with swapped(model, dict.fromkeys(names, replacement)):
            found = model(x, **arguments)
        after = model(x, **arguments)
    assert len(seen) == 2
    assert seen[0].query.shape == (2, 4, 9, 4)
    assert (seen[0].key_mask is not None) == padded
    real = ~padding if padded else torch.ones_like(padding)
    torch.testing.assert_close(found[real], before[real])
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"kdim": 12, "vdim": 10}, None),
        ({"bias": False}, None),
        ({"add_bias_kv": True}, "added"),
        ({"add_zero_attn": True}, "added"),
    ],
)
def test_sites_of_multi_head_attention(change, reason):
    attention = nn.MultiheadAttention(16, 4, **change).eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor, weights: bool = False) -> Tensor:
            return self.attention(x, x[..., : attention.kdim], x[..., : attention.vdim], need_weights=weights)[0]

    model, x = Model().eval(), torch.randn(9, 2, 16)
    (site,) = find_sites(model, x)
    assert (site.name, site.class_name) == ("attention", "MultiheadAttention")
    assert (site.geometry.heads, site.geometry.head_dim, site.geometry.tokens) == (4, 4, 9)
    if reason is None:
        assert site.unsupported is None
        expected = model(x)
        with swapped(model, {"attention": Call.exact}):
            torch.testing.assert_close(model(x), expected)
            assert "another way" in refused(model, x, True)
    else:
        assert reason in site.unsupported


def test_a_module_that_returns_its_weights_is_named():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    (site,) = find_sites(Model(), torch.randn(2, 9, 16))
    assert "need_weights=True" in site.unsupported


# ---- products


class Written(nn.Module):
    """Attention by hand; `change` is done to the logits."""

    def __init__(self, change: object = None, drop: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.drop, self.change, self.softmax = nn.Linear(8, 24), nn.Dropout(drop), change, nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-2, -1) * 0.5
        if self.change is not None:
            logits = self.change(logits)
        return (self.drop(self.softmax(logits)) @ v).transpose(1, 2).flatten(-2)


CHANGES = {
    "nothing": (None, True),
    "scale": (lambda x: x / 3, True),
    "bias": (lambda x: x + torch.arange(9.0), False),
    "bias first": (lambda x: torch.arange(9.0) + x, False),
    "temperature": (lambda x: x * torch.tensor([[[1.0]], [[3.0]]]), False),
    "mask": (lambda x: x.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf), False),
    "heads mixed": (lambda x: torch.einsum("gh,bhij->bgij", torch.ones(2, 2), x), False),
    "clamped": (lambda x: x.clamp(max=0.1), False),
    "a row": (lambda x: torch.cat((x[:, :, :1], x[:, :, 1:] * 2), dim=2), False),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_attention_by_hand_is_a_call_where_it_is_plain(name):
    change, plain = CHANGES[name]
    model = nn.Sequential(Written(change)).eval()
    x = torch.randn(2, 9, 8)
    (site,) = find_sites(model, x)
    assert (site.geometry.tokens, site.geometry.heads, site.geometry.head_dim) == (9, 2, 4)
    assert site.by_hand == (site.unsupported is not None) == (not plain)
    expected, seen = model(x), []
    with Redirect(lambda asked: seen.append(asked) or asked.exact()):
        torch.testing.assert_close(model(x), expected)  # whatever is done to the product
    assert len(seen) == int(plain)
    if plain:
        with swapped(model, {site.name: lambda asked: torch.zeros_like(asked.query)}):
            assert not model(x).any()
        assert torch.equal(model(x), expected)
    else:
        with swapped(model, {site.name: Call.exact}):
            assert "another way" in refused(model, x)


def test_attention_by_hand_with_pooled_keys_is_a_call():
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = x, x[:, :, ::3], x[:, :, 1::3]
            return (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v

    model, x = nn.Sequential(Pooled()).eval(), torch.randn(2, 2, 9, 4)
    (site,) = find_sites(model, x)
    assert site.unsupported is None
    assert (site.geometry.tokens, site.geometry.queries) == (3, 9)
    expected, seen = model(x), []
    with swapped(model, {site.name: lambda asked: seen.append(asked) or asked.exact()}):
        torch.testing.assert_close(model(x), expected)
    assert len(seen) == 1


def test_a_product_without_a_softmax_stays_a_product():
    q, k, v = torch.randn(3, 2, 2, 9, 4)
    with Redirect(lambda asked: torch.zeros_like(asked.query)):
        for found, expected in [
            ((q @ k.mT) @ v, lambda: (q @ k.mT) @ v),
            ((q @ k.mT).softmax(-2) @ v, lambda: (q @ k.mT).softmax(-2) @ v),
            ((q @ k.mT).softmax(-1) * 2, lambda: (q @ k.mT).softmax(-1) * 2),
            (F.dropout(q @ k.mT, 1.0), lambda: torch.zeros(2, 2, 9, 9)),
            (-(q @ k.mT), lambda: -(q @ k.mT)),
            ((q @ k.mT).sum(-1), lambda: (q @ k.mT).sum(-1)),
            (torch.cat([q @ k.mT, q], -1), lambda: torch.cat([q @ k.mT, q], -1)),
            (F.softmax(input=q @ k.mT, dim=-1) + 0, lambda: (q @ k.mT).softmax(-1)),
        ]:
            with torch._C.DisableTorchFunction():
                torch.testing.assert_close(found, expected())


def test_by_hand_under_compilation():
    model, x = nn.Sequential(Written()).eval(), torch.randn(2, 9, 8)
    (site,) = find_sites(model, x)
    layer = Scatterbrain("window+clusters", site.geometry, 0, window=3, rank=2)
    with torch.inference_mode(), swapped(model, {site.name: PatchedSite(site.name, layer)}):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))
    torch.compiler.reset()


def test_dropout_in_training_is_refused_by_hand():
    model = nn.Sequential(Written(drop=0.1)).eval()
    x = torch.randn(2, 9, 8)
    (site,) = find_sites(model, x)
    assert site.unsupported is None
    with swapped(model, {site.name: Call.exact}):
        model(x)
        assert "dropout" in refused(model.train(), x)
