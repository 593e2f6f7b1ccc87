"""WildCat: a weighted coreset of the keys by randomly pivoted Cholesky (Schroeder and Mackey, arXiv 2602.10056)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SbpatchError
from .core import query_mask
from .registry import Geometry, Whole, register

SMALLEST = 1e-9  # share of a key that must be left unexplained for it to become a pivot: below, it adds rounding alone
TWO_RHO = 6.383202050647408  # 2 rho_0 of the paper, rho_0 = sqrt(1 + exp(2 + 2 W_0(2 / e^2)))


@register("wildcat")
class WildCat(Whole):
    """`rank` of the keys stand for all n, with Nystrom weights of the kernel h(x, y) = exp(scale x.y / t^2):

        A = exp(scale q.k_S) W,   W = h(k_S, k_S)^-1 h(k_S, k),   output = A v / A 1

    Keys are centred first, which softmax does not see. Each pivot is drawn with a probability proportional to what the ones
    before leave unexplained of a key, in the kernel scaled to 1 on its diagonal; W is the same for both. t balances how well
    queries and keys can be told apart, by the lengths of the longest of each. W may be negative: the output is cut to the
    range of the values, as in the paper, and a row whose sum is not positive is zero before that.
    """

    rectangular = True

    draws: Tensor  # (H, rank) uniform, one a pivot

    def __init__(self, site: Geometry, seed: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise SbpatchError(f"wildcat needs at least one key, not {rank}")
        if site.causal:
            raise SbpatchError("wildcat takes its keys from all tokens, the future included, and cannot be causal")
        self.rank, self.stored = rank, rank + 1.0
        draws = torch.rand(site.heads, rank, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("draws", draws, persistent=False)

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"rank": int(stored) - 1} if stored >= 2 else None

    def coreset(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        """Indices of the chosen keys (B, H, m), and their weights for each key (B, H, m, n), float64."""
        n = k.shape[-2]
        real = k.new_ones(k.shape[0], n, dtype=torch.bool) if key_mask is None else key_mask
        keep = real[:, None, :, None].double()
        count = keep.sum(-2, keepdim=True).clamp(min=1)
        y = k.double() * keep
        x = q.double() if query_mask(q, key_mask, k) is None else q.double() * keep
        y = (y - y.sum(-2, keepdim=True) / count) * keep
        y = y * self._spread(x, y, count, scale)  # h(y, y') = exp(y.y')
        with torch.no_grad():
            pivot, used = self._pivots(y, keep[..., 0])
        chosen = y.gather(-2, pivot[..., None].expand(*pivot.shape, y.shape[-1]))
        core = _gaussian(chosen, chosen) * used[..., None] * used[..., None, :]
        core = core + torch.diag_embed(1 - used)  # a pivot that is not used has no part in the others' weights
        cross = _gaussian(chosen, y) * used[..., None] * keep.mT
        weight = torch.cholesky_solve(cross, torch.linalg.cholesky(core))
        return pivot, weight * ((y.square().sum(-1)[..., None, :] - chosen.square().sum(-1)[..., None]) / 2).exp()

    def _spread(self, q: Tensor, k: Tensor, count: Tensor, scale: float) -> Tensor:
        """sqrt(scale) / t, (B, H, 1, 1): t^2 = R_k / R_q b / (2 W_0(b / 2 rho_0)), b = ln n / (scale R_q R_k) + 2."""
        longest_q, longest_k = (
            x.norm(dim=-1).amax(-1)[..., None, None].clamp(min=1e-12) for x in (q.detach(), k.detach())
        )
        b = count.log() / (scale * longest_q * longest_k) + 2
        return (scale * longest_q / longest_k * 2 * _lambert(b / TWO_RHO) / b).sqrt()

    def _pivots(self, k: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Pivots (B, H, m), and 1 for those in use, 0 for those drawn when all keys were explained, float64."""
        left = keep.expand(k.shape[:-1]).clone()  # what is unexplained of each key, 1 at first
        factor = left.new_zeros(*left.shape, self.rank)
        found, used = [], []
        for step in range(self.rank):
            total = left.cumsum(-1)
            draw = self.draws[:, step].to(total)[None, :, None] * total[..., -1:]
            pivot = torch.searchsorted(total, draw, right=True).clamp(max=k.shape[-2] - 1)  # (B, H, 1)
            rest = left.gather(-1, pivot)
            good = (rest > SMALLEST).to(left)
            row = k.gather(-2, pivot[..., None].expand(*pivot.shape, k.shape[-1]))
            before = factor[..., :step]
            known = before.gather(-2, pivot[..., None].expand(*pivot.shape, step))
            column = _gaussian(row, k).squeeze(-2) - (before @ known.mT).squeeze(-1)
            factor[..., step] = column * good * keep / rest.clamp(min=SMALLEST).sqrt()
            left = (left - factor[..., step].square()).clamp(min=0).scatter(-1, pivot, 0)
            found.append(pivot)
            used.append(good)
        return torch.cat(found, -1), torch.cat(used, -1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        pivot, weight = self.coreset(q, k, key_mask, scale)
        inside = v if key_mask is None else v.masked_fill(~key_mask[:, None, :, None], 0)
        both = torch.cat((inside.double(), torch.ones_like(inside[..., :1], dtype=torch.double)), dim=-1)
        sums = _row_shares(q.float(), k.float(), pivot, scale) @ (weight @ both).float()  # (B, H, n, e + 1)
        output = torch.where(sums[..., -1:] > 0, sums[..., :-1] / sums[..., -1:], 0)
        low, high = (self._range(v.float(), key_mask, sign) for sign in (-1, 1))
        return torch.minimum(torch.maximum(output, low), high).to(v.dtype)

    @staticmethod
    def _range(v: Tensor, key_mask: Tensor | None, sign: int) -> Tensor:
        """The largest (sign 1) or smallest (-1) value of each column, (B, H, 1, e); 0 where no key is real."""
        if key_mask is None:
            return sign * (sign * v).amax(-2, keepdim=True)
        most = (sign * v).masked_fill(~key_mask[:, None, :, None], -torch.inf).amax(-2, keepdim=True)
        return torch.where(most.isfinite(), sign * most, 0)

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        pivot, weight = self.coreset(q, k, key_mask, 1.0)
        matrix = _row_shares(q.double(), k.double(), pivot, 1.0) @ weight
        total = matrix.sum(-1, keepdim=True)
        return torch.where(total > 0, matrix / total, 0)


def _lambert(x: Tensor) -> Tensor:
    """W_0 of positive x, w exp(w) = x, by Newton's method; from ln(1 + x), above it, no step passes it."""
    w = x.log1p()
    for _ in range(10):
        w = w - (w - x * (-w).exp()) / (1 + w)
    return w


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x - y|^2 / 2): exp(x.y) over the root of its diagonal."""
    squares = x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :]
    return (x @ y.mT - squares / 2).exp()


def _row_shares(q: Tensor, k: Tensor, pivot: Tensor, scale: float) -> Tensor:
    """exp(scale q.k) of the chosen keys, each row over its largest entry: (B, H, n, m)."""
    chosen = k.gather(-2, pivot[..., None].expand(*pivot.shape, k.shape[-1]))
    logits = scale * q @ chosen.mT
    return (logits - logits.amax(-1, keepdim=True)).exp()
