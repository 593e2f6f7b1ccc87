"""Heads of one site that compute attention in different ways: groups of heads, each with a layer of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SbpatchError
from .core import captured, output_of, with_heads
from .masks import allowed
from .registry import Geometry
from .scatterbrain import Scatterbrain


class Exact(nn.Module):
    """Exact attention under the signature of `Scatterbrain`, for heads that no approximation is good enough for."""

    method, rank = "exact", 0
    parameters_used: dict[str, int] = {}  # noqa: RUF012 (never changed)

    def __init__(self, site: Geometry) -> None:
        super().__init__()
        self.site, self.nnz, self.stored = site, site.row_keys, site.row_keys

    def longer(self, times: int) -> Exact:
        return Exact(self.site.longer(times))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """q (B, H, n, d), k and v of H or fewer heads, key_mask (B, n) bool -> (B, H, n, e)."""
        mask, causal = None, self.site.causal
        if key_mask is not None:
            mask = allowed(key_mask, causal, q.shape[-2], k.shape[-2])
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
        )


Layer = Scatterbrain | Exact


class PerHead(nn.Module):
    """One layer a group of heads; `heads[i]` are the query heads that `layers[i]` computes.

    Query heads that share keys stay together, so that a layer gets each key head once.

    Raises:
        SbpatchError: the groups are not a partition of the site's heads, or part heads that share keys.
    """

    method = "per-head"

    def __init__(self, site: Geometry, heads: Sequence[Sequence[int]], layers: Sequence[Layer]) -> None:
        super().__init__()
        flat = [head for group in heads for head in group]
        if sorted(flat) != list(range(site.heads)):
            raise SbpatchError(f"groups {[list(group) for group in heads]} are not the {site.heads} heads, each once")
        size = site.group
        shared = [[head // size for head in group[::size]] for group in heads]
        if any(
            list(group) != [k * size + i for k in mine for i in range(size)]
            for group, mine in zip(heads, shared, strict=True)
        ):
            raise SbpatchError(f"groups {[list(group) for group in heads]} part heads that share keys, {size} each")
        self.site, self.heads = site, [list(group) for group in heads]
        self.layers = nn.ModuleList(layers)
        for i, (group, mine) in enumerate(zip(self.heads, shared, strict=True)):
            self.register_buffer(f"heads_{i}", torch.tensor(group), persistent=False)
            self.register_buffer(f"keys_{i}", torch.tensor(mine), persistent=False)
        self.runs = [(_run(group), _run(mine)) for group, mine in zip(self.heads, shared, strict=True)]
        self.nnz = self._mean("nnz")
        self.stored = self._mean("stored")

    def longer(self, times: int) -> PerHead:
        """The layers for sequences `times` as long, a power of two."""
        found = PerHead(self.site.longer(times), self.heads, [layer.longer(times) for layer in self._layers()])
        return found.to(self.get_buffer("heads_0").device)

    def _layers(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers))

    def _mean(self, name: str) -> float:
        pairs = zip(self.heads, self.layers, strict=True)
        return sum(len(group) * float(getattr(layer, name)) for group, layer in pairs) / self.site.heads

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """As `Scatterbrain`: q (B, H, n, d), k and v of H or fewer heads, key_mask (B, n) bool -> (B, H, n, e)."""
        k, v = (with_heads(x, self.site.heads // self.site.group) for x in (k, v))
        out = output_of(q, v)
        with _side_by_side(q.device, len(self.layers)) as places:
            for i, (layer, place) in enumerate(zip(self.layers, places, strict=True)):
                mine, keys = self._index(i)
                with place:
                    out[:, mine] = layer(q[:, mine], k[:, keys], v[:, keys], key_mask=key_mask, scale=scale)
        return out

    def _index(self, i: int) -> tuple[slice | Tensor, slice | Tensor]:
        """Query heads and key heads of layer i: slices where they follow each other, which copies nothing."""
        heads, keys = self.runs[i]
        return heads or self.get_buffer(f"heads_{i}"), keys or self.get_buffer(f"keys_{i}")


@cache
def _stream(device: torch.device, i: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def _side_by_side(device: torch.device, groups: int) -> Iterator[list[AbstractContextManager[None]]]:
    """Where each of the groups is to be computed: while a CUDA graph is captured, on streams that it runs at once.

    A group of few heads does not fill a device. Launched one by one they would not run at once, as launching takes longer
    than they do.
    """
    if not captured(device):
        yield [nullcontext()] * groups
        return
    main, others = torch.cuda.current_stream(device), [_stream(device, i) for i in range(1, groups)]
    for stream in others:
        stream.wait_stream(main)
    yield [nullcontext(), *(torch.cuda.stream(stream) for stream in others)]
    for stream in others:
        main.wait_stream(stream)


def _run(heads: Sequence[int]) -> slice | None:
    """The slice of heads that follow each other; None where they do not."""
    first, stop = heads[0], heads[-1] + 1
    return slice(first, stop) if list(heads) == list(range(first, stop)) else None
