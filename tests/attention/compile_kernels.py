"""Compiles every Triton kernel for an H100, which needs none: prints kernel, head width and bytes of shared memory.

Run by test_kernels.py in a process of its own, as the interpreter that tests use is chosen when triton is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from sbpatch.attention.kernels import blocks, clusters, gradients, lloyd, points, rows, tiles

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
compiled: list[tuple[str, int]] = []


def type_of(argument: Any) -> str:
    if isinstance(argument, torch.Tensor):
        return TYPES[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32"


def compile_only(self: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
    """In place of a launch: as a launch would specialise, integers that are 1 or a multiple of 16 included."""
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    known = constants | {
        name: 1 for name, x in zip(self.arg_names, arguments, strict=False) if type(x) is int and x == 1
    }
    given = dict(zip(self.arg_names, arguments, strict=False))
    signature = {name: "constexpr" if name in known else type_of(given[name]) for name in self.arg_names}
    aligned = [name for name, x in given.items() if isinstance(x, torch.Tensor) or (type(x) is int and x % 16 == 0)]
    attributes = {(self.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in known}
    constexprs = {(self.arg_names.index(name),): x for name, x in known.items()}
    source = ASTSource(self, signature, constexprs, attributes)
    shared = compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared
    compiled.append((self.fn.__name__, shared))


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def launch(dtype: torch.dtype, width: int, block: int) -> None:
    """Every kernel on inputs of this dtype, head width and keys of a block, as large as fill whole programs."""
    n, m, tile, many = 1024, 128, block, 1024 // block
    q, k, v = draw(1, 4, n, width, dtype=dtype), draw(1, 2, n, width, dtype=dtype), draw(1, 2, n, width, dtype=dtype)
    mask = torch.ones(1, n, dtype=torch.bool)

    shared = draw(1, 2, m, width, dtype=dtype), draw(1, 2, m, width, dtype=dtype), draw(1, 2, m)
    points.attend_points(q, *shared, 0.1)

    mean, keys = blocks.stretch_means(k, mask, block, 2, 4, 1.0)
    exact = blocks.best_blocks(mean, mean, keys, 2, tile, tile, block)
    key, value = (x.unflatten(2, (many, block)) for x in (k, v))
    own = blocks.block_points(mean, key, value, mask, exact, tile, tile, 4)
    of_blocks = q, k, v, mask, exact, *own, draw(2), 0.1, tile, tile, 4, block
    rows.attend_blocks(*of_blocks)
    if width == 256:  # of narrower heads they need less
        gradients.of_blocks(q, q, *of_blocks)

    query, listed = torch.arange(n).view(-1, tile), torch.zeros(1, 2, n // tile, 192, dtype=torch.int64)
    valid, counts = torch.ones(1, 2, n // tile, tile, 192, dtype=torch.bool), torch.full((n // tile,), many)
    tiles.attend_tiles(q, k, v, query, query, listed, valid, mask, *own, counts, 0.1, True)

    centre = draw(1, 2, m, width)
    clusters.nearest_centre(k, centre)
    clusters.cluster_sums(k, v, torch.zeros(1, 2, n, dtype=torch.int64), mask, m)
    if lloyd.fits(k, m):
        lloyd.assigned_sums(k, v, centre, mask)
        lloyd.lloyd_step(k, centre, mask, n)


if __name__ == "__main__":
    JITFunction.run = compile_only  # type: ignore[method-assign]
    for width, block in ((128, 256), (256, 64)):  # which need the most memory of each size of program
        compiled.clear()
        launch(torch.float32, width, block)
        for name, size in sorted(set(compiled)):
            print(name, width, size, flush=True)
