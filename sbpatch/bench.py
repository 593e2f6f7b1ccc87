"""Time, memory and error of one attention call by length, against eager and SDPA (the paper's Figure 6)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import RenderableType
from torch import Tensor

from .attention import PARTS, Geometry, Scatterbrain, parse_method
from .errors import SbpatchError
from .evaluate import eager_attention
from .fidelity import output_error
from .measure import elapsed_ms, peak_memory_bytes
from .progress import Progress, no_progress
from .report import readable_bytes, simple_table
from .sites import Call

METHODS = ("clusters", "lsh+clusters", "window+favor", "lsh+favor")
REPEATS = 5
EAGER_BYTES = 4 << 30  # eager attention is left out where its matrix alone would take more


def inputs(tokens: int, heads: int, head_dim: int, batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, n, d); keys lie in 64 clumps, as those of trained models do, and are no plain noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, head_dim)
    clump = 1.5 * torch.randn(batch, heads, 64, head_dim, generator=generator)
    member = torch.randint(64, (batch, heads, tokens, 1), generator=generator).expand(shape)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return q, 0.5 * k + clump.gather(2, member), v + clump.gather(2, member)


def sized_layer(method: str, site: Geometry, budget: float, seed: int) -> Scatterbrain:
    """`method` at a budget, joined methods split in half.

    Raises:
        SbpatchError: the method cannot work in that budget.
    """
    sparse, low_rank = parse_method(method)
    parts = [name for name in (sparse, low_rank) if name]
    parameters: dict[str, int] = {}
    for name in parts:
        sized = PARTS[name].sized(budget * site.tokens / len(parts), site)
        if sized is None:
            raise SbpatchError(
                f"budget {budget:g} of {site.tokens} tokens is less than {method} can work with: raise --budget"
            )
        parameters |= sized
    return Scatterbrain(method, site, seed, **parameters)


@torch.inference_mode()
def bench(
    lengths: Sequence[int],
    methods: Sequence[str],
    *,
    budget: float = 0.03,
    heads: int = 4,
    head_dim: int = 64,
    batch: int = 1,
    causal: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: Progress[Any] = no_progress,
) -> list[dict[str, Any]]:
    """One row a length and method, `sdpa` and `eager` among them, in the contract's keys. Time: median of `REPEATS` calls,
    the methods of one length taking turns; memory: peak of one call beside its inputs.

    Raises:
        SbpatchError: an unknown method, or a budget that it cannot work in.
    """
    place = torch.device(device)
    rows = []
    for tokens in progress(lengths, "benchmark"):
        site = Geometry(tokens, heads, head_dim, causal)
        q, k, v = (x.to(place, dtype) for x in inputs(tokens, heads, head_dim, batch, seed))
        call = Call(q, k, v, is_causal=causal)
        layers = {method: sized_layer(method, site, budget, seed).to(place) for method in methods}
        work: dict[str, Callable[[], Tensor]] = {"sdpa": call.exact}
        if batch * heads * tokens**2 * q.element_size() <= EAGER_BYTES:
            work["eager"] = partial(eager_attention, call)
        work |= {name: partial(layer, q, k, v) for name, layer in layers.items()}
        exact = call.exact()
        times: dict[str, list[float]] = {name: [] for name in work}
        errors = {name: float(output_error(run(), exact).mean()) for name, run in work.items()}  # also the warm-up
        for _ in range(REPEATS):
            for name, run in work.items():
                times[name].append(elapsed_ms(run, place)[1])
        ms = {name: statistics.median(t) for name, t in times.items()}
        for name, run in work.items():
            row = {
                "tokens": tokens,
                "heads": heads,
                "head_dim": head_dim,
                "batch": batch,
                "causal": causal,
                "method": name,
            }
            row |= {"budget": layers[name].stored / tokens if name in layers else 1.0, "ms": ms[name]}
            row |= {"peak_memory_bytes": peak_memory_bytes(run, place), "speedup_vs_sdpa": ms["sdpa"] / ms[name]}
            if "eager" in ms:
                row["speedup_vs_eager"] = ms["eager"] / ms[name]
            rows.append(row | {"output_error": errors[name]})
    return rows


def table(rows: Sequence[Mapping[str, Any]], title: str) -> RenderableType:
    """One row a length and method."""
    listed = simple_table(
        title, method="left", tokens="right", budget="right", ms="right", vs_SDPA="right", vs_eager="right",
        peak="right", error="right",
    )  # fmt: skip
    for row in rows:
        eager = f"{row['speedup_vs_eager']:.2f}x" if "speedup_vs_eager" in row else ""
        listed.add_row(
            row["method"], str(row["tokens"]), f"{row['budget']:.4f}", f"{row['ms']:.2f}", f"{row['speedup_vs_sdpa']:.2f}x",
            eager, readable_bytes(row["peak_memory_bytes"]), f"{row['output_error']:.4f}",
        )  # fmt: skip
    return listed
