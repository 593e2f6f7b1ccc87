"""FAVOR+'s other random features (arXiv 2009.14794): independent instead of orthogonal rows, and the hyperbolic pairs.

    cosh:  phi(x) = exp(-|x|^2 / 2) / sqrt(m) [exp(w_r.x), exp(-w_r.x)],  m / 2 rows w_r and their negatives

All are unbiased. With independent rows a pair has 1 - exp(-|q + k|^2) times the variance of two features (Lemma 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SbpatchError
from .favor import Favor, orthogonal_rows
from .registry import Geometry, register


class _Redrawn(Favor):
    """Favor with other rows of the projection."""

    def __init__(self, site: Geometry, seed: int, rank: int) -> None:
        super().__init__(site, seed, rank)
        generator = torch.Generator().manual_seed(seed)
        self.projection = torch.stack([self._rows(site.head_dim, generator) for _ in range(site.heads)])

    def _rows(self, width: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


@register("favor-iid")
class FavorIid(_Redrawn):
    """`rank` features with independent Gaussian rows."""

    def _rows(self, width: int, generator: torch.Generator) -> Tensor:
        return torch.randn(self.rank, width, generator=generator)


class _Pairs(_Redrawn):
    def __init__(self, site: Geometry, seed: int, rank: int) -> None:
        if rank % 2:
            raise SbpatchError(f"cosh features come in pairs, so the rank must be even, not {rank}")
        super().__init__(site, seed, rank)

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"rank": int(stored / 4) * 2} if stored >= 4 else None


@register("favor-cosh")
class FavorCosh(_Pairs):
    """`rank` features: orthogonal rows, each with its negative."""

    def _rows(self, width: int, generator: torch.Generator) -> Tensor:
        rows = orthogonal_rows(self.rank // 2, width, generator)
        return torch.cat((rows, -rows))


@register("favor-iid-cosh")
class FavorIidCosh(_Pairs):
    """`rank` features: independent rows, each with its negative."""

    def _rows(self, width: int, generator: torch.Generator) -> Tensor:
        rows = torch.randn(self.rank // 2, width, generator=generator)
        return torch.cat((rows, -rows))
