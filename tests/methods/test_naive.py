"""The naive sum of the parts, the paper's baseline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.errors import SbpatchError


def test_naive_sums_count_the_support_twice(agrees: Callable[..., Scatterbrain]) -> None:
    for method in ("naive:lsh+favor", "naive:window+clusters"):
        parameters = {"bucket": 7} if "lsh" in method else {"window": 5}
        for n in (3, 50):
            agrees(method, n, padded=n == 50, rank=6, **parameters)
    agrees("naive:window+favor", 50, causal=True, window=5, rank=6)
    site = Geometry(50, 1, 8)
    q, k, v = torch.randn(3, 1, 1, 50, 8)
    naive, composed = (Scatterbrain(p + "window+clusters", site, 0, window=99, rank=4)(q, k, v) for p in ("naive:", ""))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(composed, exact, atol=1e-5, rtol=1e-5)  # all is covered
    assert (naive - exact).norm() > 0.05 * exact.norm()
    for bad in ("naive:lsh", "naive:favor", "naive:"):
        with pytest.raises(SbpatchError):
            Scatterbrain(bad, site, 0)
