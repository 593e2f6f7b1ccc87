"""Linear attention with elu(x) + 1 as the feature map (Katharopoulos et al., arXiv 2006.16236)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import SbpatchError
from .favor import Favor
from .registry import Geometry, register


@register("linear")
class Linear(Favor):
    """L = phi(q).phi(k) with phi = elu + 1 of the scaled queries and keys; the rank is the head width.

    This is a kernel of its own for models trained with it, no estimate of exp(q.k). The algebra lets a sparse part join,
    but the two are then on scales that have nothing to do with each other; in a softmax model it is a baseline.
    """

    def __init__(self, site: Geometry, seed: int, rank: int | None = None) -> None:
        nn.Module.__init__(self)  # nothing is drawn
        self.rank = site.head_dim
        if rank not in (None, self.rank):
            raise SbpatchError(f"the rank of linear attention is the head width {self.rank}, not {rank}")
        self.stored = 2.0 * self.rank

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"rank": site.head_dim} if stored >= 2 * site.head_dim else None

    def log_features(self, x: Tensor) -> Tensor:
        """ln(elu(x) + 1): x below zero, ln(1 + x) above. FAVOR+'s sums take it from here."""
        x = x.float()
        return torch.where(x > 0, x.clamp(min=0).log1p(), x)
