"""Select, then attend: what the parts of a method hand over to the one function that computes attention.

A method selects: `Tiles` say which keys a run of queries reads exactly; `Points`, an `Expansion`, `Features` or `Landmarks`
stand for the others. attend.py does the rest, by the paper's algebra (arXiv 2110.15343, eq. 1 and 2): exp(q.k) on the support,
L elsewhere. Where all queries of a tile read the same keys and points, that is plain attention over a short list, and one fused
call computes many tiles (fused.py). Everything else goes pair by pair (pairwise.py), also the reference of the fused form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Tiles(NamedTuple):
    """One round of a sparse support: T tiles, each of g queries against a list of up to L keys. Nothing n x n is ever formed.

    Leading dimensions are absent where the pattern is the same for every sample and head, else (B, H).
    """

    query: Tensor  # (..., T, g) int64: rows of q; a padding slot repeats some row
    key: Tensor  # (..., T, L) int64: rows of k
    valid: Tensor  # (..., T, g or 1, L) bool: pairs covered here and in no earlier round; 1: the same for all queries of a tile
    slot: Tensor  # (..., n) int64: where in the flattened (T g) the result for each query lies
    diagonal: bool = False  # causal: the first g keys are the tile's own tokens in order, all others lie before them

    @property
    def shared(self) -> bool:
        """Whether every query of a tile reads the same keys, the future apart."""
        return self.valid.shape[-2] == 1


class Stretches(NamedTuple):
    """Causal: tiles of `tile` queries that read themselves, the `near` keys before them, the `first` tokens, and chosen blocks.

    The sequence has so many `blocks` of `block` keys, of which a tile chooses from those before its near keys.
    """

    chosen: Tensor  # (B, H, T, p) int64; `blocks`: none
    blocks: int
    block: int
    tile: int
    near: int
    first: int


class Points(NamedTuple):
    """Keys in m groups, each with one point that stands for its keys: L_ij = exp(scale q_i.key_own(j)). H may be key heads."""

    key: Tensor  # (B, H, m, d)
    value: Tensor  # (B, H, m, e) mean of the keys' values
    counts: Tensor  # (B, H, m) keys that it stands for
    own: Tensor  # (B, H, n) int64: the point of each key; m: of none
    ready: Tensor | None = None  # (m,) int64, causal: the first query that may read it, after the last of its keys


class Expansion(NamedTuple):
    """Causal: tiles of queries that read stretches of keys exactly, and blocks of keys as points (see expansion.py).

    Each of T tiles reads itself, the `near` keys before it, the `first` tokens, and some of the m blocks of c keys that lie
    before its near keys; each other of these blocks is a point of its own for the tile. H may be key heads.
    """

    key: Tensor  # (B, H, m, c, d)
    value: Tensor  # (B, H, m, c, e)
    about: Tensor  # (B, H, T, d): scale times the mean query of each tile
    exact: Tensor  # (B, H, T, p) int64: blocks that the tile reads key by key, and not as points; m: none
    tile: int  # queries of a tile
    near: int
    first: int
    key_mask: Tensor | None  # (B, n) bool, True for real keys

    @property
    def read(self) -> Stretches:
        """What its tiles read key by key."""
        return Stretches(self.exact, self.key.shape[2], self.key.shape[3], self.tile, self.near, self.first)

    @property
    def past(self) -> tuple[int, ...]:
        """How many blocks each tile may read, the first ones."""
        return tuple(max(t * self.tile - self.near, 0) // self.key.shape[3] for t in range(self.about.shape[2]))

    def counts(self) -> Tensor:
        """The same on the device, (T,) int64, without a copy from the host."""
        start = self.tile * torch.arange(self.about.shape[2], device=self.about.device)
        return (start - self.near).clamp(min=0) // self.key.shape[3]

    def valid(self) -> Tensor:
        """Keys that a point stands for, (1 or B, 1, m, c) bool: real ones behind the first tokens."""
        shape = self.key.shape[2:4]
        used = shape[0] * shape[1]
        valid = torch.arange(used, device=self.key.device).view(1, 1, *shape) >= self.first
        return valid if self.key_mask is None else valid & self.key_mask[:, None, :used].unflatten(2, shape)


class Features(NamedTuple):
    """A feature map: L_ij = sum_r exp(log_query_ir + log_key_jr)."""

    log_query: Tensor  # (B, H, n, m) float32
    log_key: Tensor  # (B, H, n, m) float32; -inf at padding


class Landmarks(NamedTuple):
    """Weighted points already contracted with the values: row i of L v is sum_l exp(y_i.l) weight_l, y = q to_query.

    Weights may be negative, and a row whose sum strays from what clusters around the same landmarks give is theirs.
    """

    to_query: Tensor  # (B, H, d, r), the softmax scale included
    landmark: Tensor  # (B, H, m, r)
    weight: Tensor  # (B, H, m, e + 1) by Nystrom: for each value, and the weight's own sum
    members: Tensor  # (B, H, m, 1) members of each landmark's cluster
    own: Tensor  # (B, H, n) the cluster of each key, m at padding


class Factors(NamedTuple):
    """L by factors that hold whatever sign: L_ij = exp(shift_i) left_i.right_j, float64."""

    shift: Tensor  # (B, H, n, 1)
    left: Tensor  # (B, H, n, m)
    right: Tensor  # (B, H, n, m); zero at padding


LowRankData = Points | Expansion | Features | Factors | Landmarks


class Selection(NamedTuple):
    """What the queries of a call read: exact keys, round by round, and what stands for the other keys."""

    tiles: Sequence[Tiles | Stretches]
    low_rank: LowRankData | None


def known_at_once(x: Tensor) -> bool:
    """Whether code may branch on values of x: on a CPU, outside a compiled graph. A GPU would have to be waited for."""
    return x.is_cpu and not torch.compiler.is_compiling()


def captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: what runs then may ask nothing of a tensor's values."""
    compiling = torch.compiler.is_compiling()
    return device.type == "cuda" and not compiling and torch.cuda.is_current_stream_capturing()


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, H, n, d) at index (T, b) or (B, H, T, b) -> (B, H, T, b, d)."""
    tiles, size = index.shape[-2:]
    if index.ndim == 2:  # the same rows for every sample and head
        return x.index_select(2, index.reshape(-1)).unflatten(2, (tiles, size))
    batch, heads, n, width = x.shape
    first = n * torch.arange(batch * heads, device=x.device).view(batch, heads, 1, 1)
    return x.reshape(-1, width).index_select(0, (index + first).reshape(-1)).view(batch, heads, tiles, size, width)


def lengthened(x: Tensor, over: int) -> Tensor:
    """x (..., n, d) with so many rows of zeros behind it; x itself for none, of which `F.pad` would make a copy."""
    return F.pad(x, (0, 0, 0, over)) if over else x


def restore(x: Tensor, slot: Tensor) -> Tensor:
    """Inverse of taking queries: x (B, H, T, g, d) and slot (n,) or (B, H, n) -> (B, H, n, d)."""
    return take(x.flatten(2, 3), slot[..., None, :]).squeeze(2)


def places(tiles: Tiles) -> Tensor:
    """The rows of the output that each tile's queries are, (..., T, g); n at a padding slot."""
    (many, size), n = tiles.query.shape[-2:], tiles.slot.shape[-1]
    used = tiles.slot.new_zeros(*tiles.slot.shape[:-1], many * size, dtype=torch.bool)
    return tiles.query.masked_fill(~used.scatter(-1, tiles.slot, True).unflatten(-1, (many, size)), n)


def query_mask(q: Tensor, key_mask: Tensor | None, k: Tensor) -> Tensor | None:
    """Which queries are real, (B, n) bool: `key_mask` where they are of the same tokens as the keys, else all (None)."""
    return key_mask if q.shape[-2] == k.shape[-2] else None


def output_of(q: Tensor, v: Tensor) -> Tensor:
    """(B, H, n, e) without values for queries (B, H, n, d) and values (..., e), laid out as by SDPA."""
    batch, heads, n, _ = q.shape
    return v.new_empty(batch, n, heads, v.shape[-1]).transpose(1, 2)


def repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, H_k, n, d) with `heads` heads, each one's repeated for the run of query heads that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def with_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values with `heads` heads, fewer or more than they have: a model may have repeated grouped ones already."""
    return x[:, :: x.shape[1] // heads] if x.shape[1] > heads else repeated(x, heads)
