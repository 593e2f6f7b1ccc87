"""Clustered keys: the clustering itself, and attention that reads whole clusters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbpatch.attention import Geometry, Scatterbrain, pairwise
from sbpatch.attention.clusters import Clusters
from sbpatch.attention.kmeans import lloyd
from sbpatch.attention.reference import exact_matrix

from .helpers import build, cluster_entries, cluster_of, draw, padding, probe


def inertia(k: torch.Tensor, centre: torch.Tensor) -> float:
    """Sum of the squared distances of all keys to their nearest centre."""
    return torch.cdist(k.double(), centre.double()).amin(-1).square().sum().item()


@settings(max_examples=40)
@given(n=st.integers(1, 200), rank=st.integers(1, 60), steps=st.integers(0, 3), masked=st.booleans())
def test_counts_sum_to_the_real_keys(n: int, rank: int, steps: int, masked: bool) -> None:
    """Seen through a query of zero: every cluster weighs its count, so the output is the mean of the real values."""
    layer = build("clusters", n, rank=rank, steps=steps)
    q, k, v = draw(layer)
    mask = padding(2, n, seed=rank) if masked else torch.ones(2, n, dtype=torch.bool)
    count = layer.low_rank.select(q, k, v, mask if masked else None, 1.0, joined=False).counts
    assert torch.equal(count.sum(-1), mask.sum(-1)[:, None].expand(-1, 2).float())
    found = layer(torch.zeros_like(q), k, v, mask if masked else None)[:, :, 0]
    wanted = (v * mask[:, None, :, None]).sum(2) / mask.sum(-1).clamp(min=1)[:, None, None]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=30)
@given(n=st.integers(2, 150), rank=st.integers(1, 40), steps=st.integers(0, 3), masked=st.booleans())
def test_the_clusters_are_lloyds(n: int, rank: int, steps: int, masked: bool) -> None:
    """Against the loop in helpers.py: A' is the same for every key of a cluster, and its mean's exp(q.c)."""
    layer = build("clusters", n, rank=rank, steps=steps)
    q, k, _ = draw(layer)
    mask = padding(2, n, seed=n) if masked else None
    wanted = cluster_entries(layer.low_rank, q, k, mask)
    if mask is not None:
        wanted = wanted.masked_fill(~mask[:, None, None], 0)
    torch.testing.assert_close(
        layer.low_rank.dense(q, k, mask) * (mask[:, None, None] if mask is not None else 1), wanted, rtol=1e-4, atol=0
    )


def test_lloyd_steps_bring_the_centres_closer_to_the_keys() -> None:
    k = torch.randn(2, 2, 400, 8) + 3 * torch.randn(2, 2, 400, 1).sign()
    found = [inertia(k, lloyd(k, None, 20, steps)) for steps in (0, 1, 2, 5)]
    assert found[0] > found[1] > found[2] > found[3]
    assert found[1] < 0.8 * found[0]


def test_starting_centres_stride_over_the_real_keys() -> None:
    """Keys of one corner only would be found if the first or the last `rank` keys were taken."""
    k = torch.arange(100.0).expand(1, 1, -1)[..., None]
    assert lloyd(k, None, 4, 0).flatten().tolist() == [12, 37, 62, 87]
    mask = torch.zeros(1, 100, dtype=torch.bool)
    mask[0, 60:] = True
    assert lloyd(k, mask, 4, 0).flatten().tolist() == [65, 75, 85, 95]


@pytest.mark.parametrize("steps", [0, 2])
def test_no_cluster_weighs_more_than_its_keys(steps: int) -> None:
    """Jensen: exp of the mean is below the mean of exp. Covered keys can then be taken off without a sign change."""
    layer = build("clusters", 120, rank=10, steps=steps)
    q, k, _ = draw(layer)
    entries, exact = layer.low_rank.dense(q, k, None), (q.double() @ k.double().mT).exp()
    cluster = cluster_of(k, 10, steps)
    loose = 0
    for c in range(10):
        of_c = (cluster == c)[:, :, None, :]
        low, full = (entries * of_c).sum(-1), (exact * of_c).sum(-1)
        assert (low <= full * (1 + 1e-9)).all()
        loose += (low < 0.9 * full).sum().item()
    assert loose > 1000  # far from equality: the bound is a statement


@pytest.mark.parametrize("sparse", ["", "window+"])
def test_a_cluster_for_every_key_is_exact_attention(sparse: str) -> None:
    layer = build(f"{sparse}clusters", 60, rank=60)
    q, k, v = draw(layer)
    torch.testing.assert_close(
        layer(q, k, v, scale=1.0).double(), exact_matrix(q, k, 1.0) @ v.double(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("masked", [False, True])
def test_one_fused_call_equals_the_summary(masked: bool) -> None:
    """Without a sparse part attention over the clusters is one call; the general form sums over them instead."""
    layer = build("clusters", 130)
    q, k, v = draw(layer)
    mask = padding(2, 130) if masked else None
    general = pairwise.merged(*layer.split(q, k, v, mask, 0.3), None)
    torch.testing.assert_close(layer(q, k, v, mask, 0.3), general, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["clusters", "window+clusters"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_a_batch_changes_nothing(method: str, side: str) -> None:
    """The strided start counts real keys only, so 70 real keys cluster alike in any batch."""
    q, k, v = torch.randn(3, 1, 2, 70, 8)
    alone = build(method, 70)(q, k, v)
    pad = (0, 0, 40, 0) if side == "left" else (0, 0, 0, 40)
    q, k, v = (torch.nn.functional.pad(x, pad, value=2.0) for x in (q, k, v))
    real = slice(40, None) if side == "left" else slice(70)
    mask = torch.zeros(1, 110, dtype=torch.bool)
    mask[:, real] = True
    torch.testing.assert_close(build(method, 110)(q, k, v, mask)[:, :, real], alone, rtol=1e-5, atol=1e-5)


def test_a_covered_key_leaves_its_cluster() -> None:
    """Two clusters, one key of the first covered: the others of its cluster keep their weight, it has its own."""
    k = torch.cat((torch.randn(1, 1, 8, 4) * 0.3 + 1, torch.randn(1, 1, 8, 4) * 0.3 - 1), dim=2)
    q = torch.randn(1, 1, 16, 4)
    layer = build("window+clusters", 16, heads=1, d=4, window=1, rank=2, steps=2)
    rows = probe(layer, q, k).double()
    logits = q.double() @ k.double().mT
    for i in range(16):
        for first in (0, 8):
            others = [j for j in range(first, first + 8) if j != i]
            wanted = (q[0, 0, i].double() @ k[0, 0, first : first + 8].double().mean(0) - logits[0, 0, i, i]).exp()
            torch.testing.assert_close(
                rows[0, 0, i, others] / rows[0, 0, i, i], wanted.expand(len(others)), rtol=1e-4, atol=0
            )


@given(stored=st.floats(0, 300))
def test_sized_never_stores_more_than_asked(stored: float) -> None:
    parameters = Clusters.sized(stored, Geometry(100, 1, 4))
    assert (parameters is None) == (stored < 2)
    if parameters is not None:
        assert stored - 1 < Clusters(Geometry(100, 1, 4), 0, **parameters).stored <= stored


@given(n=st.integers(2, 90), rank=st.integers(1, 12), steps=st.integers(0, 2), data=st.data())
def test_padding_anywhere_changes_nothing(n, rank, steps, data):
    """Real tokens among padding get what they get alone, also where fewer are left than the Lloyd steps would look at."""
    real = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    q, k, v = torch.randn(3, 1, 2, n, 8, generator=torch.Generator().manual_seed(n))
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[0, real] = True
    padded = Scatterbrain("clusters", Geometry(n, 2, 8), 0, rank=rank, steps=steps)(q, k, v, mask)
    alone = Scatterbrain("clusters", Geometry(len(real), 2, 8), 0, rank=rank, steps=steps)(
        *(x[:, :, real] for x in (q, k, v))
    )
    torch.testing.assert_close(padded[:, :, real], alone)
