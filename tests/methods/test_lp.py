"""l_p attention as a layer to train: its gradients, what its weights do not depend on, and the paper's universal set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import vit
from torch import Tensor, nn

from sbpatch.attention import LpAttention
from sbpatch.errors import SbpatchError
from sbpatch.sites import swapped

POWERS = [1, 2, 3, 4, 2.5]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def matrix(layer: LpAttention, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The layer's A: what it makes of values that are the unit vectors, (B, H, n_q, n)."""
    eye = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:3], -1)
    return layer(q, k, eye, key_mask)


def by_definition(q: Tensor, k: Tensor, power: float, pairs: Tensor) -> Tensor:
    weight = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.float64)
    for place in pairs.expand(weight.shape).nonzero().tolist():
        b, h, i, j = place
        weight[b, h, i, j] = abs(float(q[b, h, i] @ k[b, h, j])) ** power
    return weight / weight.sum(-1, keepdim=True)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("change", [{}, {"causal": True}, {"keys": 3}])
def test_gradients_are_those_of_finite_differences(power: float, change: dict[str, int]) -> None:
    layer = LpAttention(power, **change)
    rows = 5 if "causal" in change else 4
    q, k, v = drawn(2, 2, rows, 3), drawn(2, 1, 5, 3), drawn(2, 1, 5, 2)
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    for x in (q, k, v):
        x.requires_grad_()
    # a choice of keys has no gradient: none of these differences changes it
    assert torch.autograd.gradcheck(lambda *x: layer(*x, mask), (q, k, v))


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_matrix_is_the_one_of_the_definition(power: float, causal: bool) -> None:
    q, k = drawn(2, 2, 6, 3), drawn(2, 2, 6, 3)
    mask = torch.tensor([[True] * 6, [True, True, False, True, False, False]])
    pairs = mask[:, None, None, :] & (torch.ones(6, 6).tril().bool() if causal else torch.ones(6, 6).bool())
    found = matrix(LpAttention(power, causal=causal), q, k, mask)
    torch.testing.assert_close(found, by_definition(q, k, power, pairs))


@pytest.mark.parametrize("power", [2, 4])
def test_at_an_even_power_it_is_linear_attention(power: int) -> None:
    """|q.k|^p = <q x ... x q, k x ... x k>: the output by the p-fold tensor products, with no n x n matrix."""

    def features(x: Tensor) -> Tensor:
        found = x
        for _ in range(power - 1):
            found = (found[..., :, None] * x[..., None, :]).flatten(-2)
        return found

    q, k, v = drawn(1, 2, 30, 3), drawn(1, 2, 40, 3), drawn(1, 2, 40, 5)
    left, right = features(q), features(k)
    expected = left @ (right.mT @ v) / (left @ right.sum(-2)[..., None])
    torch.testing.assert_close(LpAttention(power)(q, k, v), expected)


@given(
    power=st.sampled_from(POWERS),
    rows=st.integers(1, 9),
    n=st.integers(1, 9),
    d=st.integers(1, 5),
    group=st.integers(1, 3),
    length=st.sampled_from([1e-30, 1e-3, -1.0, -50.0, 1e30]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_only_directions_count(power: float, rows: int, n: int, d: int, group: int, length: float, seed: int) -> None:
    """Rows that sum to one, the same for queries and keys of any length and sign."""
    torch.manual_seed(seed)
    layer, q, k = LpAttention(power), drawn(2, 2 * group, rows, d), drawn(2, 2, n, d)
    found = matrix(layer, q, k)
    assert found.shape == (2, 2 * group, rows, n)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2 * group, rows, dtype=torch.float64))
    torch.testing.assert_close(matrix(layer, length * q, k), found)
    torch.testing.assert_close(matrix(layer, q, length * k), found)


