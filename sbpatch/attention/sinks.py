"""A local window plus the first tokens, on which models park attention that has nowhere to go (arXiv 2309.17453)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import Tiles
from .patterns import mean_pairs
from .registry import Geometry, Sparse, register
from .window import Window


@register("sinks")
class Sinks(Sparse):
    """The `window` keys around each query (see Window) and the first `first` tokens, StreamingLLM's attention sinks."""

    grouped = True

    def __init__(self, site: Geometry, seed: int, window: int, first: int = 4) -> None:
        super().__init__()
        if first < 1:
            raise SbpatchError(f"first is {first}; at least one token must be read by all (use window for none)")
        self.site, self.window, self.first, self.near = site, window, first, window
        self.band = Window(site, seed, window)
        self.nnz = mean_pairs(self._fixed(site.tokens, torch.device("cpu")), site.causal)

    @classmethod
    def tried(cls, site: Geometry, entropy_ratio: float) -> str | None:
        return "sinks" if site.causal else None

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        first = 4 if stored >= 16 else 1
        return {"window": int(stored) - first, "first": first} if stored >= 2 else None

    def longer(self, times: int) -> dict[str, int]:
        return {"window": self.window * times}

    def _fixed(self, n: int, device: torch.device) -> list[Tiles]:
        """The rounds, which depend on nothing but n."""
        shape = torch.empty(1, 1, n, 1, device=device)
        (band,) = self.band.select(shape, shape, None, 1.0)
        first = torch.arange(min(self.first, n), device=device)
        key = torch.cat((first.expand(len(band.key), -1), band.key), dim=1)
        always = torch.ones(*band.valid.shape[:2], len(first), dtype=torch.bool, device=device)
        inside = band.valid & (band.key >= len(first))[:, None, :]  # a first token in the band counts once
        return [Tiles(band.query, key, torch.cat((always, inside), dim=2), band.slot)]

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> list[Tiles]:
        return self._fixed(q.shape[-2], q.device)

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        return self.band.dense(q, k, key_mask) | (torch.arange(q.shape[-2], device=q.device) < self.first)
