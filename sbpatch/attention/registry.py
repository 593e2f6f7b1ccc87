"""The one registry of attention methods, and what a method is made of.

A method is a sparse part, a low-rank part, or both joined by '+': `window`, `clusters`, `lsh+favor`. A part is one class
in one file, registered under its name; `sbpatch.attention.scatterbrain` composes any two of them by the paper's algebra.
`naive:lsh+favor` adds the two without taking L off the support, the paper's baseline. A method that is no sum of such
parts is registered as a whole and stands alone. docs/adding-a-method.md shows all it takes to add one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from ..errors import SbpatchError


@dataclass(frozen=True)
class Geometry:
    """What a layer may know of its site when it is built.

    `grid` is (rows, columns) of an image's tokens, which follow `prefix` class tokens; None where tokens are a sequence.
    """

    tokens: int
    heads: int
    head_dim: int
    causal: bool = False
    grid: tuple[int, int] | None = None
    prefix: int = 0

    @property
    def row_keys(self) -> float:
        """Keys that exact attention reads for one query row, on average: what a budget is a share of."""
        return (self.tokens + 1) / 2 if self.causal else self.tokens


class Tiles(NamedTuple):
    """One round of a sparse support: G groups, each `bq` queries against `bk` keys. Nothing n x n is ever formed.

    Leading dimensions are absent where the pattern is the same for every sample and head, else (B, H).
    """

    query: Tensor  # (..., G, bq) int64: rows of q; a padding slot repeats some row
    key: Tensor  # (..., G, bk) int64: rows of k
    valid: Tensor  # (..., G, bq, bk) bool: the pairs this round covers, minus those an earlier round covered
    slot: Tensor  # (..., n) int64: where in the flattened (G * bq) the result for each query lies


class Summary(NamedTuple):
    """A low-rank part contracted with the values: for query row i, with everything scaled by exp(-shift_i).

    `entries(tiles)` gives L_ij for the pairs of a tile, (B, H, G, bq, bk), in the same scaling.
    """

    shift: Tensor  # (B, H, n, 1) logarithm of the row's scale
    numerator: Tensor  # (B, H, n, d) sum_j L_ij v_j
    denominator: Tensor  # (B, H, n, 1) sum_j L_ij
    entries: Callable[[Tiles], Tensor]


class Support(Protocol):
    """A sparse part: which (query, key) pairs are computed exactly. Implementations are `nn.Module`s."""

    kind: ClassVar[Literal["sparse"]]
    nnz: float  # exact pairs per query row, on average

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        """Parameters that store about `stored` entries a row, at most; None where the part cannot be that small."""

    def rounds(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Iterator[Tiles]: ...

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """The support by its plain definition: bool, broadcastable to (B, H, n, n). For tests and analysis."""


class LowRank(Protocol):
    """A low-rank part L. Implementations are `nn.Module`s.

    One that has a faster way without a sparse part and causality has `attend(q, k, v, key_mask, scale)` too, and one whose
    tensors come from data has `fit(query, key)`: it sees second moments and returns the parameters that follow from them.
    """

    kind: ClassVar[Literal["low-rank"]]
    rank: int
    stored: float  # entries per query row, on average: 2m for features, m + 1 for clusters

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None: ...

    def summarise(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Summary: ...

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """L by its plain definition, (B, H, n, n) float64, not normalised. For tests and analysis."""


class Whole(Protocol):
    """A method that normalises its matrix itself, so that nothing can be added to it. Implementations are `nn.Module`s."""

    kind: ClassVar[Literal["whole"]]
    rank: int
    stored: float  # entries per query row

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None: ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """The output, (B, H, n, e)."""

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """The attention matrix as it multiplies the values, (B, H, n, n) float64. For tests and analysis."""


PARTS: dict[str, Any] = {}  # name -> class that satisfies Support, LowRank or Whole
ALIASES = {"mra2": "top-blocks+pooling"}  # methods of the literature that are two of these parts
NAIVE = "naive:"
Part = TypeVar("Part", bound=type[nn.Module])


def register(name: str) -> Callable[[Part], Part]:
    """Class decorator: make a part known by `name` to `--method`, calibration and comparison."""

    def decorate(cls: Part) -> Part:
        if name in PARTS:
            raise ValueError(f"attention part '{name}' is registered twice")
        PARTS[name] = cls
        return cls

    return decorate


def parse_method(method: str) -> tuple[str | None, str | None]:
    """Split a method name into its (sparse, low-rank) part names, either of them None; a whole method counts as low-rank.

    Raises:
        SbpatchError: an unknown part (near matches are named), two parts of one kind, or a whole method with another part.
    """
    sparse: str | None = None
    low_rank: str | None = None
    bare = method.removeprefix(NAIVE)
    names = ALIASES.get(bare, bare).split("+")
    for name in names:
        if name not in PARTS:
            near = difflib.get_close_matches(name, [*PARTS, *ALIASES], n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted([*PARTS, *ALIASES]))}"
            raise SbpatchError(
                f"unknown attention method '{name}' in '{method}'; {hint} (join a sparse and a low-rank one by '+')"
            )
        kind = PARTS[name].kind
        if kind == "whole" and len(names) > 1:
            raise SbpatchError(f"'{name}' is a method of its own and joins no other part, as '{method}' would have it")
        if kind == "sparse" and sparse is None:
            sparse = name
        elif kind != "sparse" and low_rank is None:
            low_rank = name
        else:
            raise SbpatchError(f"method '{method}' has two {kind} parts; join one sparse and one low-rank part")
    if method.startswith(NAIVE) and (sparse is None or low_rank is None):
        raise SbpatchError(f"'{method}' has one part; {NAIVE} adds a sparse and a low-rank part joined by '+'")
    return sparse, low_rank
