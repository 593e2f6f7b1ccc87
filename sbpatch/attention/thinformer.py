"""Thinformer: keys and values thinned by kernel halving until a few stand for all (Carrell et al., arXiv 2502.12063)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SbpatchError
from .core import take
from .registry import Geometry, Whole, register

LEAST = 16  # keys of a stretch, of which some of the last one may be none
DELTA = 0.5  # of the paper's KH-Compress(0.5): the chance of a failure that its bound allows


@register("thinformer")
class Thinformer(Whole):
    """`rank` of the n pairs (key, value) stand for all, in the kernel exp(scale k.k') (v.v' + max|V|^2).

    Halving takes keys two by two and drops one of each two, so that the sum of the kept ones stays close to that of all (a
    self-balancing walk); what is kept counts twice. Its cost is quadratic, so it is done as COMPRESS does (Shetty et al.,
    arXiv 2111.07941): of stretches of the sequence first, then of four such results joined, and so on; the error falls as
    1 / `rank`, up to logarithms, where that of a uniform sample falls as its root. The last round halves as many as are too
    many.
    """

    rectangular = True

    draws: Tensor  # (H, n) uniform; a call may need a few more, and then begins again

    def __init__(self, site: Geometry, seed: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise SbpatchError(f"thinformer needs at least one key, not {rank}")
        if site.causal:
            raise SbpatchError("thinformer thins all keys, the future included, and cannot be causal")
        self.rank, self.stored = rank, float(min(rank, site.tokens))
        draws = torch.rand(site.heads, site.tokens, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("draws", draws, persistent=False)

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        return {"rank": int(stored)} if stored >= 1 else None

    @torch.no_grad()
    def thinned(self, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        """Indices of the kept keys (B, H, m), and how many keys each stands for (B, H, m), 0 where it is none."""
        n = k.shape[-2]
        walk = _Walk(k, v, key_mask, scale, self.draws.to(k.device))
        merges = max(c for c in range(_merges(n) + 1) if c == 0 or -(-n // 4**c) * 2**c >= self.rank)
        index = torch.arange(n, device=k.device).expand(k.shape[0], 1, -1)
        if key_mask is not None:
            index = (index + n * ~key_mask[:, None]).argsort(-1)  # real keys side by side
        index = F.pad(index, (0, -n % 4**merges), value=n).expand(*k.shape[:2], -1)
        index = index.unflatten(-1, (4**merges, -1))  # (B, H, stretches, keys of each); n: none
        for _ in range(merges):
            index = walk.halved(index.unflatten(2, (-1, 4)).flatten(3))
        times = 2**merges
        while index.shape[-1] > 2 * self.rank:
            even = index.shape[-1] // 2 * 2
            index, times = torch.cat((walk.halved(index[..., :even]), index[..., even:]), -1), 2 * times
        index = index[:, :, 0]  # (B, H, size)
        weight = torch.full(index.shape, times, device=k.device)
        if (over := index.shape[-1] - self.rank) > 0:
            first = torch.arange(over, device=k.device) * (index.shape[-1] // 2) // over * 2  # of evenly spaced pairs
            pairs = torch.stack((first, first + 1), -1).flatten()
            rest = torch.ones(index.shape[-1], dtype=torch.bool, device=k.device).index_fill(0, pairs, False)
            kept = walk.halved(index[..., None, pairs])[:, :, 0]
            index = torch.cat((kept, index[..., rest]), -1)
            weight = torch.cat((2 * weight[..., :over], weight[..., rest]), -1)
        return index.clamp(max=n - 1), weight * walk.real(index)

    def _read(self, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        """The kept keys (B, H, m), and the logarithm of their weights, (B, H, 1, m)."""
        index, weight = self.thinned(k, v, key_mask, scale)
        return index, weight.to(k.dtype).log()[..., None, :]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        index, bias = self._read(k.float(), v.float(), key_mask, scale)
        key, value = (take(x.float(), index[..., None, :]).squeeze(2) for x in (k, v))
        weight = (scale * q.float() @ key.mT + bias).softmax(-1).nan_to_num(0.0)
        return (weight @ value).to(v.dtype)

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """Which keys are kept depends on the values: here, of values all alike."""
        index, bias = self._read(k.double(), torch.ones_like(k[..., :1]).double(), key_mask, 1.0)
        key = take(k.double(), index[..., None, :]).squeeze(2)
        weight = (q.double() @ key.mT + bias).softmax(-1).nan_to_num(0.0)
        where = index[..., None, :].expand_as(weight)
        return weight.new_zeros(*weight.shape[:-1], k.shape[-2]).scatter_add(-1, where, weight)


def _merges(n: int) -> int:
    """How often four can be joined, beginning with stretches of `LEAST` keys at least."""
    return (max(n // LEAST, 1).bit_length() - 1) // 2


class _Walk:
    """Kernel halving (Dwivedi and Mackey, arXiv 2110.01593) of groups of keys side by side, with numbers drawn beforehand."""

    def __init__(self, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, draws: Tensor) -> None:
        self.n, self.draws, self.used = k.shape[-2], draws, 0
        keep = torch.ones_like(k[:, :1, :, :1]) if key_mask is None else key_mask[:, None, :, None]
        k, v, self.keep = (x.double().masked_fill(keep == 0, 0) for x in (k, v, keep.expand_as(k[..., :1])))
        self.key = k * scale**0.5
        self.longest = self.key.square().sum(-1).amax(-1)[..., None, None, None]  # the kernel's scale cancels
        largest = v.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
        self.value = F.pad(v / largest, (0, 1), value=1.0)  # (v, max|V|) over max|V|

    def real(self, index: Tensor) -> Tensor:
        """1 where an index (B, H, ...) is a key, 0 where it is none or padding."""
        found = take(self.keep, index.clamp(max=self.n - 1).flatten(2)[..., None, :]).flatten(2).view(index.shape)
        return found * (index < self.n)

    def halved(self, index: Tensor) -> Tensor:
        """One key of each two neighbours in groups of 2 p, (B, H, G, 2 p) -> (B, H, G, p)."""
        pairs = index.shape[-1] // 2
        rows = index.clamp(max=self.n - 1)
        real = self.real(index)
        key, value = take(self.key, rows), take(self.value, rows)
        kernel = (key @ key.mT - self.longest).exp() * (value @ value.mT) * real[..., None] * real[..., None, :]
        half = kernel[..., 0::2, :] - kernel[..., 1::2, :]
        inner = half[..., 0::2] - half[..., 1::2]  # (B, H, G, p, p) <f_i, f_j> of f = k(x, .) - k(x', .)
        many = index.shape[2] * pairs
        place = (self.used + torch.arange(many, device=index.device)) % self.draws.shape[-1]
        draw = self.draws[:, place].unflatten(-1, (-1, pairs)).double()  # (H, G, p)
        self.used += many
        first, second = real[..., 0::2] > 0, real[..., 1::2] > 0  # where one of the two is none, the other one is kept
        draw = draw.masked_fill(first & ~second, torch.inf).masked_fill(second & ~first, -torch.inf)
        return torch.where(_signs(inner, draw) < 0, index[..., 0::2], index[..., 1::2])


def _signs(inner: Tensor, draw: Tensor) -> Tensor:
    """Signs (…, p) whose sum of s_i f_i stays small: inner products of the f (…, p, p), uniform numbers (…, p)."""
    pairs = inner.shape[-1]
    reach = math.sqrt(2 * math.log(4 * pairs / DELTA))  # of a walk of so many steps: with DELTA / (2 p) for each
    total = torch.zeros_like(inner[..., 0])  # of the f so far, with each f
    spread = torch.zeros_like(total[..., 0])  # the variance proxy, sigma squared
    signs = []
    for i in range(pairs):
        square = inner[..., i, i].clamp(min=0)
        limit = torch.maximum((square * spread).sqrt() * reach, square)
        safe = limit.clamp(min=torch.finfo(limit.dtype).tiny)
        sign = torch.where(draw[..., i] < (1 - total[..., i] / safe) / 2, 1.0, -1.0).to(total)
        spread = spread + square * (1 + (square - 2 * limit) * spread / safe.square()).clamp(min=0)
        total = total + sign[..., None] * inner[..., i]
        signs.append(sign)
    return torch.stack(signs, -1)
