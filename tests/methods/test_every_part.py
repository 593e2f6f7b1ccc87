"""What holds for every registered part: sizing, seeds, plans, samples on their own, dtypes, and memory without n x n."""

from __future__ import annotations

import inspect

import pytest
import torch

from sbpatch.attention import PARTS, Geometry, Scatterbrain
from sbpatch.attention.registry import ALIASES
from sbpatch.errors import SbpatchError

SITE = Geometry(197, 2, 8, grid=(14, 14), prefix=1)
METHODS = [*PARTS, *ALIASES]
CAUSAL_ONLY = ("blocks", "pages")


def site_for(method: str, site: Geometry = SITE) -> Geometry:
    return Geometry(site.tokens, site.heads, site.head_dim, causal=True) if method in CAUSAL_ONLY else site


def sized(method: str, stored: float, site: Geometry) -> Scatterbrain:
    """As calibration builds it, a joined method with half of the budget each."""
    parts = ALIASES.get(method, method).split("+")
    parameters: dict[str, int] = {}
    for part in parts:
        size = PARTS[part].sized(stored / len(parts), site)
        assert size is not None
        parameters |= size
    return Scatterbrain(method, site, 7, **parameters)


@pytest.mark.parametrize("stored", [40, 61.5, 97])
@pytest.mark.parametrize("method", METHODS)
def test_sized_keeps_within_the_budget_and_uses_it(method: str, stored: float) -> None:
    layer = sized(method, stored, site_for(method))
    assert layer.stored <= stored
    if method not in ("linear", "window2d"):  # the one has one size, the other odd squares
        assert layer.stored >= 0.7 * stored
    assert layer.stored == layer.nnz + (layer.low_rank.stored if layer.low_rank is not None else 0)


@pytest.mark.parametrize("method", PARTS)
def test_too_small_a_budget_is_no_size(method: str) -> None:
    assert PARTS[method].sized(0.5, SITE) is None


@pytest.mark.parametrize("method", PARTS)
def test_parameters_are_integers_that_a_plan_can_hold(method: str) -> None:
    extra = list(inspect.signature(PARTS[method]).parameters.values())[2:]
    assert all(p.annotation in ("int", "int | None") for p in extra)
    if PARTS[method].kind in ("low-rank", "whole"):
        assert "rank" in [p.name for p in extra]  # a plan hands the rank back under this name


@pytest.mark.parametrize("method", METHODS)
def test_layers_are_reproducible_and_samples_do_not_mix(method: str) -> None:
    q, k, v = torch.randn(3, 2, 2, 197, 8)
    first, again = (sized(method, 48, site_for(method)) for _ in range(2))
    out = first(q, k, v)
    assert out.isfinite().all()
    assert torch.equal(out, again(q, k, v))
    torch.testing.assert_close(first(q[1:], k[1:], v[1:]), out[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_goes_in_and_out(method: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 197, 8).bfloat16()
    out = sized(method, 48, site_for(method))(q, k, v)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_what_stands_in_the_padding_changes_nothing(method: str) -> None:
    first = torch.randn(3, 2, 2, 197, 8)
    mask = torch.rand(2, 197) > 0.35
    mask[1, 60:] = False
    layer = sized(method, 48, site_for(method))
    other = torch.where(mask[:, None, :, None], first, 3 * torch.randn(3, 2, 2, 197, 8))
    real = mask[:, None, :, None].expand(-1, 2, -1, 8)
    torch.testing.assert_close(layer(*other, mask)[real], layer(*first, mask)[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_that_is_all_padding_gives_zeros(method: str) -> None:
    q, k, v = torch.randn(3, 2, 2, 197, 8)
    mask = torch.ones(2, 197, dtype=torch.bool)
    mask[1] = False
    out = sized(method, 48, site_for(method))(q, k, v, mask)
    assert out[1].abs().sum() == 0
    assert out[0].isfinite().all()
    assert out[0].abs().sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_long_sequence_needs_no_square_matrix(method: str) -> None:
    """No tensor of the forward pass has as many entries as n x n, at n = 4096 and a small budget."""
    n = 4096
    stored = 200 if method in ("blocks", "monarch") else 40  # these keep an entry for each stretch at least
    layer = sized(method, stored, site_for(method, Geometry(n, 1, 8, grid=(64, 64))))
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    seen.append(x.untyped_storage().nbytes() // x.element_size())
            return out

    q, k, v = torch.randn(3, 1, 1, n, 8)
    with Watch(), torch.inference_mode():
        layer(q, k, v)
    if getattr(PARTS.get(method), "analysis_only", False):
        assert max(seen) >= n * n
    else:
        assert max(seen) <= n * n // 4


@pytest.mark.parametrize("method", METHODS)
def test_causal_sites_are_served_or_refused(method: str) -> None:
    """A causal layer's output must not change with later values; content that decides what is read may lie ahead."""
    site = Geometry(160, 2, 8, causal=True)
    q, k, v = torch.randn(3, 1, 2, 160, 8)
    try:
        layer = sized(method, 48, site)
    except (SbpatchError, AssertionError):
        refused = ("clusters", "coreset", "hyperattention", "kdeformer", "leverage", "monarch", "mra2", "nystromformer")
        refused += ("pooling", "thinformer", "top-clusters", "wildcat", "window2d")
        assert method in refused
        return
    later = v.clone()
    later[:, :, 100:] += 5
    before, after = layer(q, k, v), layer(q, k, later)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.equal(before[:, :, 100:], after[:, :, 100:])
