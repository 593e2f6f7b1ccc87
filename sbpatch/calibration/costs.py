"""What one attention call costs on this device: milliseconds, measured once and kept in a file.

A patch that is not faster than exact attention is no gain, and how fast it is depends on the device and not on the model's
weights. So the times are measured on structured random inputs of the site's shape, each layer once a device, and the same
table gives the same plan.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .. import processes
from ..attention import PARTS, Geometry, Scatterbrain
from ..attention.per_head import Exact, Layer
from ..errors import SbpatchError, one_line, system_reason
from ..measure import elapsed_ms, without_launches
from ..reading import read_json
from ..version import __version__
from ..writing import check_target, written_whole

RUNS = 3  # of which the least counts, the first one warms up: what else the machine does only adds to it
ROWS = 1 << 14  # query rows of all heads in a timed call, at most; 8 samples at most
LEAST = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # shares of a row's keys that the cheapest patch reads: the first that can be had
CLEAR = 1.5  # times faster than exact attention: what is so in its second run is not run again
TOO_SLOW = 1.5  # times slower: larger layers of the same method and split are not measured
PAYS = 0.9  # of exact attention's time: what a patch must take at most, or the noise of timing decides


class CostTable:
    """Milliseconds a sample of a site's attention, exact or by a layer, by device and shape.

    `path` None keeps it in memory. A table that was given holds what it holds: what is missing is measured and added. Of
    several processes the first one measures and writes, while the others wait.

    Raises:
        SbpatchError: the file is not such a table, or cannot be written.
    """

    def __init__(self, path: Path | None, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.path, self.device, self.dtype = path, device, dtype
        self.rows: dict[str, float] = processes.from_first(lambda: _read(path))

    def exact_ms(self, site: Geometry) -> float:
        """Exact attention of one sample, all heads."""
        key = self._key("exact", site)
        if key not in self.rows:
            exact = Exact(site)
            q, k, v = _inputs(site, self.device, self.dtype)
            self.rows[key] = self._measured(lambda: exact(q, k, v), len(q))
            self._write()
        return self.rows[key]

    def ms(self, layer: Layer) -> float:
        """The layer's attention of one sample, all heads of its site."""
        site = layer.site
        if layer.method == "exact":
            return self.exact_ms(site)
        parameters = " ".join(f"{name}={value}" for name, value in sorted(layer.parameters_used.items()))
        key = self._key(f"{layer.method} {parameters}", site)
        if key not in self.rows:
            exact = self.exact_ms(site)
            q, k, v = _inputs(site, self.device, self.dtype)
            self.rows[key] = self._measured(lambda: layer(q, k, v), len(q), exact)
            self._write()
        return self.rows[key]

    def pays(self, layer: Layer) -> bool:
        """Whether the layer is faster than exact attention."""
        return self.ms(layer) < PAYS * self.exact_ms(layer.site)

    def too_slow(self, layer: Layer) -> bool:
        """Whether it is so much slower than exact attention that a larger one need not be measured."""
        return self.ms(layer) > TOO_SLOW * self.exact_ms(layer.site)

    def cheapest(self, site: Geometry) -> Layer | None:
        """About the least that any method does at a site: where this does not pay, nothing will. None: no such small one."""
        method = "blocks" if site.causal else "clusters"
        sizes = (PARTS[method].sized(max(2.0, share * site.row_keys), site) for share in LEAST)
        size = next((size for size in sizes if size is not None), None)
        return None if size is None else Scatterbrain(method, site, 0, **size).to(self.device)

    def _measured(self, work: Callable[[], Tensor], samples: int, exact: float | None = None) -> float:
        """Milliseconds a sample; of what takes far less than `exact` in fewer runs."""

        def least() -> float:
            timed, found = without_launches(work, self.device), math.inf
            for run in range(1, RUNS + 1):
                found = min(found, elapsed_ms(timed, self.device)[1] / samples)
                if exact and run > 1 and found < exact / CLEAR:
                    break
            return found

        return processes.from_first(least)

    def _key(self, what: str, site: Geometry) -> str:
        heads = f"{site.heads}/{site.key_heads}" if site.key_heads else f"{site.heads}"
        grid = f" grid={site.prefix}+{site.grid[0]}x{site.grid[1]}" if site.grid is not None and "2d" in what else ""
        causal = " causal" if site.causal else ""
        shape = f"{site.tokens} x {heads} x {site.head_dim}"
        shape += f" queries={site.queries}" if site.queries else ""
        shape += f" values={site.value_dim}" if site.value_dim else ""
        return f"{device_key(self.device, self.dtype)}: {shape}{causal}{grid}: {what}"

    def _write(self) -> None:
        if self.path is None or not processes.is_first():
            return
        rows = {"ms": dict(sorted(self.rows.items()))}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(check_target(self.path), sync=False) as fresh:
                fresh.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        except (OSError, SbpatchError) as error:
            raise SbpatchError(
                f"cannot write the cost table {self.path}: {system_reason(error)}; name another by --cost-table"
            ) from error


def _read(path: Path | None) -> dict[str, float]:
    """The rows of a table's file; none where there is no file."""
    try:
        if path is None or not (path.exists() or path.is_symlink()):
            return {}
        found = read_json(path, "cost table")
        rows = {str(key): float(ms) for key, ms in found["ms"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, SbpatchError) as error:
        raise SbpatchError(
            f"{path} is not a cost table ({one_line(error)}): remove it, or name another by --cost-table"
        ) from None
    if any(not 0 < ms < float("inf") for ms in rows.values()):
        raise SbpatchError(f"cost table {path} has times that are not positive numbers: remove it and measure again")
    return rows


def default_path() -> Path:
    """Where the table of this machine is kept: in the user's cache directory (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "sbpatch" / "costs.json"


def device_key(device: torch.device, dtype: torch.dtype) -> str:
    """A device as far as times depend on it: its name and threads, the versions of what computes, the dtype."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {platform.machine()} {torch.get_num_threads()} threads"
    return f"{name} torch {torch.__version__} sbpatch {__version__} {str(dtype).removeprefix('torch.')}"


@lru_cache(maxsize=1)  # one site's layers are measured after each other
def _inputs(site: Geometry, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a few samples."""
    batch = max(1, min(8, ROWS // (site.rows * site.heads)))
    key_heads = site.heads // site.group
    q, k, v = clumped(
        batch, site.heads, key_heads, site.tokens, site.head_dim, queries=site.queries, value_dim=site.value_dim
    )
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def clumped(
    batch: int,
    heads: int,
    key_heads: int,
    tokens: int,
    head_dim: int,
    seed: int = 0,
    *,
    queries: int = 0,
    value_dim: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries (B, H, n, d), keys and values (B, H_k, n, d), the latter in 64 clumps as those of trained models are.

    `queries` and `value_dim`, where not 0: as many queries in place of n, values as wide in place of d.
    """
    generator = torch.Generator().manual_seed(seed)
    clump = 1.5 * torch.randn(batch, key_heads, 64, head_dim, generator=generator)
    member = torch.randint(64, (batch, key_heads, tokens, 1), generator=generator).expand(-1, -1, -1, head_dim)
    q, k, v = (
        torch.randn(batch, *shape, generator=generator)
        for shape in (
            (heads, queries or tokens, head_dim),
            (key_heads, tokens, head_dim),
            (key_heads, tokens, value_dim or head_dim),
        )
    )
    shared = clump.gather(2, member)
    repeats = -(-v.shape[-1] // head_dim)  # of a clump, in values that are wider than keys
    return q, 0.5 * k + shared, v + shared.repeat(1, 1, 1, repeats)[..., : v.shape[-1]]
