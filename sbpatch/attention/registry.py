"""The one registry of attention methods, and what a method is made of.

A method is a sparse part, a low-rank part, or both joined by '+': `window`, `clusters`, `lsh+favor`. A part is one class
in one file, registered under its name. A part selects: it says which keys the queries of a tile read exactly, or what stands
for the other keys; `attend` computes the attention of any two of them by the paper's algebra. `naive:lsh+favor` adds the
two without taking L off the support, the paper's baseline. A method whose two halves depend on each other is registered as
joined, one that is no such sum as whole; both stand alone. docs/adding-a-method.md shows all it takes to add one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

from torch import Tensor, nn

from ..errors import SbpatchError
from .core import LowRankData, Selection, Stretches, Tiles


@dataclass(frozen=True)
class Geometry:
    """What a layer may know of its site when it is built.

    `tokens` are those that keys are made of. `grid` is (rows, columns) of an image's tokens, which follow `prefix` class
    tokens; None where tokens are a sequence. `key_heads` are the heads of keys and values where runs of query heads share
    them (grouped queries), else 0. `queries` are the rows where they are not as many as the keys (an image's pooled keys,
    cross attention), `value_dim` the width of values where it is not that of keys; else 0.
    """

    tokens: int
    heads: int
    head_dim: int
    causal: bool = False
    grid: tuple[int, int] | None = None
    prefix: int = 0
    key_heads: int = 0
    queries: int = 0
    value_dim: int = 0

    @property
    def rows(self) -> int:
        """Queries of a head."""
        return self.queries or self.tokens

    @property
    def row_keys(self) -> float:
        """Keys that exact attention reads for one query row, on average: what a budget is a share of."""
        return (self.tokens + 1) / 2 if self.causal else self.tokens

    def of_heads(self, heads: int) -> Geometry:
        """The same for some of its heads, whole runs of those that share keys."""
        return replace(self, heads=heads, key_heads=heads // self.group if self.key_heads else 0)

    def longer(self, times: int) -> Geometry:
        """The same for sequences `times` as long."""
        return replace(self, tokens=self.tokens * times)

    @property
    def group(self) -> int:
        """Query heads that share one head of keys and values."""
        return self.heads // self.key_heads if self.key_heads else 1


Kind = Literal["sparse", "low-rank", "joined", "whole"]


class Part(nn.Module):
    """What every part of a method declares; its subclass is the method's one file. The defaults are those of most parts.

    The four kinds below add one function each: `select`, which computes no attention (see core.py), or `forward`. It takes
    q, k (B, H, n, d) and v (B, H, n, e) as the model has them, the logits being scale q.k; key_mask (B, n), True for real keys.
    A `rectangular` part also takes other numbers of queries than of keys, and gives as many rows.
    """

    kind: ClassVar[Kind]

    grouped: bool = False  # takes k and v of fewer heads than q as they are; other parts get them repeated
    fitted: ClassVar[bool] = False  # `fit` takes something from the sample's queries and keys
    rectangular: ClassVar[bool] = (
        False  # takes queries and keys of different numbers; other parts assume the same tokens
    )
    by_content: ClassVar[bool] = False  # sparse: finds a query's largest keys
    analysis_only: ClassVar[bool] = False  # forms the whole n x n matrix
    learned: ClassVar[tuple[str, ...]] = ()  # buffers, one number a head, that calibration tunes (factors, 1 at first)

    nnz: float = 0.0  # exact pairs per query row, on average
    rank: int = 0  # size of the low-rank part
    stored: float = 0.0  # entries per query row that it keeps: 2 m for features, m + 1 for points
    near: int = 0  # sparse: how many of the latest keys every query of a causal site reads
    unread: int = 0  # low-rank: how many of the latest keys no query of a causal site gets from it

    @classmethod
    def sized(cls, stored: float, site: Geometry) -> dict[str, int] | None:
        """Parameters that store about `stored` entries a row, at most; None where the part cannot be that small."""
        raise NotImplementedError

    @classmethod
    def variants(cls, stored: float, site: Geometry) -> list[dict[str, int]]:
        """All settings of about that size that calibration tries, the best guess first."""
        size = cls.sized(stored, site)
        return [] if size is None else [size]

    @classmethod
    def tried(cls, site: Geometry, entropy_ratio: float) -> str | None:
        """The method with this part that `auto` tries at a site whose mean entropy is that share of ln n, if any."""
        return None

    def longer(self, times: int) -> dict[str, int]:
        """Parameters that change where sequences are `times` as long, a power of two, so that the share read stays. None do
        by default: what a part reads of each row then is as many entries as before.
        """
        return {}

    def fit(self, query: Tensor, key: Tensor) -> dict[str, int]:
        """Take what is needed from second moments (H, d, d) of the sample; returns the parameters that follow from them."""
        return {}

    def dense(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """The same by its plain definition, logits being q.k, for tests and analysis. Sparse: the support, bool, broadcastable
        to (B, H, n, n). Low-rank and joined: L, not normalised. Whole: the matrix that multiplies the values. Both (B, H, n, n)
        float64.
        """
        raise NotImplementedError


class Sparse(Part):
    """A part that says which (query, key) pairs are computed exactly."""

    kind = "sparse"

    def select(self, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> Sequence[Tiles | Stretches]:
        """The support in rounds of tiles, each pair once; stretches are a round alone."""
        raise NotImplementedError


class LowRank(Part):
    """A part that approximates exp(scale q.k) for all pairs. `joined`: a sparse part stands beside it."""

    kind = "low-rank"

    def select(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, joined: bool
    ) -> LowRankData:
        raise NotImplementedError


class Joined(Part):
    """A method whose sparse and low-rank halves depend on each other."""

    kind = "joined"

    def select(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Selection:
        raise NotImplementedError

    def pairs(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """The support by its plain definition, as `dense` of a sparse part."""
        raise NotImplementedError


class Whole(Part):
    """A method that normalises its matrix itself, so that nothing can be added to it."""

    kind = "whole"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        """The output, (B, H, n, e)."""
        raise NotImplementedError


PARTS: dict[str, type[Part]] = {}
ALIASES = {"mra2": "top-blocks+pooling"}  # methods of the literature that are two of these parts
NAIVE = "naive:"
AnyPart = TypeVar("AnyPart", bound=type[Part])


def register(name: str) -> Callable[[AnyPart], AnyPart]:
    """Class decorator: make a part known by `name` to `--method`, calibration and comparison."""

    def decorate(cls: AnyPart) -> AnyPart:
        if name in PARTS:
            raise ValueError(f"attention part '{name}' is registered twice")
        PARTS[name] = cls
        return cls

    return decorate


def parse_method(method: str) -> tuple[str | None, str | None]:
    """Split a method name into its (sparse, low-rank) part names, either of them None; joined and whole ones count as low-rank.

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
        if kind in ("whole", "joined") and len(names) > 1:
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


def fits(method: str, site: Geometry) -> bool:
    """Whether a method takes the site's queries and keys, which may be of different numbers."""
    return not site.queries or all(PARTS[name].rectangular for name in parse_method(method) if name)
