"""The fast form of `attend` against its general form, on the same selection."""

from __future__ import annotations

import pytest
import torch

from sbpatch.attention import PARTS, Geometry, Scatterbrain, fused, pairwise

from .helpers import padding

# Tiles that read one list of keys, beside points and alone; alone also where each query reads some of it
SHARED = [
    "strided+clusters",
    "leverage+clusters",
    "random+pooling",
    "top-clusters+clusters",
    "mra2",
    "top-clusters",
    "strided",
]


def layer_for(method: str, n: int, causal: bool = False, heads: int = 4) -> Scatterbrain:
    names = {"mra2": "top-blocks+pooling"}.get(method, method).split("+")
    site = Geometry(n, heads, 8, causal)
    parameters: dict[str, int] = {}
    for name in names:
        parameters |= PARTS[name].sized(24, site) or {}
    return Scatterbrain(method, site, 3, **parameters)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [1 << 6, 1 << 13])
@pytest.mark.parametrize("n", [61, 128, 200])
@pytest.mark.parametrize("method", SHARED)
def test_tiles_that_share_their_keys(
    method: str, n: int, rows: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "ROWS", rows)
    layer = layer_for(method, n)
    if layer.gain is not None:
        layer.gain.copy_(torch.tensor([0.5, -0.5, 0.0, 1.0]))
    q, k = torch.randn(2, 2, 4, n, 8)
    v = torch.randn(2, 4, n, 8)
    mask = padding(2, n) if masked else None
    with_calls: list[int] = []
    original = fused.over_tiles

    def counted(*args: object) -> torch.Tensor:
        with_calls.append(1)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(fused, "over_tiles", counted)
    found = layer(q, k, v, mask, 0.5)
    assert with_calls, "the layer went pair by pair"
    general = pairwise.merged(*layer.split(q, k, v, mask, 0.5), layer.gain)
    torch.testing.assert_close(found, general, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["strided", "random", "window", "sinks"])
def test_causal_tiles_that_share_their_keys(method: str) -> None:
    layer = layer_for(method, 150, causal=True)
    q, k, v = torch.randn(3, 2, 4, 150, 8)
    general = pairwise.merged(*layer.split(q, k, v, None, 0.5), None)
    torch.testing.assert_close(layer(q, k, v, None, 0.5), general, atol=2e-5, rtol=1e-4)


def test_a_key_that_a_tile_reads_weighs_once_in_a_cluster_of_its_likes() -> None:
    """All keys in one cluster, three of them read exactly: the point stands for the other seven, by count and mean value."""
    q, k, v = torch.zeros(1, 1, 10, 4), torch.zeros(1, 1, 10, 4), torch.arange(10.0).view(1, 1, 10, 1)
    layer = Scatterbrain("strided+clusters", Geometry(10, 1, 4), 0, keys=3, rank=1)
    layer.gain.fill_(0.7)
    read = [0, 3, 6]  # t 10 / 3
    others = [j for j in range(10) if j not in read]
    weight = torch.tensor(0.7).exp()
    wanted = (sum(read) + weight * sum(others)) / (3 + 7 * weight)
    torch.testing.assert_close(layer(q, k, v), wanted.expand(1, 1, 10, 1))
