"""The Triton kernels against their plain forms: by Triton's interpreter on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (sbpatch[gpu])")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from sbpatch.attention import Geometry, Scatterbrain, kernels  # noqa: E402
from sbpatch.attention.kernels import blocks, clusters, gradients, lloyd, plain, points, rows, tiles  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on log 0

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TWO = DTYPES[:2]  # where float16 goes through the same code as bfloat16
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}  # of the largest number, a few roundings


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def some(*shape: int) -> Tensor:
    """A mask that is mostly true."""
    return (torch.rand(shape) > 0.3).to(DEVICE)


def assert_close(found: Any, expected: Any, dtype: torch.dtype) -> None:
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for one, other in pairs:
        assert one.shape == other.shape
        finite = other.isfinite()
        assert one.isfinite().equal(finite)
        scale = other[finite].abs().max().clamp(min=1)
        assert (one[finite].double() - other[finite].double()).abs().max() <= CLOSE[dtype] * scale


# -- tiles with lists of keys ----------------------------------------------------------------------------------------


def tile_arguments(
    dtype: torch.dtype, causal: bool, by_query: bool, masked: bool, points: int, group: int
) -> tuple[Any, ...]:
    batch, key_heads, n, d, e, size, listed = 2, 2, 43, 24, 40, 16, 21
    many = -(-n // size)
    query = torch.arange(many * size, device=DEVICE).clamp(max=n - 1).view(many, size)
    place = query.masked_fill(torch.arange(many * size, device=DEVICE).view(many, size) >= n, n)
    key = torch.stack([torch.randperm(n)[:listed] for _ in range(batch * key_heads * many)])
    key = key.view(batch, key_heads, many, listed).to(DEVICE)
    return (
        draw(batch, group * key_heads, n, d, dtype=dtype), draw(batch, key_heads, n, d, dtype=dtype),
        draw(batch, key_heads, n, e, dtype=dtype), query, place, key,
        some(batch, key_heads, many, size if by_query else 1, listed), some(batch, n) if masked else None,
        draw(batch, key_heads, many, points, d, dtype=dtype) if points else None,
        draw(batch, key_heads, many, points, e, dtype=dtype) if points else None,
        draw(batch, key_heads, many, points) if points else None,
        torch.tensor([0, points, points // 2], device=DEVICE) if points else None, d**-0.5, causal,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("causal", "by_query", "masked", "points", "group"),
    [(False, False, False, 0, 1), (True, False, True, 9, 2), (False, True, True, 0, 3), (True, True, False, 70, 1)],
)
def test_tiles(dtype: torch.dtype, causal: bool, by_query: bool, masked: bool, points: int, group: int) -> None:
    arguments = tile_arguments(dtype, causal, by_query, masked, points, group)
    assert_close(tiles.attend_tiles(*arguments), plain.attend_tiles(*arguments), dtype)


def test_tiles_of_queries_and_keys_of_different_numbers() -> None:
    arguments = list(tile_arguments(torch.float32, False, False, True, 9, 2))
    arguments[1], arguments[2], arguments[7] = draw(2, 2, 71, 24), draw(2, 2, 71, 40), some(2, 71)
    arguments[5] = torch.stack([torch.randperm(71)[:21] for _ in range(12)]).view(2, 2, 3, 21).to(DEVICE)
    found = tiles.attend_tiles(*arguments)
    assert found.shape == (2, 4, 43, 40)
    assert_close(found, plain.attend_tiles(*arguments), torch.float32)


def test_a_query_without_keys_gets_zeros() -> None:
    arguments = list(tile_arguments(torch.float32, False, False, False, 0, 1))
    arguments[6] = torch.zeros_like(arguments[6])
    assert tiles.attend_tiles(*arguments).eq(0).all()


def test_extreme_logits_neither_overflow_nor_lose_the_largest_key() -> None:
    arguments = list(tile_arguments(torch.float32, True, False, False, 9, 2))
    arguments[0] = 300 * arguments[0]
    found = tiles.attend_tiles(*arguments)
    assert found.isfinite().all()
    assert (found - plain.attend_tiles(*arguments)).abs().max() < 2e-3  # logits of a thousand are rounded to 1e-4


# -- blocks of the past ----------------------------------------------------------------------------------------------

TILE, NEAR, BLOCK, FIRST = 32, 16, 16, 4


def block_arguments(dtype: torch.dtype, masked: bool, d: int = 24, e: int = 40) -> tuple[Any, ...]:
    """q, k, v, mask, the mean queries and the blocks of keys and values, of grouped heads and a ragged length."""
    n, many = 7 * TILE - 5, 7
    count = ((many - 1) * TILE - NEAR) // BLOCK
    q, k, v = draw(2, 4, n, d, dtype=dtype), draw(2, 2, n, d, dtype=dtype), draw(2, 2, n, e, dtype=dtype)
    mask = some(2, n) if masked else None
    if mask is not None:
        mask[0, BLOCK : 2 * BLOCK] = False  # a block without keys
    key, value = (x[:, :, : count * BLOCK].unflatten(2, (count, BLOCK)) for x in (k, v))
    return q, k, v, mask, draw(2, 2, many, d), key, value


@pytest.mark.parametrize("dtype", TWO)
@pytest.mark.parametrize("masked", [False, True])
def test_means_of_stretches(dtype: torch.dtype, masked: bool) -> None:
    x, mask = draw(2, 6, 45, 24, dtype=dtype), some(2, 48) if masked else None
    for heads, first in ((6, 0), (2, 4)):
        arguments = (x, mask, 16, heads, first, 0.3)
        assert_close(blocks.stretch_means(*arguments), plain.stretch_means(*arguments), torch.float32)


@pytest.mark.parametrize("masked", [False, True])
def test_best_blocks_are_those_of_the_largest_scores(masked: bool) -> None:
    *_, mask, about, key, _ = block_arguments(torch.float32, masked)
    mean, keys = plain.stretch_means(key.flatten(2, 3), mask, BLOCK, 2, FIRST, 1.0)
    found = blocks.best_blocks(about, mean, keys, 3, TILE, NEAR, BLOCK)
    count = mean.shape[2]
    start = TILE * torch.arange(about.shape[2], device=DEVICE)
    open_ = torch.arange(count, device=DEVICE) < ((start - NEAR).clamp(min=0) // BLOCK)[:, None]
    score = (about @ mean.mT).masked_fill(~(open_ & (keys > 0)[:, None, None]), -torch.inf)
    best, index = score.topk(3)
    assert found.equal(index.masked_fill(best == -torch.inf, count))


@pytest.mark.parametrize("dtype", TWO)
@pytest.mark.parametrize("masked", [False, True])
def test_points_and_attention_of_blocks(dtype: torch.dtype, masked: bool) -> None:
    q, k, v, mask, about, key, value = block_arguments(dtype, masked)
    mean, keys = plain.stretch_means(key.flatten(2, 3), mask, BLOCK, 2, FIRST, 1.0)
    exact = blocks.best_blocks(about, mean, keys, 2, TILE, NEAR, BLOCK)
    arguments = (about, key, value, mask, exact, TILE, NEAR, FIRST)
    found, expected = blocks.block_points(*arguments), plain.block_points(*arguments)
    used = expected[2] > -torch.inf
    start = TILE * torch.arange(about.shape[2], device=DEVICE)
    reachable = torch.arange(used.shape[-1], device=DEVICE) < ((start - NEAR).clamp(min=0) // BLOCK)[:, None]
    assert ((found[2] > -torch.inf) & reachable).equal(used)
    for one, other in zip(found, expected, strict=True):
        assert_close(one[used], other[used], dtype)
    for gain in (None, draw(2)):
        call = (q, k, v, mask, exact, *expected, gain, 0.2, TILE, NEAR, FIRST, BLOCK)
        assert_close(rows.attend_blocks(*call), plain.attend_blocks(*call), dtype)


@pytest.mark.parametrize("dtype", TWO)
@pytest.mark.parametrize("many", [50, 300])  # that a program holds, and that it does not
def test_points_that_all_rows_share(dtype: torch.dtype, many: int) -> None:
    call = (
        draw(2, 4, 150, 24, dtype=dtype), draw(2, 2, many, 24, dtype=dtype), draw(2, 2, many, 40, dtype=dtype),
        draw(2, 2, many), 0.2,
    )  # fmt: skip
    call[3][:, :, ::3] = -torch.inf  # of clusters without keys
    assert_close(points.attend_points(*call), plain.attend_points(*call), dtype)


# -- clusters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TWO)
def test_nearest_centre(dtype: torch.dtype) -> None:
    k, centre = draw(2, 3, 300, 24, dtype=dtype), draw(2, 3, 70, 24)
    index, score, square = clusters.nearest_centre(k, centre)
    centre = centre.to(dtype).float()
    level = k.float() @ centre.mT - centre.square().sum(-1)[:, :, None] / 2
    assert_close(score, level.amax(-1), torch.float32)
    assert_close(level.gather(-1, index[..., None]).squeeze(-1), level.amax(-1), torch.float32)
    assert_close(square, k.float().square().sum(-1), torch.float32)


@pytest.mark.parametrize("dtype", TWO)
@pytest.mark.parametrize("masked", [False, True])
def test_cluster_sums_are_the_same_bits_on_every_run(dtype: torch.dtype, masked: bool) -> None:
    k, v, index = draw(2, 3, 600, 24, dtype=dtype), draw(2, 3, 600, 40, dtype=dtype), torch.randint(70, (2, 3, 600))
    mask = some(2, 600) if masked else None
    for more in (None, v):
        call = (k, more, index.to(DEVICE), mask, 70)
        found = clusters.cluster_sums(*call)
        assert_close(found, plain.cluster_sums(*call), torch.float32)
        again = clusters.cluster_sums(*call)
        assert all(one.equal(other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", TWO)
@pytest.mark.parametrize("masked", [False, True])
def test_keys_are_assigned_and_summed_in_one_reading(dtype: torch.dtype, masked: bool) -> None:
    k, v, centre = draw(2, 3, 600, 24, dtype=dtype), draw(2, 3, 600, 40, dtype=dtype), draw(2, 3, 70, 24, dtype=dtype)
    centre[:, :, 3] = centre[:, :, 2]  # of two that are as near the first is taken
    mask, centre = some(2, 600) if masked else None, centre.float()
    index, *found = lloyd.assigned_sums(k, v, centre, mask)
    level = k.float() @ centre.mT - centre.square().sum(-1)[:, :, None] / 2
    assert_close(level.gather(-1, index[..., None]).squeeze(-1), level.amax(-1), torch.float32)
    assert not index.eq(3).any()
    assert_close(tuple(found), plain.cluster_sums(k, v, index, mask, 70), torch.float32)
    again = lloyd.assigned_sums(k, v, centre, mask)
    assert all(one.equal(other) for one, other in zip((index, *found), again, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_a_lloyd_step_moves_centres_to_means_and_idle_ones_to_far_keys(masked: bool) -> None:
    k, centre = draw(2, 3, 300, 24), draw(2, 3, 20, 24)
    centre[:, :, [4, 9]] = 100.0  # no key is near
    centre[:, :, 7] = centre[:, :, 6]
    mask = some(2, 300) if masked else None
    found = lloyd.lloyd_step(k, centre, mask, 300)
    distance, index = (k[..., None, :] - centre[:, :, None]).square().sum(-1).min(-1)
    total, count = plain.cluster_sums(k, None, index, mask, 20)
    empty = count == 0
    assert empty.sum(-1).min() >= 3
    far = (distance if mask is None else distance * mask[:, None]).topk(20).indices
    turn = (empty.cumsum(-1) - 1).clamp(min=0)
    moved = k.gather(2, far.gather(-1, turn)[..., None].expand(-1, -1, -1, 24))
    assert_close(found, torch.where(empty[..., None], moved, total / count[..., None]), torch.float32)


def test_a_lloyd_step_may_see_keys_at_even_strides_alone() -> None:
    k, centre = draw(2, 3, 300, 24), draw(2, 3, 20, 24)
    centre[:, :, 4] = 100.0
    seen = k[:, :, (2 * torch.arange(77) + 1) * 300 // 154]
    assert lloyd.lloyd_step(k, centre, None, 77).equal(lloyd.lloyd_step(seen, centre, None, 77))


# -- gradients -------------------------------------------------------------------------------------------------------


def assert_gradients_close(kernel: Any, reference: Any, arguments: Sequence[Any]) -> None:
    """Gradients of a random sum of the outputs, for every floating-point argument, by the kernels and by autograd."""
    found = []
    for function in (kernel, reference):
        inputs = [
            x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
        ]
        out, wanted = function(*inputs), [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        torch.manual_seed(1)
        weight = draw(*out.shape, dtype=out.dtype)
        found.append(torch.autograd.grad(out, wanted, weight))
    assert_close(*found, arguments[0].dtype)


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "GRADIENTS", True)


@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("causal", "by_query", "masked", "points", "group"),
    [(False, False, False, 0, 1), (True, False, True, 9, 2), (False, True, True, 0, 3), (True, True, False, 70, 5)],
)
def test_gradients_of_tiles(
    dtype: torch.dtype, causal: bool, by_query: bool, masked: bool, points: int, group: int
) -> None:
    arguments = tile_arguments(dtype, causal, by_query, masked, points, group)
    assert_gradients_close(tiles.attend_tiles, plain.attend_tiles, arguments)


@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)])
def test_gradients_of_blocks(dtype: torch.dtype, masked: bool) -> None:
    q, k, v, mask, about, key, value = block_arguments(dtype, masked)
    mean, keys = plain.stretch_means(key.flatten(2, 3), mask, BLOCK, 2, FIRST, 1.0)
    exact = blocks.best_blocks(about, mean, keys, 2, TILE, NEAR, BLOCK)
    points = plain.block_points(about, key, value, mask, exact, TILE, NEAR, FIRST)
    gain = draw(2) if masked else None
    call = (q, k, v, mask, exact, *points, gain, 0.2, TILE, NEAR, FIRST, BLOCK)
    assert_gradients_close(rows.attend_blocks, plain.attend_blocks, call)


@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize(  # one program goes through all tiles, or each through one
    ("dtype", "programs"), [(torch.float32, 1), (torch.float32, 64), (torch.bfloat16, 1), (torch.float16, 64)]
)
def test_gradients_of_points_that_all_rows_share(
    dtype: torch.dtype, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "PROGRAMS", programs)
    call = (
        draw(2, 4, 300, 24, dtype=dtype), draw(2, 2, 70, 24, dtype=dtype), draw(2, 2, 70, 40, dtype=dtype), draw(2, 2, 70), 0.2,
    )  # fmt: skip
    call[3][:, :, ::3] = -torch.inf  # of clusters without keys
    assert_gradients_close(points.attend_points, plain.attend_points, call)


@pytest.mark.usefixtures("by_kernels")
def test_extreme_and_missing_logits_have_finite_gradients() -> None:
    arguments = list(tile_arguments(torch.float32, False, False, False, 9, 2))
    arguments[0] = 300 * arguments[0]
    arguments[6][:, :, 0], arguments[10][:, :, 0] = False, -torch.inf  # a tile that reads nothing
    arguments[0].requires_grad_()
    (found,) = torch.autograd.grad(tiles.attend_tiles(*arguments).sum(), arguments[0])
    assert found.isfinite().all()
    assert found[:, :, :16].eq(0).all()


# -- whole layers ----------------------------------------------------------------------------------------------------

LAYERS: list[tuple[str, dict[str, int], bool, int]] = [  # method, parameters, causal, key heads of four
    ("blocks", {"near": 16, "block": 16, "blocks": 2, "tile": 16}, True, 2),
    ("blocks", {"near": 8, "block": 8, "blocks": 1, "tile": 16, "first": 0}, True, 4),  # too short for matrix units
    ("blocks", {"near": 64, "block": 64, "blocks": 0, "tile": 64}, True, 2),  # hardly any block
    ("clusters", {"rank": 9}, False, 4),
    ("local+clusters", {"side": 8, "tile": 16, "rank": 9}, False, 2),
    ("local", {"side": 8, "tile": 16}, True, 4),
    ("sinks", {"window": 9}, True, 4),
    ("coreset", {"rank": 9}, False, 4),
]


def layer_and_call(method: str, parameters: dict[str, int], causal: bool, key_heads: int, dtype: torch.dtype) -> Any:
    n = 75
    site = Geometry(n, 4, 24, causal, key_heads=key_heads if key_heads < 4 else 0)
    layer = Scatterbrain(method, site, 0, **parameters).to(DEVICE)
    return layer, [draw(2, heads, n, 24, dtype=dtype) for heads in (4, key_heads, key_heads)]


def chosen_everywhere(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    """Whether kernels compute, wherever the tensors lie."""
    monkeypatch.setattr(kernels, "chosen", lambda x: yes and x.shape[-1] <= kernels.WIDEST)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("method", "parameters", "causal", "key_heads"), LAYERS)
def test_layers_compute_the_same_by_kernels(
    method: str, parameters: dict[str, int], causal: bool, key_heads: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, call = layer_and_call(method, parameters, causal, key_heads, torch.float32)
    mask = some(2, call[0].shape[2]) if masked else None
    if mask is not None:
        mask[:, 0] = True  # a causal row needs a key
    found = []
    for yes in (False, True):
        chosen_everywhere(monkeypatch, yes)
        found.append(layer(*call, mask))
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


@pytest.mark.parametrize("by_kernels", [False, True])
@pytest.mark.parametrize(("method", "parameters", "causal", "key_heads"), LAYERS)
def test_gradients_are_those_of_the_plain_form(
    method: str,
    parameters: dict[str, int],
    causal: bool,
    key_heads: int,
    by_kernels: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "GRADIENTS", by_kernels)
    layer, call = layer_and_call(method, parameters, causal, key_heads, torch.float32)
    found = []
    for yes in (False, True):
        chosen_everywhere(monkeypatch, yes)
        inputs = [x.clone().requires_grad_() for x in call]
        found.append(torch.autograd.grad(layer(*inputs).square().sum(), inputs))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "parameters", "causal", "key_heads"), LAYERS[:1] + LAYERS[3:5])
def test_compiled_layers_see_the_kernels_as_operators(
    method: str, parameters: dict[str, int], causal: bool, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, call = layer_and_call(method, parameters, causal, key_heads, torch.float32)
    chosen_everywhere(monkeypatch, True)
    expected = layer(*call)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert (compiled(*call) - expected).norm() <= 1e-5 * expected.norm()
    torch.compiler.reset()


@pytest.mark.slow
def test_all_kernels_compile_for_an_h100_and_fit_its_shared_memory() -> None:
    """In a process of its own: the interpreter, once chosen, cannot compile."""
    script = Path(__file__).with_name("compile_kernels.py")
    root = str(script.parents[2])
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": root}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line.split() for line in done.stdout.splitlines()]
    written = {name for path in Path(kernels.__file__).parent.glob("*.py") for name in launched(path)}
    assert {name for name, *_ in found} == written - {"_shared", "_assigned", "_moved"}  # wide ones go another way
    for name, width, size in found:
        assert int(size) <= kernels.SHARED_KIB << 10, (name, width)


def launched(path: Path) -> list[str]:
    """Names of the kernels that a module launches."""
    return re.findall(r"^ +(_\w+)\[.*\]\(", path.read_text(encoding="utf-8"), flags=re.M)


def test_what_the_kernels_cannot_take_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    kernels._reason.cache_clear()
    kernels._say.cache_clear()
    x = torch.empty(1, 1, 4, 300, device=DEVICE)
    for _ in range(2):
        assert not kernels.chosen(x)
    assert len(caplog.records) == (1 if DEVICE == "cuda" else 0)  # on a CPU there is nothing to choose
