"""LevAttention's universal set: its guarantee, its stream, and the set as a support."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sbpatch.attention import PARTS, Geometry, Scatterbrain
from sbpatch.attention.leverage import leverage_scores, lewis_weights, sketched_scores, stream_leverage
from sbpatch.errors import SbpatchError

N, D = 240, 6


def adversarial(name: str) -> Tensor:
    """Keys (N, D) on which a careless score fails."""
    k = torch.randn(N, D, dtype=torch.float64)
    if name == "scales":  # lengths over six decades
        return k * torch.logspace(-3, 3, N, dtype=torch.float64)[torch.randperm(N), None]
    if name == "tiny direction":  # one short key alone in its direction: its leverage is 1
        k[:, -1] = 0
        k[17] = 0
        k[17, -1] = 1e-4
    elif name == "rank deficient":
        k[:, 3:] = k[:, :3] @ torch.randn(3, 3, dtype=torch.float64)
    elif name == "repeated":
        k = k[:4].repeat(N // 4, 1)
        k[100] *= 30
    elif name == "aligned":  # a crowd in one direction, few elsewhere
        k[:, 1:] *= 1e-3
        k[5:11] = torch.eye(D, dtype=torch.float64)
    return k


KEYS = ["random", "scales", "tiny direction", "rank deficient", "repeated", "aligned"]


def worst_queries(k: Tensor) -> Tensor:
    """For each key the query that makes its entry largest at p = 2, and random ones."""
    best = torch.linalg.pinv(k.T @ k, rtol=1e-13, hermitian=True) @ k.T
    return torch.cat((best.T, k, torch.randn(200, k.shape[1], dtype=k.dtype)))


def f_attention(q: Tensor, k: Tensor, power: float) -> Tensor:
    logits = (q @ k.T).abs()
    entries = (logits / logits.amax(-1, keepdim=True).clamp(min=1e-300)) ** power
    return entries / entries.sum(-1, keepdim=True).clamp(min=1e-300)


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("chunk", [0, 7, 64])
@pytest.mark.parametrize("size", [12, 40])
def test_no_large_entry_lies_outside_the_set(name: str, chunk: int, size: int) -> None:
    k = adversarial(name)
    part = PARTS["leverage"](Geometry(N, 1, D), 0, keys=size, chunk=chunk)
    entries = f_attention(worst_queries(k), k, 2)
    outside = torch.ones(N, dtype=torch.bool)
    outside[part.universal(k[None, None], None)[0, 0]] = False
    assert part.bound(D) == D / size
    assert entries[:, outside].max() <= D / size + 1e-9
    if name in ("scales", "tiny direction", "aligned"):
        assert entries.max() > D / size  # there are large entries to hold


@pytest.mark.parametrize("name", [x for x in KEYS if x != "tiny direction"])
@pytest.mark.parametrize("power", [1, 3, 4])
def test_the_guarantee_at_other_powers(name: str, power: int) -> None:
    """Queries that ascend each key's entry from the one that is worst at p = 2."""
    k = adversarial(name)
    size = 60
    part = PARTS["leverage"](Geometry(N, 1, D), 0, keys=size, power=power)
    q = worst_queries(k)[:N].requires_grad_()
    for _ in range(30):
        value = f_attention(q, k, power).diagonal().clamp(min=1e-12).log().sum()
        (slope,) = torch.autograd.grad(value, q)
        step = 0.1 * q.norm(dim=-1, keepdim=True) / slope.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        q = (q + step * slope).detach().requires_grad_()
    entries = f_attention(torch.cat((q.detach(), worst_queries(k))), k, power)
    outside = torch.ones(N, dtype=torch.bool)
    outside[part.universal(k[None, None], None)[0, 0]] = False
    assert entries[:, outside].max() <= part.bound(D) + 1e-9
    # the bound behind it: entry <= d^max(0, p/2 - 1) times the Lewis weight
    weight = lewis_weights(k, power)
    assert (entries.amax(0) <= D ** max(0, power / 2 - 1) * weight * 1.001 + 1e-9).all()
    assert weight.sum() <= D + 1e-6


def test_lengths_of_keys_would_not_do() -> None:
    """The guarantee is about directions: the longest keys as the set leave an entry of nearly one outside."""
    k = adversarial("tiny direction")
    longest = k.norm(dim=-1).topk(100).indices
    entries = f_attention(worst_queries(k), k, 2)
    outside = torch.ones(N, dtype=torch.bool)
    outside[longest] = False
    assert entries[:, outside].max() > 0.99


