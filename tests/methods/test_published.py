"""What holds of the published methods, which are here to be compared with: padding, refusals, never tried unasked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sbpatch.attention import PARTS, Geometry, Scatterbrain
from sbpatch.errors import SbpatchError
from sbpatch.study.compare import METHODS

SIZES = {
    "hyperattention": {"bucket": 5, "rank": 6},
    "kdeformer": {"bucket": 5, "rank": 6},
    "monarch": {"rank": 6},
    "thinformer": {"rank": 6},
    "wildcat": {"rank": 6},
}
published = pytest.mark.parametrize("method", SIZES)


@pytest.mark.parametrize("method", ["hyperattention", "monarch"])
@pytest.mark.parametrize("n", [1, 7, 40, 81])
@pytest.mark.parametrize("padded", [False, True])
def test_it_agrees_with_its_dense_matrix(
    method: str, n: int, padded: bool, agrees: Callable[..., Scatterbrain]
) -> None:
    agrees(method, n, padded=padded, tolerance=1e-4, **SIZES[method])


@published
def test_padding_changes_nothing_and_what_cannot_work_is_refused(method: str) -> None:
    size = SIZES[method]
    layer = Scatterbrain(method, Geometry(40, 1, 8), 0, **size)
    q, k, v = torch.randn(3, 1, 1, 40, 8)
    mask = torch.arange(40)[None] < 20
    noise = torch.where(mask[0, :, None], 0, 100.0)
    found = layer(q + noise, k + noise, v + noise, mask)
    torch.testing.assert_close(layer(q, k, v, mask)[:, :, :20], found[:, :, :20])
    with pytest.raises(SbpatchError, match="causal"):
        Scatterbrain(method, Geometry(40, 1, 8, causal=True), 0, **size)
    with pytest.raises(SbpatchError, match="at least one"):
        Scatterbrain(method, Geometry(40, 1, 8), 0, **size | {"rank": 0})


@published
def test_it_is_tried_only_where_it_is_asked_for(method: str) -> None:
    assert PARTS[method].tried(Geometry(40, 1, 8), 0.9) is None
    assert method not in METHODS
