"""FAVOR+ features, and Theorem 2: A' is unbiased, and its variance is lower than that of FAVOR+ alone."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from sbpatch.attention import Geometry, pairwise
from sbpatch.attention.core import Selection
from sbpatch.attention.favor import Favor, orthogonal_rows

from .helpers import allowed, build, favor_entries, padding, probe, support_pairs, unnormalise

DRAWS = 1500  # heads of one layer: each has a projection of its own, so one call makes this many independent estimates
LIMIT = 4.5  # of a z score: one in 150,000 by chance, and the seeds are fixed


def draws(n: int, d: int, length: float) -> tuple[Tensor, Tensor]:
    """One q and k of moderate length, seen by every head."""
    q, k = (length * torch.nn.functional.normalize(torch.randn(1, 1, n, d), dim=-1) for _ in range(2))
    return q.expand(-1, DRAWS, -1, -1), k.expand(-1, DRAWS, -1, -1)


def sums(part: Favor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> pairwise.Sums:
    """Shift, numerator and denominator of the features alone, logits being q.k."""
    selection = Selection([], part.select(q, k, v, mask, 1.0, joined=True))
    _, low = pairwise.split(q, k, v, selection, 1.0, mask, causal, naive=False)
    assert low is not None
    return low


def z_scores(sample: Tensor, truth: Tensor) -> Tensor:
    """How far the mean over dimension 0 lies from the truth, in standard errors."""
    return (sample.mean(0) - truth) / (sample.std(0) / len(sample) ** 0.5)


# -- the projection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(3, 8), (8, 8), (20, 8), (64, 32), (1, 1), (5, 1)])
def test_rows_are_orthogonal_within_blocks(count: int, width: int) -> None:
    rows = orthogonal_rows(count, width, torch.Generator().manual_seed(0))
    assert rows.shape == (count, width)
    for block in rows.split(width):
        gram = torch.nn.functional.normalize(block, dim=1) @ torch.nn.functional.normalize(block, dim=1).mT
        torch.testing.assert_close(gram, torch.eye(len(block)), rtol=0, atol=1e-5)


def test_norms_are_those_of_independent_gaussian_rows() -> None:
    """Orthogonal rows of the fixed norm sqrt(d) would make the estimate of exp(q.k) biased."""
    d = 16
    rows = orthogonal_rows(4096, d, torch.Generator().manual_seed(1)).double()
    norms = rows.norm(dim=1)
    chi = stats.chi(d)
    assert abs(norms.mean() - chi.mean()) < LIMIT * chi.std() / math.sqrt(len(norms))
    assert stats.kstest(norms.numpy(), chi.cdf).pvalue > 1e-4
    # and no direction is preferred: first coordinates are standard normal
    assert stats.kstest(rows[::d, 0].numpy(), "norm").pvalue > 1e-4


def test_heads_and_seeds_draw_apart() -> None:
    site = Geometry(10, 3, 8)
    one, two = Favor(site, 0, 12).projection, Favor(site, 1, 12).projection
    assert torch.equal(one, Favor(site, 0, 12).projection)
    for a, b in ((one[0], one[1]), (one[1], one[2]), (one[0], two[0])):
        assert not torch.allclose(a, b, atol=0.1)


# -- the estimate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "d"), [(1, 4), (8, 8), (6, 4)])
def test_the_estimate_is_unbiased(rank: int, d: int) -> None:
    part = Favor(Geometry(4, DRAWS, d), 3, rank)
    q, k = draws(4, d, 0.8)
    truth = (q[0, 0].double() @ k[0, 0].double().mT).exp()
    assert z_scores(part.dense(q, k, None)[0], truth).abs().max() < LIMIT
    # the test has the power to see a bias of ten percent
    assert z_scores(part.dense(q, k, None)[0], truth * 1.1).abs().max() > LIMIT


def test_orthogonal_features_vary_less_than_independent_ones() -> None:
    d = rank = 8
    q, k = draws(6, d, 1.0)
    orthogonal = Favor(Geometry(6, DRAWS, d), 0, rank)
    independent = Favor(Geometry(6, DRAWS, d), 0, rank)
    independent.projection = torch.randn(DRAWS, rank, d)
    variance = [part.dense(q, k, None)[0].var(0).mean() for part in (orthogonal, independent)]
    assert variance[0] < 0.95 * variance[1]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("n", "rank", "length"), [(1, 3, 1.0), (64, 16, 1.0), (65, 16, 1.5), (200, 70, 1.0), (9, 4, 4.0)]
)
def test_stabilised_sums_are_the_naive_formula(n: int, rank: int, length: float, causal: bool, masked: bool) -> None:
    """In float64 the plain features still hold where float32 would overflow; causal is the masked dense matrix."""
    part = Favor(Geometry(n, 2, 8, causal), 0, rank)
    q, k, v = length * torch.randn(2, 2, n, 8), length * torch.randn(2, 2, n, 8), torch.randn(2, 2, n, 5)
    mask = padding(2, n) if masked else None
    shift, numerator, denominator = sums(part, q, k, v, mask, causal)
    entries = favor_entries(part, q, k).masked_fill(~allowed(n, causal, mask), 0)
    scale = shift.double().exp()
    torch.testing.assert_close(denominator * scale, entries.sum(-1, keepdim=True), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        numerator * scale, entries @ v.double(), rtol=1e-4, atol=1e-4 * entries.sum(-1).max().item()
    )


def test_one_far_key_does_not_drown_the_others() -> None:
    """A single maximum over all keys would: here its features are e^400 above all others, yet uncovered rows stay right."""
    layer = build("favor", 30, rank=16, d=4)
    q, k, v = (torch.randn(1, 2, 30, 4) for _ in range(3))
    k = 28 * torch.nn.functional.normalize(k, dim=-1)
    k[:, :, 7] = 0
    mask = torch.ones(1, 30, dtype=torch.bool)
    mask[0, 7] = False  # the large features belong to padding
    keep = mask[0]
    padded, alone = layer(q, k, v, mask, 1.0), layer(q[:, :, keep], k[:, :, keep], v[:, :, keep], scale=1.0)
    torch.testing.assert_close(padded[:, :, keep], alone, rtol=1e-4, atol=1e-4)
    assert (alone.abs().amax((2, 3)) > 0.01).all()


# -- Theorem 2 -----------------------------------------------------------------------------------------------------


def assert_theorem_2(scatterbrain: Tensor, favor: Tensor, truth: Tensor) -> None:
    """Estimates (draws, n, n) of `truth` from independent draws: unbiased, and closer to it than FAVOR+ alone.

    Entries that every draw has right (the support of a window) have no variance and are held to the truth as they are.
    """
    known = (scatterbrain - truth).abs().amax(0) < 1e-3 * truth.abs().clamp(min=1)
    assert z_scores(scatterbrain, truth)[~known].abs().max() < LIMIT, "biased"
    ours, theirs = ((x - truth).square().sum((-1, -2)) for x in (scatterbrain, favor))
    gap = (theirs.mean() - ours.mean()) / ((theirs.var() + ours.var()) / len(ours)).sqrt()
    assert gap > LIMIT, "no lower variance"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sparse", ["window", "lsh"])
def test_theorem_2(sparse: str, causal: bool) -> None:
    n, d = 12, 8
    if sparse == "lsh" and causal:
        n = 9  # three buckets; a draw in which a row met no key is left out below
    layer = build(f"{sparse}+favor", n, heads=DRAWS, d=d, causal=causal, rank=8, **_half(sparse))
    alone = Favor(Geometry(n, DRAWS, d, causal), 77, 8)
    q, k = draws(n, d, 0.5)
    logits = (q[:, :1].double() @ k[:, :1].double().mT).expand(-1, DRAWS, -1, -1)
    pairs = allowed(n, causal, None)[0, 0]
    truth = logits[0, 0].exp() * pairs

    support = layer.support.dense(q, k, None).expand(1, DRAWS, n, n) & pairs
    rows = unnormalise(probe(layer, q, k), logits, support)[0]  # from the layer's own output
    met = support[0].any(-1)
    identity = torch.eye(n).expand(1, DRAWS, -1, -1)
    shift, numerator, _ = sums(alone, q, k, identity, None, causal)
    favor = (numerator * shift.double().exp())[0]

    # entry by entry: the truth on the support, the features' own estimate off it
    features = favor_entries(layer.low_rank, q[:, :1], k[:, :1])[0] * pairs
    wanted = torch.where(support[0], truth, features)
    torch.testing.assert_close(rows[met], wanted[met], rtol=2e-3, atol=1e-4)

    if met.all():
        assert_theorem_2(rows, favor, truth)
    else:  # a draw without anchor cannot be read off the normalised rows: the entries just checked stand in for it
        assert_theorem_2(torch.where(met[..., None], rows, wanted), favor, truth)

    naive = features + support[0] * truth  # the sum that counts L and exp(q.k) on the support
    with pytest.raises(AssertionError, match="biased"):
        assert_theorem_2(naive, favor, truth)
    ours, theirs = ((x - truth).square().sum((-1, -2)).mean() for x in (naive, favor))
    assert ours > theirs  # the naive sum is even worse than no sparse part at all


def _half(sparse: str) -> dict[str, int]:
    return {"window": 5} if sparse == "window" else {"bucket": 3, "rounds": 2}


def test_variance_falls_with_the_share_of_pairs_that_meet() -> None:
    """The theorem's (1 - p) Var: with p the probability that hashing brings the pair together."""
    n, d = 12, 8
    layer = build("lsh+favor", n, heads=DRAWS, d=d, rank=8, bucket=3, rounds=2)
    q, k = draws(n, d, 0.5)
    truth = (q[0, 0].double() @ k[0, 0].double().mT).exp()
    support = support_pairs(layer, q[:, :400], k[:, :400], None)
    assert torch.equal(support, layer.support.dense(q, k, None)[:, :400])
    support = layer.support.dense(q, k, None)
    rows = unnormalise(probe(layer, q, k), truth.log().expand(1, DRAWS, n, n), support)[0]
    p = support[0].double().mean(0)
    alone = Favor(Geometry(n, DRAWS, d), 78, 8).dense(q, k, None)[0]
    ratio = (rows - truth).square().mean(0).sum() / ((1 - p) * (alone - truth).square().mean(0)).sum()
    assert ratio == pytest.approx(1, abs=0.15)
