"""Feature maps: FAVOR+'s variants against their theory, and linear attention against its textbook form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sbpatch.attention import PARTS, Geometry, Scatterbrain
from sbpatch.errors import SbpatchError

VARIANTS = ["favor-iid", "favor-cosh", "favor-iid-cosh"]
DRAWS, RANK = 2000, 4


@pytest.mark.parametrize("n", [1, 30, 70])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", [*VARIANTS, "linear"])
def test_features_agree_with_their_dense_references(
    method: str, causal: bool, n: int, agrees: Callable[..., Scatterbrain]
) -> None:
    for padded in (False, True):
        agrees(method, n, causal=causal, padded=padded, rank=8)
        agrees(f"window+{method}", n, causal=causal, padded=padded, rank=8, window=5)


@pytest.fixture(scope="module")
def estimates() -> dict[str, Tensor]:
    """phi(q).phi(k) for one pair under many independent draws (heads): (DRAWS,) per variant, with q.k and |q + k|^2."""
    q = torch.tensor([0.5, -0.3, 0.2, 0.1]).expand(1, DRAWS, 1, 4)
    k = torch.tensor([0.4, 0.3, -0.1, 0.3]).expand(1, DRAWS, 1, 4)
    site = Geometry(1, DRAWS, 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of small factorisations
    out = {m: PARTS[m](site, 11, rank=RANK).dense(q, k, None).flatten() for m in [*VARIANTS, "favor"]}
    torch.set_num_threads(threads)
    out["kernel"] = (q[0, 0] @ k[0, 0].mT).exp().double().flatten()
    out["sum"] = (q[0, 0] + k[0, 0]).square().sum().double()
    out["norms"] = (q[0, 0].square().sum() + k[0, 0].square().sum()).double()
    return out


@pytest.mark.parametrize("method", VARIANTS)
def test_features_are_unbiased(method: str, estimates: dict[str, Tensor]) -> None:
    x = estimates[method]
    assert abs(x.mean() - estimates["kernel"]) < 4 * x.std() / DRAWS**0.5
    assert x.std() > 0.01 * estimates["kernel"]  # the band above is not empty by being infinite or zero
    assert x.std() < estimates["kernel"]


def test_variances_are_those_of_the_theory(estimates: dict[str, Tensor]) -> None:
    z = estimates["sum"]
    iid = (-estimates["norms"]).exp() * ((2 * z).exp() - z.exp()) / RANK  # Var of the mean of RANK log-normals
    assert estimates["favor-iid"].var() == pytest.approx(float(iid), rel=0.15)
    assert estimates["favor-iid-cosh"].var() == pytest.approx(float(iid * (1 - (-z).exp())), rel=0.15)
    assert estimates["favor"].var() < 0.97 * estimates["favor-iid"].var()  # orthogonal rows help


@pytest.mark.parametrize("method", VARIANTS)
def test_draws_follow_the_seed(method: str) -> None:
    site = Geometry(16, 3, 8)
    first, same, other = (PARTS[method](site, seed, rank=6).projection for seed in (5, 5, 6))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # heads differ
    if "cosh" in method:
        assert torch.equal(first[:, :3], -first[:, 3:])


def test_cosh_features_come_in_pairs() -> None:
    site = Geometry(16, 1, 8)
    with pytest.raises(SbpatchError, match="even, not 5"):
        Scatterbrain("favor-cosh", site, 0, rank=5)
    assert PARTS["favor-cosh"].sized(3, site) is None
    for stored in (4, 7, 10.5):
        assert stored - 4 < PARTS["favor-cosh"](site, 0, **PARTS["favor-cosh"].sized(stored, site)).stored <= stored


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_is_the_textbooks(causal: bool) -> None:
    q, k, v = torch.randn(3, 1, 2, 50, 8)
    phi_q, phi_k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    weight = phi_q @ phi_k.mT
    weight = weight.tril() if causal else weight
    expected = weight / weight.sum(-1, keepdim=True) @ v
    found = Scatterbrain("linear", Geometry(50, 2, 8, causal), 0)(q, k, v, scale=1.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_linear_attention_has_one_rank() -> None:
    site = Geometry(50, 2, 8)
    with pytest.raises(SbpatchError, match="head width 8, not 9"):
        Scatterbrain("linear", site, 0, rank=9)
    assert PARTS["linear"].sized(15.9, site) is None
    assert Scatterbrain("linear", site, 0, **PARTS["linear"].sized(16, site)).stored == 16