def test_scores_are_the_largest_entries_and_sum_to_the_rank() -> None:
    for name, rank in (("random", 6), ("rank deficient", 3), ("tiny direction", 6)):
        k = adversarial(name)
        score = leverage_scores(k)
        assert float(score.sum()) == pytest.approx(rank, rel=1e-6)
        torch.testing.assert_close(f_attention(worst_queries(k), k, 2).amax(0), score, atol=1e-6, rtol=1e-6)
    assert leverage_scores(torch.zeros(5, 3)).tolist() == [0] * 5


@pytest.mark.parametrize("power", [1, 2, 3, 5])
def test_lewis_weights_are_a_fixed_point(power: int) -> None:
    k = adversarial("random")
    weight = lewis_weights(k, power)
    torch.testing.assert_close(leverage_scores(k * weight[:, None] ** (0.5 - 1 / power)), weight, atol=1e-4, rtol=1e-4)


def test_the_stream_finds_every_key_above_its_bound() -> None:
    """200,000 keys that never exist together: a stream of chunks with a few odd ones planted, first and last included."""
    planted = {0: 1, 77_777: 2, 199_999: 3}

    def chunks() -> object:
        generator = torch.Generator().manual_seed(5)
        for first in range(0, 200_000, 4000):
            chunk = torch.randn(4000, 8, generator=generator)
            chunk[:, 1:4] *= 1e-3
            for place, axis in planted.items():
                if first <= place < first + 4000:
                    chunk[place - first] = 3.0 * torch.eye(8)[axis]
            yield chunk

    found = stream_leverage(chunks(), keys=32)
    assert found.shape == (32,)
    assert set(planted) <= set(found.tolist())
    assert len(set(found.tolist())) == 32


def test_stream_and_whole_agree_on_the_large_scores() -> None:
    k = adversarial("scales")
    score = leverage_scores(k)
    found = stream_leverage(k.split(11), 30)
    above = (score > D / 30).nonzero()[:, 0]
    assert len(above) > 3
    assert set(above.tolist()) <= set(found.tolist())


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("columns", [0, 64])
def test_sketched_scores_are_within_a_constant_factor(name: str, columns: int) -> None:
    """Of all keys at once, the one alone in its direction included."""
    k = adversarial(name)
    score = leverage_scores(k)
    found = sketched_scores(k.expand(2, -1, -1), 16 * D * D, columns, torch.Generator().manual_seed(1))
    assert found.shape == (2, N)
    assert torch.equal(found[0], found[1])
    factor = 1.7 if columns == 0 else 2.5
    assert (found[0] <= factor * score + 1e-9).all()
    assert (score <= factor * found[0] + 1e-9).all()
    assert sketched_scores(k.float(), 500, columns, torch.Generator()).dtype == torch.float32


@pytest.mark.parametrize("n", [1, 20, 140])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("low_rank", ["", "+favor", "+clusters"])
@pytest.mark.parametrize("change", [{}, {"power": 3}, {"chunk": 16}])
def test_the_set_as_a_support_agrees_with_its_dense_reference(
    low_rank: str, padded: bool, n: int, change: dict[str, int], agrees: Callable[..., Scatterbrain]
) -> None:
    layer = agrees(f"leverage{low_rank}", n, padded=padded, keys=7, **change, **({"rank": 6} if low_rank else {}))
    assert layer.nnz == min(7, n)


def test_padding_is_not_chosen() -> None:
    k, mask = torch.randn(2, 2, 50, 8), torch.rand(2, 50) > 0.5
    for chunk in (0, 9):
        chosen = PARTS["leverage"](Geometry(50, 2, 8), 0, keys=10, chunk=chunk).universal(1e3 * k, mask)
        assert mask[:, None].expand(-1, 2, -1).gather(-1, chosen).all()


def test_what_it_refuses() -> None:
    site = Geometry(50, 2, 8)
    with pytest.raises(SbpatchError, match="cannot be causal"):
        Scatterbrain("leverage", Geometry(50, 2, 8, causal=True), 0, keys=4)
    with pytest.raises(SbpatchError, match="do not: leave out chunk"):
        Scatterbrain("leverage", site, 0, keys=4, power=3, chunk=8)
    with pytest.raises(SbpatchError, match="at least 1"):
        Scatterbrain("leverage", site, 0, keys=0)
    with pytest.raises(SbpatchError, match="no keys"):
        stream_leverage([], 4)
    assert PARTS["leverage"].sized(0.9, site) is None
    assert PARTS["leverage"].sized(9.9, site) == {"keys": 9}
