"""The balanced tree, and the keys of each query's best clusters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sbpatch.attention import PARTS, Geometry, Scatterbrain
from sbpatch.attention.tree import balanced_tree, principal_axes
from sbpatch.errors import SbpatchError


@pytest.mark.parametrize("n", [1, 4, 17, 64, 101])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("low_rank", ["", "+favor", "+clusters"])
def test_top_clusters_agree_with_their_dense_reference(
    low_rank: str, padded: bool, n: int, agrees: Callable[..., Scatterbrain]
) -> None:
    agrees(f"top-clusters{low_rank}", n, padded=padded, probes=3, **({"rank": 5} if low_rank else {}))


@pytest.mark.parametrize("n", [1, 3, 8, 50, 129])
@pytest.mark.parametrize("leaf", [1, 4, 7])
def test_every_token_has_one_slot(n: int, leaf: int) -> None:
    x = torch.randn(2, 3, n, 8)
    index = balanced_tree(x, leaf)
    assert index.shape[:2] == (2, 3)
    assert index.shape[3] == leaf
    assert index.flatten(2).sort(-1).values.equal(torch.arange(index.shape[2] * leaf).expand(2, 3, -1))
    sizes = (index < n).sum(-1)
    assert ((sizes == leaf) | (sizes == 0)).sum(-1).min() >= index.shape[2] - 1  # one leaf at most is part full


def test_padding_fills_the_last_leaves() -> None:
    x, mask = torch.randn(1, 1, 50, 8), torch.rand(1, 50) > 0.5
    leaves = balanced_tree(x, 4, mask)[0, 0].flatten()
    real = mask[0].sum()
    assert mask[0][leaves[:real]].all()
    assert torch.equal(
        balanced_tree(x.masked_fill(~mask[:, None, :, None], 1e9), 4, mask)[0, 0].flatten()[:real], leaves[:real]
    )


def test_the_tree_finds_planted_groups() -> None:
    centre = 20 * torch.randn(16, 8)
    label = torch.arange(16).repeat(8)[torch.randperm(128)]
    index = balanced_tree((centre[label] + 0.1 * torch.randn(128, 8))[None, None], 8)[0, 0]
    assert all(len(label[leaf].unique()) == 1 for leaf in index)


def test_principal_axes_are_eigenvectors() -> None:
    x = torch.randn(1, 2, 200, 6) * torch.tensor([16.0, 8, 4, 2, 1, 0.5])
    x = (x - x.mean(-2, keepdim=True)) @ torch.linalg.qr(torch.randn(6, 6)).Q
    expected = torch.linalg.eigh(x.mT @ x).eigenvectors.flip(-1)[..., :3]
    cosine = (principal_axes(x, 3) * expected).sum(-2).abs()
    assert cosine.min() > 0.99


def test_retrieval_finds_what_a_window_misses() -> None:
    """Each query has four matching keys somewhere: the attention is peaked, and the output is right to a percent."""
    n, width = 256, 16
    centre = torch.nn.functional.normalize(torch.randn(64, width), dim=-1)
    q = 6 * centre[torch.arange(n) % 64][torch.randperm(n)][None, None]
    k = (3 * centre[torch.arange(n) % 64])[torch.randperm(n)][None, None]
    v = torch.randn(1, 1, n, 8)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)

    def error(method: str, **parameters: int) -> float:
        out = Scatterbrain(method, Geometry(n, 1, width), 0, **parameters)(q, k, v, scale=1.0)
        return float((out - exact).norm() / exact.norm())

    found = error("top-clusters", probes=8)
    assert found < 0.02
    assert found < 0.05 * error("window", window=32)
    assert found < 0.2 * error("lsh", bucket=16, rounds=2)


def test_more_probes_read_a_larger_support(counts: Callable[[Scatterbrain], float]) -> None:
    q, k, _ = torch.randn(3, 1, 2, 96, 8)
    site = Geometry(96, 2, 8)
    few, many = (Scatterbrain("top-clusters", site, 0, probes=p).support.dense(q, k, None) for p in (2, 5))
    assert not (few & ~many).any()
    layer = Scatterbrain("top-clusters", site, 0, probes=5)
    assert layer.nnz == 20 == counts(layer)
    assert Scatterbrain("top-clusters", site, 0, probes=500).nnz == 96


def test_what_it_refuses() -> None:
    with pytest.raises(SbpatchError, match="cannot be causal"):
        Scatterbrain("top-clusters", Geometry(64, 1, 8, causal=True), 0, probes=2)
    with pytest.raises(SbpatchError, match="at least one cluster"):
        Scatterbrain("top-clusters", Geometry(64, 1, 8), 0, probes=0)
    site = Geometry(64, 1, 8)
    assert PARTS["top-clusters"].sized(3.9, site) is None
    assert PARTS["top-clusters"].sized(15, site) == {"probes": 3}


def test_it_exports_with_static_shapes() -> None:
    layer = Scatterbrain("top-clusters+clusters", Geometry(100, 2, 8), 0, probes=3, rank=5)
    q, k, v = torch.randn(3, 2, 2, 100, 8)
    program = torch.export.export(layer, (q, k, v))
    torch.testing.assert_close(program.module()(q, k, v), layer(q, k, v))


def test_gradients_flow_to_queries_keys_and_values() -> None:
    layer = Scatterbrain("top-clusters", Geometry(40, 1, 8), 0, probes=3)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 40, 8).unbind())
    layer(q, k, v).square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in (q, k, v))
