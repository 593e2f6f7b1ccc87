"""Plans at other lengths than they were calibrated for: longer causal sequences read the same share, shorter ones no less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import refused
from torch import Tensor

from sbpatch.attention import PARTS, Geometry, Scatterbrain
from sbpatch.attention.masks import allowed
from sbpatch.attention.per_head import Exact, Layer, PerHead
from sbpatch.sites.calls import Call
from sbpatch.sites.swap import PatchedSite

SITE = Geometry(tokens=256, heads=4, head_dim=8, causal=True, key_heads=2)
METHODS = ("blocks", "sinks")


def layer(method: str, site: Geometry = SITE, share: float = 0.45) -> Scatterbrain:
    size = PARTS[method].sized(share * site.row_keys, site)
    assert size is not None
    return Scatterbrain(method, site, 0, **size)


def call(n: int, site: Geometry = SITE, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    heads = (site.heads, site.key_heads, site.key_heads)
    q, k, v = (torch.randn(1, count, n, site.head_dim, generator=generator) for count in heads)
    return Call(q, k, v, is_causal=True, enable_gqa=True)


def exact(given: Call) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        given.query, given.key, given.value, is_causal=True, enable_gqa=True
    )


@pytest.mark.parametrize("method", METHODS)
@given(st.integers(1, 5), st.floats(0.4, 0.7))
def test_a_longer_layer_reads_the_same_share(method: str, doublings: int, share: float) -> None:
    short = layer(method, share=share)
    long = short.longer(2**doublings)
    assert long.site.tokens == 256 * 2**doublings
    assert long.stored / long.site.row_keys <= short.stored / short.site.row_keys * 1.05  # points become a smaller part
    before, after = (x.nnz / x.site.row_keys for x in (short, long))
    assert after == pytest.approx(before, rel=0.1, abs=0.03)  # four tokens are always read


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("n", "times"), [(40, 1), (256, 1), (383, 1), (384, 2), (700, 2), (725, 4), (1024, 4), (1100, 4)]
)
@torch.inference_mode()
def test_a_call_of_any_length_runs_the_layer_for_it(method: str, n: int, times: int) -> None:
    own = layer(method)
    if own.gain is not None:
        own.gain.copy_(torch.tensor([0.5, -0.25]))
    given = call(n)
    found = PatchedSite("s", own)(given)
    reader = own if times == 1 else own.longer(times)
    if reader.gain is not None:
        assert torch.equal(reader.gain, torch.tensor([0.5, -0.25]))
    if (n + 1) / 2 <= reader.stored:
        torch.testing.assert_close(found, exact(given))
    else:
        assert torch.equal(found, reader(given.query, given.key, given.value))
        assert not torch.equal(found, exact(given))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 420), st.integers(0, 420)), min_size=2, max_size=3), st.booleans())
@torch.inference_mode()
def test_prompts_of_one_batch_are_computed_as_if_alone(paddings: list[tuple[int, int]], whole: bool) -> None:
    """Left and right padding beside each other, at lengths that have layers of their own, and a sample of padding alone."""
    n, own = 420, PatchedSite("s", layer("blocks"))
    spans = [(0, n)] * whole + [(min(left, n), max(n - right, left)) for left, right in paddings]
    real = torch.zeros(len(spans), n, dtype=torch.bool)
    for row, (start, stop) in zip(real, spans, strict=True):
        row[start:stop] = True
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(len(spans), heads, n, 8, generator=generator) for heads in (4, 2, 2))
    found = own(Call(q, k, v, attn_mask=allowed(real, True, n, n), enable_gqa=True))
    for i, (start, stop) in enumerate(spans):
        if stop > start:
            alone = (x[i : i + 1, :, start:stop] for x in (q, k, v))
            torch.testing.assert_close(
                found[i : i + 1, :, start:stop],
                own(Call(*alone, is_causal=True, enable_gqa=True)),
                atol=1e-5,
                rtol=1e-4,
            )
        assert not found[i, :, :start].any() or real.all()


@torch.inference_mode()
def test_padding_within_a_prompt_is_masked() -> None:
    """Real tokens in two stretches: no prompt alone, so the layer runs with the mask."""
    own, given = PatchedSite("s", layer("blocks")), call(256)
    real = torch.ones(1, 256, dtype=torch.bool)
    real[:, 100:120] = False
    found = own(replace(given, is_causal=False, attn_mask=allowed(real, True, 256, 256)))
    assert torch.equal(found, own.layer(given.query, given.key, given.value, key_mask=real))


@torch.inference_mode()
def test_heads_of_different_kinds_grow_together() -> None:
    half = SITE.of_heads(2)
    parts: list[Layer] = [layer("blocks", half), Exact(half)]
    own = PerHead(SITE, [[0, 1], [2, 3]], parts)
    given = call(1024)
    found = PatchedSite("s", own)(given)
    torch.testing.assert_close(found[:, 2:], exact(given)[:, 2:])
    blocks = parts[0].longer(4)
    assert torch.equal(found[:, :2], blocks(given.query[:, :2], given.key[:, :1], given.value[:, :1]))
    assert own.longer(4).stored == pytest.approx((blocks.stored + 1024.5 / 2 * 2 / 2) / 2, rel=0.5)


@torch.inference_mode()
def test_longer_errors_are_no_larger() -> None:
    """Attention to near keys: with the same share of the keys, a sequence four times as long is read as well."""

    def error(site: PatchedSite, n: int) -> float:
        given = call(n, seed=n)
        drift = torch.linspace(0, 24, n)[:, None] * torch.ones(8)
        near = Call(given.query * 0.1 + torch.cos(drift), given.key * 0.1 + torch.cos(drift), given.value, is_causal=True,
                    enable_gqa=True)  # fmt: skip
        return float((site(near) - exact(near)).norm() / exact(near).norm())

    site = PatchedSite("s", layer("blocks"))
    assert error(site, 1024) <= 1.25 * error(site, 256)


def test_bidirectional_layers_stay_as_they_are() -> None:
    site = Geometry(tokens=256, heads=2, head_dim=8)
    own = Scatterbrain("clusters", site, 0, rank=12)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 1024, 8, generator=generator)
    assert torch.equal(PatchedSite("s", own)(Call(q, k, v)), own(q, k, v))


def test_compiling_at_a_new_length_says_what_to_do() -> None:
    site = PatchedSite("s", layer("blocks"))
    given = call(1024)
    site(given)
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: site(Call(q, k, v, is_causal=True, enable_gqa=True)), backend="eager")
    found = compiled(given.query, given.key, given.value)
    torch.testing.assert_close(found, site(given))


def test_a_layer_is_not_made_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    site = PatchedSite("s", layer("blocks"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "calibrated at 256 tokens and is compiled with 1024" in refused(site.layer_for, 1024, torch.device("cpu"))
