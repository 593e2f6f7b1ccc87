"""KDEformer: sorted hash blocks exactly, the rest by keys sampled by their values (Zandieh et al., arXiv 2302.02451)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .hyperattention import HyperAttention
from .registry import register


@register("kdeformer")
class KDEformer(HyperAttention):
    """The practical form of the paper: the heavy entries are in blocks of queries and keys sorted by an angular hash, and what
    is left of the matrix has columns of about equal length. So of the other keys `rank` are drawn, with replacement, by what
    remains of the paper's probabilities: with W = [V 1], whose last column gives the denominator,

        p_j ~ |w_j| / |W|_2 + 1 / n,   an entry of key j counts 1 / (`rank` p_j) times,

    which is unbiased for numerator and denominator, and has a smaller variance than a uniform sample where values are of
    different lengths. Its matrix depends on the values; `dense` is that of values all alike, where the sample is uniform.
    """

    called = "kdeformer"

    def sample(self, real: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
        if value is None:
            return super().sample(real, value)
        is_real = (torch.arange(value.shape[-2], device=value.device) < real).expand(*value.shape[:2], -1).double()
        rows = F.pad(value.double(), (0, 1), value=1.0) * is_real[..., None]  # (B, H, n, e + 1)
        longest = torch.linalg.eigvalsh(rows.mT @ rows)[..., -1:].clamp(min=torch.finfo(rows.dtype).tiny).sqrt()
        share = rows.norm(dim=-1) / longest + is_real / real.clamp(min=1)
        total = share.cumsum(-1)
        draw = self.draws.to(total).expand(*value.shape[:2], -1) * total[..., -1:]
        drawn = torch.searchsorted(total, draw.contiguous(), right=True).minimum((real - 1).clamp(min=0))
        return drawn, total[..., -1:] / (self.rank * share.gather(-1, drawn))
