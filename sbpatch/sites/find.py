"""Find the attention sites of a model.

A site is the innermost module whose forward calls `F.scaled_dot_product_attention`, nn.MultiheadAttention included. Modules
that take the softmax of a matrix product themselves are found too, and reported with the reason why they stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from ..attention import Geometry
from ..data.batch import Inputs
from ..errors import SbpatchError, one_line
from . import interface
from .probe import Found, Probe


@dataclass(frozen=True)
class Site:
    """One place where softmax attention is computed, as a probe forward met it."""

    name: str
    class_name: str
    geometry: Geometry
    unsupported: str | None = None  # why it cannot be patched, or None
    by_hand: bool = False  # a softmax of the module's own, that cannot be had as a call
    reach: int | None = None  # tokens that each reads, its own counted: longer sequences are read locally

    @property
    def local(self) -> bool:
        """Whether its tokens read their neighbours alone, at the length of the probe."""
        return self.reach is not None and self.reach < self.geometry.tokens


def find_sites(model: nn.Module, example: Inputs) -> list[Site]:
    """Run `model` on `example` once, in evaluation mode, and list its attention sites in the order they are reached.

    Raises:
        SbpatchError: the model does not run, or computes no attention, so that there is nothing to patch; or it is patched.
    """
    if any(hasattr(module, "sbpatch") for module in model.modules()):
        raise SbpatchError(f"{type(model).__name__} is patched already; call unpatch first")
    names = {module: name for name, module in model.named_modules()}
    training = [module for module in names if module.training]
    interface.admit(model)
    try:
        found = Probe().run(model.eval(), example)
    except SbpatchError:
        raise
    except Exception as error:  # of the model's own code, for values of its configuration
        raise SbpatchError(
            f"{type(model).__name__} does not run on an input of its own size: {one_line(error)}"
        ) from error
    finally:
        interface.dismiss(model)
        for module in training:
            module.training = True
    if not found:
        raise SbpatchError(
            f"no attention found in {type(model).__name__}: nothing in it calls scaled_dot_product_attention or takes the "
            "softmax of a matrix product, so there is nothing to patch"
        )
    tensors = [example] if isinstance(example, Tensor) else example.values()
    image = next((tuple(x.shape[-2:]) for x in tensors if x.ndim == 4), None)
    return [_site(names[module], module, calls, image) for module, calls in found.items()]


def _site(name: str, module: nn.Module, calls: list[Found], image: tuple[int, ...] | None) -> Site:
    first = calls[0]
    reason = first.unsupported
    if len(calls) > 1 and reason is None:
        reason = f"{len(calls)} attention calls in one forward, which one setting cannot describe"
    grid, prefix = (None, 0) if image is None else _grid(first.tokens, *image)
    geometry = Geometry(
        first.tokens, first.heads, first.head_dim, first.causal, grid, prefix, 0 if reason else first.key_heads,
        first.queries, first.value_dim,
    )  # fmt: skip
    return Site(name, type(module).__name__, geometry, reason, first.by_hand, first.reach)


def _grid(tokens: int, height: int, width: int) -> tuple[tuple[int, int] | None, int]:
    """Rows, columns and class tokens of an image's tokens: the grid of the image's shape with the fewest extra tokens."""
    for prefix in range(min(tokens, 9)):
        rows = math.isqrt((tokens - prefix) * height // width)
        if rows and rows * rows * width == (tokens - prefix) * height and (tokens - prefix) % rows == 0:
            return (rows, (tokens - prefix) // rows), prefix
    return None, 0
