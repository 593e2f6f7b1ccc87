"""The Scatterbrain layer of one site: the parts of a method, built from its parameters (arXiv 2110.15343, eq. 1 and 2).

    A' = L + S,  S_ij = exp(q_i.k_j) - L_ij on the support, 0 elsewhere;  output = A'V / A'1

so that A' is exact on the support and L elsewhere. The parts select, `attend` computes. L may carry a factor exp(gain) a
head, which calibration learns: points, for one, always weigh less than their keys (Jensen).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ..bounds import STEPS, TOKENS, whole
from ..errors import SbpatchError
from . import pairwise
from .attend import attend
from .core import Selection, with_heads
from .registry import NAIVE, PARTS, Geometry, Joined, LowRank, Part, Sparse, Whole, fits, parse_method


class Scatterbrain(nn.Module):
    """Attention of one site by `method` (see `registry.parse_method`) with the parts' parameters.

    Everything random is drawn here, from `seed`, into buffers. The parameters of both parts share one flat namespace.

    Raises:
        SbpatchError: unknown method or parameter, or a combination that cannot hold for this site.
    """

    gain: Tensor | None  # (H,) or of the key heads, in nats

    def __init__(self, method: str, site: Geometry, seed: int, **parameters: int) -> None:
        super().__init__()
        sparse, low_rank = parse_method(method)
        if not fits(method, site):
            raise SbpatchError(
                f"'{method}' takes queries and keys of the same tokens, and here {site.queries} queries read {site.tokens} "
                "keys: take a method that goes by content alone, such as clusters or coreset"
            )
        self.method, self.site, self.parameters_used = method, site, dict(parameters)
        self.naive = method.startswith(NAIVE)  # the paper's baseline: L + exp(q.k) on the support, counted twice there
        self.support = cast(Sparse | None, self._part(sparse, site, seed, parameters))
        self.low_rank = cast(LowRank | Joined | Whole | None, self._part(low_rank, site, seed + 1, parameters))
        self.parts = [part for part in (self.support, self.low_rank) if part is not None]
        both = len(self.parts) == 2 or self.parts[0].kind == "joined"
        self.key_heads = site.heads // site.group if all(part.grouped for part in self.parts) else site.heads
        self.register_buffer("gain", torch.zeros(self.key_heads) if both and not self.naive else None, persistent=False)
        if parameters:
            raise SbpatchError(f"method '{method}' takes no parameter '{', '.join(sorted(parameters))}'")
        near = self.support.near if self.support is not None else 0
        if site.causal and self.low_rank is not None and self.low_rank.unread > near:
            raise SbpatchError(
                f"causal {low_rank} summarise whole stretches of {self.low_rank.unread} keys, so the sparse part must be a "
                f"window of at least that many, not {near}"
            )

    @staticmethod
    def _part(name: str | None, site: Geometry, seed: int, parameters: dict[str, int]) -> Part | None:
        if name is None:
            return None
        part = PARTS[name]
        accepted = _accepted(part)
        missing = [p.name for p in accepted if p.default is p.empty and p.name not in parameters]
        if missing:
            raise SbpatchError(f"method part '{name}' needs a value for {', '.join(missing)}")
        build = cast(Callable[..., Part], part)
        return build(site, seed, **{p.name: parameters.pop(p.name) for p in accepted if p.name in parameters})

    @property
    def nnz(self) -> float:
        """Exact pairs per query row, on average."""
        return sum(part.nnz for part in self.parts)

    @property
    def rank(self) -> int:
        return self.low_rank.rank if self.low_rank is not None else 0

    @property
    def stored(self) -> float:
        """Entries stored for one query row, on average: nnz + 2m for feature maps, nnz + m + 1 for points.

        The budget is this over `site.row_keys`.
        """
        return self.nnz + sum(part.stored for part in self.parts)

    @property
    def learned(self) -> dict[str, Tensor]:
        """What calibration tunes, by name: factors of the parts, one a head, and `gain`."""
        found = {name: part.get_buffer(name) for part in self.parts for name in part.learned}
        return found if self.gain is None else found | {"gain": self.gain}

    def fit(self, query: Tensor, key: Tensor) -> None:
        """Let the parts take what they need of the sample's second moments (H, d, d), see `fidelity.second_moments`."""
        for part in self.parts:
            self.parameters_used |= part.fit(query, key)

    def longer(self, times: int) -> Scatterbrain:
        """The layer for sequences `times` as long, a power of two, with what was drawn and learned here (see `Part.longer`)."""
        changed = {name: value for part in self.parts for name, value in part.longer(times).items()}
        found = Scatterbrain(self.method, self.site.longer(times), 0, **(self.parameters_used | changed))
        mine = dict(self.named_buffers())
        for name, buffer in found.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(mine[name])
        return found.to(next(iter(mine.values())).device) if mine else found

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """q (B, H, n_q, d), k (B, H, n, d), v (B, H, n, e), key_mask (B, n) bool with True for real keys -> (B, H, n_q, e) in
        q's dtype. n_q is n unless all parts are `rectangular`.

        k and v may have fewer heads than q, each shared by a run of query heads (grouped queries). A query that no real key
        is left for gets zeros, as in PyTorch's own attention.
        """
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        k, v = (with_heads(x, self.key_heads) for x in (k, v))
        if isinstance(self.low_rank, Whole):
            return cast(Tensor, self.low_rank(q, k, v, key_mask, scale))
        selection = self._select(q, k, v, key_mask, scale, joined=self.support is not None)
        return attend(
            q, k, v, selection, scale, key_mask=key_mask, causal=self.site.causal, gain=self.gain, naive=self.naive
        )

    def _select(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, joined: bool
    ) -> Selection:
        """What the queries read; arguments as `forward`, with the heads that the parts take."""
        if isinstance(self.low_rank, Joined):
            return self.low_rank.select(q, k, v, key_mask, scale)
        tiles = [] if self.support is None else self.support.select(q, k, key_mask, scale)
        low = None
        if isinstance(self.low_rank, LowRank):
            low = self.low_rank.select(q, k, v, key_mask, scale, joined)
        return Selection(tiles, low)

    def split(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
    ) -> tuple[pairwise.Sums | None, pairwise.Sums | None]:
        """The sums of both parts apart, by the general form: `pairwise.merged` of them is `forward`, for any gain."""
        k, v = (with_heads(x, self.key_heads) for x in (k, v))
        selection = self._select(q, k, v, key_mask, scale, joined=True)
        return pairwise.split(q, k, v, selection, scale, key_mask, self.site.causal, self.naive)


REPEATED = {"steps", "rounds", "power"}  # parameters that say how often something is done
SMALL = 1024  # what any other parameter may be: blocks and tiles may be larger than a short site


def _accepted(part: type[Part]) -> list[inspect.Parameter]:
    return list(inspect.signature(part).parameters.values())[2:]  # after site and seed


def check_parameters(method: str, parameters: Mapping[str, object], site: Geometry | None = None) -> None:
    """Refuse parameters from a file that are not the method's own or out of bounds: a rank is at most n.

    Raises:
        SbpatchError: one is; the line names it.
    """
    known = {p.name for name in parse_method(method) if name is not None for p in _accepted(PARTS[name])}
    tokens = TOKENS if site is None else site.tokens
    for name, value in parameters.items():
        if name not in known:
            raise SbpatchError(f"method '{method}' takes no parameter '{name}'")
        most = STEPS if name in REPEATED else tokens if name == "rank" else max(tokens, SMALL)
        whole(value, f"{name} of '{method}'", 0, most)
