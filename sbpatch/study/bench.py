"""Time, memory and error of one attention call by length, against eager and SDPA (the paper's Figure 6)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention import Geometry, Scatterbrain, parse_method, sized_parameters
from ..calibration.candidates import candidates_for
from ..calibration.costs import clumped
from ..errors import SbpatchError, one_line, out_of_memory
from ..evaluation.variants import eager_attention
from ..measure import elapsed_ms, peak_memory_bytes, without_launches
from ..plan.plan import SitePlan
from ..progress import Progress, no_progress
from ..sites.calls import Call
from ..sites.fidelity import head_profile, output_error
from ..sites.find import Site
from ..sites.observe import check_finite

METHODS = ("clusters", "lsh+clusters", "window+favor", "lsh+favor", "auto")
CAUSAL_METHODS = ("blocks", "window", "sinks", "window+favor", "lsh+favor", "auto")
LENGTHS = (1024, 4096, 16384)
REPEATS = 5
EAGER_BYTES = 1 << 30  # eager attention is left out where its matrix alone would take more
# Keys of a row that say what the call is; and `queries`, if others.
SHAPE = ("tokens", "heads", "head_dim", "batch", "causal")

Row = dict[str, Any]  # in the contract's keys
Moments = tuple[Tensor, Tensor]  # see `fidelity.second_moments`, means over samples: (H, d, d) each


def check_settings(methods: Iterable[str], budget: float) -> None:
    """Refuse what would be wrong at every length.

    Raises:
        SbpatchError: an unknown method, or a budget that is no share.
    """
    if not 0 < budget < 1:
        raise SbpatchError(f"budget {budget:g} is not a share between 0 and 1 (0.03 stores 3 % of the entries)")
    for method in methods:
        if method != "auto":
            parse_method(method)


# -- the layers ------------------------------------------------------------------------------------------------------


def budgeted_layer(
    method: str, site: Geometry, budget: float, seed: int, moments: Moments | None = None
) -> Scatterbrain:
    """`method` at a budget, a share of `site.row_keys`; joined methods split in half, fitted parts fitted to `moments`.

    Raises:
        SbpatchError: the method cannot work in that budget, or not at such a site.
    """
    parameters = sized_parameters(method, site, budget * site.row_keys)
    if parameters is None:
        raise SbpatchError(
            f"budget {budget:g} of {site.row_keys:g} keys is less than {method} can work with: raise --budget"
        )
    layer = Scatterbrain(method, site, seed, **parameters)
    if moments is not None:
        layer.fit(*moments)
    return layer


def automatic(call: Call, site: Site, budget: float, seed: int, moments: Moments | None = None) -> Scatterbrain | None:
    """Of the layers of this budget that calibration tries, the one of least output error that is not slower than SDPA.

    None where exact attention is better than all of them. The only place here that asks for candidates.
    """
    device = call.query.device
    described = SitePlan.of(site, "patch", "")
    described.entropy_ratio = float(head_profile(call)["entropy"].mean()) / math.log(max(described.tokens, 2))
    try:
        tried, _ = candidates_for(
            described, seed, budget, moments=moments, method="auto", allocation="measured", heads=described.heads,
            device=device, costs=None,
        )  # fmt: skip
    except SbpatchError:  # the budget is too small for all of them
        return None
    exact = call.exact()
    layers = [c.layer for c in tried if isinstance(c.layer, Scatterbrain)]
    errors = [float(output_error(call.through(layer), exact, call.query_mask).mean()) for layer in layers]

    def quick(work: Callable[[], Tensor]) -> float:
        timed = without_launches(work, device)
        return min(elapsed_ms(timed, device)[1] for _ in range(3))

    limit = quick(call.exact)
    by_error = (layers[i] for i in sorted(range(len(layers)), key=errors.__getitem__))
    return next((layer for layer in by_error if quick(partial(call.through, layer)) <= limit), None)


# -- measuring -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def call_rows(
    call: Call, site: Site, methods: Sequence[str], budget: float, seed: int, moments: Moments | None = None
) -> list[Row]:
    """One row each for `sdpa`, `eager` and every method, on one call in plain form.

    Time: median of `REPEATS` calls, all taking turns, on CUDA replays of captured graphs, beside which `launched_ms` is one
    call from Python; memory: peak of one call beside its inputs. A method that cannot
    work here is a row with the reason as `skipped`. Where `auto` finds nothing better, its row is that of `sdpa`.

    Args:
        methods: names that `parse_method` takes, or `auto`; empty for the default ones.
        budget: entries stored for a row, as a share of `Geometry.row_keys`.
    """
    place, geometry = call.query.device, site.geometry
    methods = methods or (CAUSAL_METHODS if geometry.causal else METHODS)
    work: dict[str, Callable[[], Tensor]] = {"sdpa": call.exact}
    if call.query[..., 0].numel() * call.key.shape[-2] * call.query.element_size() <= EAGER_BYTES:
        work["eager"] = partial(eager_attention, call)
    said: dict[str, Row] = {"sdpa": {"budget": 1.0}, "eager": {"budget": 1.0}}
    exact = call.exact()
    for method in methods:
        try:
            if method == "auto":
                layer = automatic(call, site, budget, seed, moments)
            else:
                layer = budgeted_layer(method, geometry, budget, seed, moments).to(place)
            if layer is None:
                said[method] = {"budget": 1.0, "chosen": "exact"}
                continue
            call.through(layer)
        except (SbpatchError, RuntimeError, MemoryError) as error:
            if not (isinstance(error, SbpatchError) or out_of_memory(error)):
                raise
            said[method] = {"budget": budget, "skipped": one_line(error)}
            continue
        said[method] = {"budget": layer.stored / geometry.row_keys}
        said[method] |= {"chosen": layer.method} if method == "auto" else {}
        work[method] = partial(call.through, layer)
    figures = _figures(work, exact, call.query_mask)
    shape = (geometry.tokens, geometry.heads, geometry.head_dim, len(call.query), geometry.causal)
    described = dict(zip(SHAPE, shape, strict=True)) | ({"queries": geometry.queries} if geometry.queries else {})
    rows = []
    for method in dict.fromkeys(("sdpa", "eager", *methods)):
        row = described | {"method": method} | said[method]
        if method in figures:
            rows.append(row | figures[method])
        elif "chosen" in row:
            rows.append(row | figures["sdpa"])
        elif "skipped" in row:
            rows.append(row)
    return with_speedups(rows)


def _figures(work: Mapping[str, Callable[[], Tensor]], exact: Tensor, real: Tensor | None) -> dict[str, Row]:
    times: dict[str, list[float]] = {name: [] for name in work}
    check_finite(exact, "the attention call", "its exact output")
    errors = {name: float(output_error(run(), exact, real).mean()) for name, run in work.items()}  # also the warm-up
    for name, error in errors.items():
        check_finite(torch.tensor(error), f"method '{name}'", "its output error")
    names, place = list(work), exact.device
    timed = {name: without_launches(run, place) for name, run in work.items()}
    for turn in range(REPEATS):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]  # each is first in turn
            times[name].append(elapsed_ms(timed[name], place)[1])
    return {
        name: {
            "ms": statistics.median(times[name]),
            "peak_memory_bytes": peak_memory_bytes(run, place),
            "output_error": errors[name],
        }
        | ({"launched_ms": elapsed_ms(run, place)[1]} if place.type == "cuda" else {})
        for name, run in work.items()
    }


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Rows of one shape, with how many times faster than SDPA and eager each is."""
    ms = {row["method"]: row["ms"] for row in rows if "ms" in row}
    against = [name for name in ("sdpa", "eager") if name in ms]
    return [
        row | ({f"speedup_vs_{name}": ms[name] / row["ms"] for name in against} if "ms" in row else {}) for row in rows
    ]


def bench(
    lengths: Sequence[int],
    methods: Sequence[str] = (),
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
) -> list[Row]:
    """The rows of `call_rows` at each length, on structured random queries, keys and values.

    Raises:
        SbpatchError: an unknown method, or a budget that is no share.
    """
    check_settings(methods, budget)
    rows = []
    for tokens in progress(lengths, "benchmark"):
        site = Site("random", "", Geometry(tokens, heads, head_dim, causal))
        q, k, v = (x.to(device, dtype) for x in clumped(batch, heads, heads, tokens, head_dim, seed))
        rows += call_rows(Call(q, k, v, is_causal=causal), site, methods, budget, seed)
    return rows
