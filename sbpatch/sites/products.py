"""Attention written out as matrix products, recognised on the way: softmax(Q K^T scale) V without an n x n tensor.

In place of a product Q K^T a module gets a `Product`, which is not multiplied out. Scaling, softmax and inactive dropout leave
it one, and so does a transposition; multiplied by V it is an attention call. Anything else that is done with it multiplies it
out and goes on with the tensor, so a module with a bias or a mixing of heads computes what it always did. Modules of one head
may leave its dimension out and use bmm.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, operator.matmul}
BATCHED = {torch.bmm, Tensor.bmm}
PRODUCTS = MATMULS | BATCHED
SOFTMAXES = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # q, k, v and scale -> output


@dataclass(eq=False)
class Product:
    """softmax(Q K^T scale) or, before its softmax, Q K^T scale; query and key (B, H, n, d), or (B, n, d) of one head."""

    attend: Attend
    query: Tensor
    key: Tensor
    scale: float = 1.0
    weights: bool = False  # after the softmax
    transposed: bool = False

    def tensor(self) -> Tensor:
        # a matmul or bmm would make the next Product
        logits = torch.einsum("...nd,...md->...nm", self.query, self.key) * self.scale
        found = logits.softmax(-1) if self.weights else logits
        return found.mT if self.transposed else found

    def __mul__(self, factor: Any) -> Any:
        if self.weights or not isinstance(factor, (int, float)):
            return self.tensor() * factor
        return replace(self, scale=self.scale * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        return self * (1 / divisor) if isinstance(divisor, (int, float)) else self.tensor() / divisor

    def matmul(self, other: Tensor) -> Tensor:
        if not self.weights or self.transposed or other.ndim != self.query.ndim:
            return torch.matmul(self.tensor(), other)
        return self.attend(self.query, self.key, other, self.scale)

    __matmul__ = matmul

    def rmatmul(self, other: Tensor) -> Tensor:
        """other @ self: V^T A^T is (A V)^T."""
        if not self.weights or not self.transposed or other.ndim != self.query.ndim:
            return torch.matmul(other, self.tensor())
        return replace(self, transposed=False).matmul(other.mT).mT.contiguous()

    def softmax(self, dim: int | None = None, dtype: torch.dtype | None = None, **_: Any) -> Any:
        if self.weights or self.transposed or dim not in (-1, self.query.ndim - 1) or dtype is not None:
            return torch.softmax(self.tensor(), dim if dim is not None else -1, dtype=dtype)
        return replace(self, weights=True)

    def transpose(self, first: int, second: int) -> Any:
        last = {self.query.ndim - 2, self.query.ndim - 1}
        if {first % self.query.ndim, second % self.query.ndim} != last:
            return self.tensor().transpose(first, second)
        return replace(self, transposed=not self.transposed)

    def permute(self, *order: Any) -> Any:
        places = order[0] if len(order) == 1 and isinstance(order[0], (list, tuple)) else order
        n = self.query.ndim
        if [place % n for place in places] != [*range(n - 2), n - 1, n - 2]:
            return self.tensor().permute(*order)
        return replace(self, transposed=not self.transposed)

    @property
    def mT(self) -> Any:
        return replace(self, transposed=not self.transposed)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(_whole, args), **{name: _whole(value) for name, value in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:  # shape, view, transpose, masked_fill, ...
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)


def _multiplied_out(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *others: function(self.tensor(), *others)


for _name in ("add", "sub", "neg", "getitem", "gt", "lt"):
    setattr(Product, f"__{_name}__", _multiplied_out(getattr(operator, _name)))


def product(attend: Attend, func: Any, args: Any, kwargs: Any) -> Any:
    """What `func` gives where it makes or continues a `Product`; NotImplemented where it has nothing to do with one."""
    if func in PRODUCTS and len(args) == 2 and not kwargs and all(isinstance(x, Tensor) for x in args):
        first, second = args
        heads = first.ndim == second.ndim == 4 and first.shape[:2] == second.shape[:2]
        of_keys = first.shape[-2] == second.shape[-1] or second.stride(-2) == 1  # K^T, as K lies in memory; no A V
        return Product(attend, first, second.mT) if func in BATCHED or (heads and of_keys) else NotImplemented
    given = (*args, *kwargs.values(), *(args[0] if args and isinstance(args[0], (list, tuple)) else ()))
    if not any(isinstance(x, Product) for x in given):
        return NotImplemented
    swapped = torch.compiler.is_compiling() and args and isinstance(args[0], Tensor)
    if func in MATMULS and swapped and args[1].weights and not args[1].transposed:
        args = args[::-1]  # torch.compile hands `x @ V`, where x is no tensor, over as matmul(V, x)
    first = args[0] if args else None
    if isinstance(first, Product):
        if func in PRODUCTS:
            return first.matmul(args[1])
        if func is torch.transpose or func is torch.permute:
            return getattr(first, func.__name__)(*args[1:], **kwargs)
        if func in SOFTMAXES:
            options = {name: value for name, value in kwargs.items() if name in ("dim", "dtype")}
            return first.softmax(*args[1:2], **options)
        if func is F.dropout and not (
            _argument(args, kwargs, 1, "p", 0.5) and _argument(args, kwargs, 2, "training", True)
        ):
            return first
    if func in PRODUCTS and len(args) == 2 and isinstance(args[1], Product) and isinstance(first, Tensor):
        return args[1].rmatmul(first)
    return Product.__torch_function__(func, (), args, kwargs)


def multiplied_out(output: Any) -> Any:
    """What a module puts out, in which a product that nothing was done with is none any more."""
    if type(output) is tuple:
        return tuple(map(multiplied_out, output))
    return output.tensor() if isinstance(output, Product) else output


def _whole(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return [_whole(y) for y in x]
    return x.tensor() if isinstance(x, Product) else x


def _argument(args: Any, kwargs: Any, place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)