@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_every_entry_above_the_papers_bound_is_among_the_keys_that_are_read(power: int) -> None:
    """d^max(1, p/2) / |U|, whatever the queries: here those that favour each key most at p = 2, and random ones."""
    n, d, size = 300, 5, 100
    k = drawn(1, 1, n, d) * torch.logspace(-2, 2, n, dtype=torch.float64)[torch.randperm(n), None]
    k[..., 7, :] = 1e-3 * torch.eye(d, dtype=torch.float64)[0]
    q = torch.cat((k @ torch.linalg.inv(k.mT @ k), drawn(1, 1, 200, d)), dim=2)
    entries = matrix(LpAttention(power), q, k)
    read = matrix(LpAttention(power, keys=size), q, k)
    inside = (read > 0).any(2, keepdim=True)  # columns of the universal set
    assert int(inside.sum()) == size
    bound = d ** max(1, power / 2) / size
    assert entries.masked_fill(inside, 0).max() <= bound
    assert entries.max() > bound  # there are entries to hold
    kept = entries * inside
    torch.testing.assert_close(read, kept / kept.sum(-1, keepdim=True))


def test_all_keys_as_the_set_are_all_keys() -> None:
    q, k, v = drawn(2, 4, 6, 3), drawn(2, 2, 8, 3), drawn(2, 2, 8, 3)
    mask = torch.tensor([[True] * 8, [True] * 3 + [False] * 5])
    torch.testing.assert_close(LpAttention(3, keys=20)(q, k, v, mask), LpAttention(3)(q, k, v, mask))


def test_rows_that_read_nothing_are_zero_with_finite_gradients() -> None:
    q = torch.zeros(1, 1, 3, 4, requires_grad=True)
    k, v = torch.randn(1, 1, 5, 4, requires_grad=True), torch.randn(1, 1, 5, 4)
    for power in POWERS:
        out = LpAttention(power)(q, k, v)
        assert torch.equal(out, torch.zeros(1, 1, 3, 4))
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k)))
    assert torch.equal(LpAttention(2)(k, k, v, torch.zeros(1, 5, dtype=torch.bool)), torch.zeros(1, 1, 5, 4))


def test_a_model_learns_with_it() -> None:
    """To find the one marked token of 24 and say its class, which one layer of attention can and a mean over tokens cannot."""
    torch.manual_seed(0)
    embed, read = nn.Linear(10, 48), nn.Linear(16, 4)
    optimizer = torch.optim.Adam([*embed.parameters(), *read.parameters()], lr=1e-2)
    layer = LpAttention(2, keys=8)
    right = []
    for _ in range(150):
        token = torch.zeros(32, 24, 10)
        token[..., :4] = nn.functional.one_hot(torch.randint(4, (32, 24)), 4)
        token[..., 4:8] = 0.3 * torch.randn(32, 24, 4)
        place, sample = torch.randint(24, (32,)), torch.arange(32)
        token[sample, place, 8] = 1
        label = token[sample, place, :4].argmax(-1)
        q, k, v = embed(token)[:, None].chunk(3, dim=-1)  # (32, 1, 24, 16)
        logits = read(layer(q, k, v)[:, 0].mean(1))
        loss = nn.functional.cross_entropy(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append(float((logits.argmax(-1) == label).float().mean()))
    assert sum(right[:10]) / 10 < 0.5
    assert sum(right[-20:]) / 20 > 0.9


def test_sites_of_a_pretrained_architecture_compute_it() -> None:
    model = vit()
    layer = LpAttention(2, keys=4)
    sites = [name for name, _ in model.named_modules() if name.endswith(".attn")]
    x = torch.randn(2, 3, 64, 64)
    exact = model(x)
    with swapped(model, dict.fromkeys(sites, lambda call: layer(call.query, call.key, call.value))):
        out = model(x)
        out.sum().backward()
    assert not torch.allclose(out, exact, atol=1e-3)
    for name in sites:
        gradient = model.get_submodule(name).qkv.weight.grad
        assert gradient.isfinite().all()
        assert all(part.abs().sum() > 0 for part in gradient.chunk(3))  # queries, keys and values


def test_what_it_refuses() -> None:
    for power in (0.5, 0, float("inf"), float("nan")):
        with pytest.raises(SbpatchError, match="finite power of at least 1"):
            LpAttention(power)
    with pytest.raises(SbpatchError, match="at least 1 key"):
        LpAttention(2, keys=0)
    with pytest.raises(SbpatchError, match="cannot be causal"):
        LpAttention(2, keys=4, causal=True)
