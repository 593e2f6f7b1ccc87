"""What the Triton kernels share: products of any dtype, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import kernels

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """a (M, K) @ b (K, N) + accumulator (M, N), float32. "upcast": Triton's interpreter has no bfloat16 product."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def online(accumulator, top, total, logits, scale, value, PRECISION: tl.constexpr):
    """Online softmax: merge logits (M, N), once scaled in units of ln 2, and value (N, E) into the sums, kept times 2^-top."""
    highest = tl.maximum(top, tl.max(logits, 1) * scale)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(logits * scale - shift[:, None])
    fade = tl.exp2(top - shift)
    accumulator = product(weight.to(value.dtype), value, accumulator * fade[:, None], PRECISION)
    return accumulator, highest, total * fade + tl.sum(weight, 1)


@triton.jit
def seen_keys(
    key, valid, mask, column, slot, at, live, many, key_l, valid_g, valid_l,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, BY_QUERY: tl.constexpr,
):  # fmt: skip
    """Keys (N) at some columns of a tile's list of `many`, and which rows read them, (M or 1, N).

    slot, at: where a row lies in its tile and in the sequence, (M).
    """
    inside = column < many
    index = tl.load(key + column * key_l, mask=inside, other=0).to(tl.int32)
    keep = inside
    if not BY_QUERY:
        keep = keep & (tl.load(valid + column * valid_l, mask=inside, other=0) != 0)
    if MASKED:
        keep = keep & (tl.load(mask + index) != 0)
    seen = keep[None, :]
    if BY_QUERY:
        pairs = valid + slot[:, None] * valid_g + column[None, :] * valid_l
        seen = seen & (tl.load(pairs, mask=live[:, None] & inside[None, :], other=0) != 0)
    if CAUSAL:
        seen = seen & (index[None, :] <= at[:, None])
    return index, seen


def precision(dtype: torch.dtype) -> str:
    """How products of this dtype are formed: float32 by three passes of the matrix units, which lose nothing that counts."""
    if triton.knobs.runtime.interpret:
        return "upcast"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def padded(width: int) -> int:
    """The size of a tile that holds so many rows or columns: a power of two, at least 16 for the matrix units."""
    return max(16, triton.next_power_of_2(width))


def stages(row: int) -> int:
    """Steps of a loop over keys whose loads are under way at once, by the bytes of a row: what shared memory has room for."""
    return 3 if row <= 256 else 2 if row <= 512 else 1


def plain_rows(x: Tensor) -> Tensor:
    """x (B, H, n, d), copied only where a row has gaps or lies too far from the first one for 32 bits."""
    return x if x.stride(-1) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def operator(
    name: str, fake: Callable[..., Any], plain: Callable[..., Any] | None, gradients: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operator that compilation and export see as one: its shapes by `fake`, gradients by `plain`,
    or where `GRADIENTS` says so by `gradients`, a function of the output's gradient, the output and the operator's inputs.

    Where neither is at work the function is called as it is, which saves the dispatch, longer than a small kernel runs.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        registered = torch.library.custom_op(f"sbpatch::{name}", function, mutates_args=())
        registered.register_fake(fake)
        if plain is not None:
            _differentiable(registered, plain, gradients)

        @wraps(function)
        def call(*args: Any) -> Any:
            grad = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
            return registered(*args) if grad or torch.compiler.is_compiling() else function(*args)

        return call

    return decorate


def _differentiable(operator: Any, plain: Callable[..., Any], gradients: Callable[..., Any] | None) -> None:
    """Give an operator gradients that the backward pass computes anew from the operator's inputs."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.fast = gradients is not None and kernels.GRADIENTS
        ctx.save_for_backward(*(x for x in (*inputs, *([output] if ctx.fast else [])) if isinstance(x, Tensor)))
        ctx.rest = tuple(None if isinstance(x, Tensor) else (x,) for x in inputs)  # None: a tensor

    def backward(ctx: Any, *of_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if one is None else one[0] for one in ctx.rest]
        if ctx.fast and gradients is not None:
            return tuple(gradients(*of_outputs, next(saved), *inputs))
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        found = dict(zip(wanted, _of_plain(plain, inputs, wanted, of_outputs), strict=True))
        return tuple(found.get(i) for i in range(len(inputs)))

    operator.register_autograd(backward, setup_context=keep)


def _of_plain(
    plain: Callable[..., Any], inputs: list[Any], wanted: list[int], of_outputs: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Gradients of the wanted inputs of a plain form, from those of its outputs."""
    with torch.enable_grad():
        inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        for i in wanted:
            inputs[i].requires_grad_()
        outputs = plain(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(x, of) for x, of in zip(outputs, of_outputs, strict=True) if of is not None and x.requires_grad]
        known, of_known = zip(*pairs, strict=True)
        return torch.autograd.grad(known, [inputs[i] for i in wanted], of_known, allow_unused=True)
