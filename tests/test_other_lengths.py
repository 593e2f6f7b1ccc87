"""Plans at other lengths than they were calibrated for: longer causal sequences read the same share, shorter ones no less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import refused
from torch import Tensor

from sbpatch.attention import PARTS, Geometry, Scatterbrain
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
