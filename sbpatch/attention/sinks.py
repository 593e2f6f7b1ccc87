"""A local window plus the first tokens, on which models park attention that has nowhere to go (arXiv 2309.17453)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import SbpatchError
from .patterns import mean_pairs
from .registry import Geometry, Tiles, register
from .window import Window


@register("sinks")
class Sinks(nn.Module):
    """The `window` keys around each query (see Window) and the first `first` tokens, StreamingLLM's attention sinks."""

    kind: ClassVar[Literal["sparse"]] = "sparse"

    def __init__(self, site: Geometry, seed: int, window: int, first: int = 4) -> None:
        super().__init__()
        if first < 1:
            raise SbpatchError(f"first is {first}; at least one token must be read by all (use window for none)")
        self.site, self.window, self.first = site, window, first
        self.band = Window(site, seed, window)
        self.nnz = mean_pairs(self._fixed(site.tokens, torch.device("cpu")), site.causal)

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        first = 4 if stored >= 16 else 1
        return {"window": int(stored) - first, "first": first} if stored >= 2 else None

    def _fixed(self, n: int, device: torch.device) -> Iterator[Tiles]:
        """The rounds, which depend on nothing but n."""
        shape = torch.empty(1, 1, n, 1, device=device)
        (band,) = self.band.rounds(shape, shape, None)
        first = torch.arange(min(self.first, n), device=device)
        key = torch.cat((first.expand(len(band.key), -1), band.key), dim=1)
        always = torch.ones(*band.valid.shape[:2], len(first), dtype=torch.bool, device=device)
        inside = band.valid & (band.key >= len(first))[:, None, :]  # a first token in the band counts once
        yield Tiles(band.query, key, torch.cat((always, inside), dim=2), band.slot)

    def rounds(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Iterator[Tiles]:
        yield from self._fixed(q.shape[-2], q.device)

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        return self.band.dense(q, k, key_mask) | (torch.arange(q.shape[-2], device=q.device) < self.first)
