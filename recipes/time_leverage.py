"""Time how the universal set of LevAttention is found: by exact leverage scores, in one pass over the keys, and from sketches.

    python recipes/time_leverage.py -o leverage-times

For each of `--tokens` and each way it writes to leverage-times.md (and .json) the milliseconds for one batch of keys, and how
much of the exact set it found: of its keys, and of the sum of their scores. One key in a hundred is long and in a direction of
its own, the others lie near a few centres: scores are uneven, as those of trained models are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
import torch
from torch import Tensor

from sbpatch.attention.leverage import leverage_scores, sketched_scores, stream_leverage
from sbpatch.plan.plan import versions

CENTRES, SPREAD, LONG = 32, 0.3, 4.0
CHUNK = 1024  # keys of one step of the stream
ROWS, COLUMNS = 8, 16  # of the sketches: sums for each of the d dimensions, and projections


def keys(heads: int, tokens: int, width: int, seed: int) -> Tensor:
    """(1, H, n, d) float32."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(heads, CENTRES, width, generator=generator)
    near = centres[:, torch.randint(CENTRES, (tokens,), generator=generator)]
    drawn = torch.randn(heads, tokens, width, generator=generator)
    alone = torch.rand(tokens, 1, generator=generator) < 0.01
    return torch.where(alone, LONG * drawn, near + SPREAD * drawn)[None]


def ways(k: Tensor, count: int, seed: int) -> dict[str, Callable[[], Tensor]]:
    """Each finds `count` keys of every head of k (1, H, n, d): (1, H, count)."""

    def sketched(columns: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sketched_scores(k, ROWS * k.shape[-1], columns, generator).topk(count, dim=-1).indices

    return {
        "exact": lambda: leverage_scores(k).topk(count, dim=-1).indices,
        f"one pass, chunks of {CHUNK}": lambda: stream_leverage(k.split(CHUNK, dim=-2), count),
        "sketched rows": lambda: sketched(0),
        "sketched rows and columns": lambda: sketched(COLUMNS),
    }


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The shortest of some runs, after one that is not counted."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - began))
    return min(found)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        k = keys(args.heads, tokens, args.width, args.seed)
        score, count = leverage_scores(k), min(args.keys, tokens)
        best = torch.zeros_like(score).scatter(-1, score.topk(count, dim=-1).indices, 1.0)
        for way, work in ways(k, count, args.seed).items():
            found = work()
            shared = best.gather(-1, found).mean()
            held = score.gather(-1, found).sum() / (score * best).sum()
            row = {"tokens": tokens, "way": way, "ms": milliseconds(work, args.repeats)}
            rows.append(row | {"keys": float(shared), "scores": float(held)})
            print(table(rows).splitlines()[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    cells = ((r["tokens"], r["way"], f"{r['ms']:.2f}", f"{r['keys']:.3f}", f"{r['scores']:.3f}") for r in rows)
    return results.table(("keys n", "selection", "ms", "of the exact set", "of its scores"), cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 16384, 131072], help="numbers of keys")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--keys", type=int, default=256, help="that are chosen")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("leverage-times"), help="without its suffix")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {name: x for name, x in vars(args).items() if name != "output"}
    result = {"settings": settings, "versions": versions(), "rows": run(args)}
    results.write(args.output, table(result["rows"]), result)


if __name__ == "__main__":
    main()
