"""One forward of a model under observation: which modules compute attention, by which call, of which shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Inputs, count, run
from . import products
from .calls import MULTI_HEAD, SDPA, Call, Redirect, multi_head_reason
from .local import declared_reach, reason
from .products import SOFTMAXES, Product

DENSE = "a dense attention mask or bias"
PRODUCTS = products.PRODUCTS | {torch.baddbmm, torch.einsum}


@dataclass(frozen=True)
class Found:
    """One attention call of a module, or one softmax that it took by hand."""

    tokens: int  # keys
    heads: int
    head_dim: int
    causal: bool = False
    unsupported: str | None = None
    by_hand: bool = False
    key_heads: int = 0  # where fewer than heads
    queries: int = 0  # where not as many as keys
    value_dim: int = 0  # where not head_dim
    reach: int | None = None  # tokens that each reads, its own counted, where not all the way (see local.py)


class Probe(Redirect):
    """Lets every attention call through as it is and notes it down for the innermost module that is running."""

    def __init__(self) -> None:
        super().__init__(self._note)
        self.running: list[nn.Module] = []
        self.found: dict[nn.Module, list[Found]] = {}
        self.samples = 0  # of the batch
        self.again = False  # a module that took its softmax by hand runs once more, its products caught
        self.products: dict[nn.Module, dict[int, int]] = {}  # entries of a matrix product -> width of its factors

    @torch.inference_mode()
    def run(self, model: nn.Module, example: Inputs) -> dict[nn.Module, list[Found]]:
        """What each module computed, in the order they were reached."""
        handles, self.samples = [], count(example)
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(lambda m, _: self.running.append(m)))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
        try:
            with self:
                run(model, example)
        finally:
            for handle in handles:
                handle.remove()
        return self.found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        module = self.running[-1] if self.running else None
        if func is MULTI_HEAD:
            self._note_multi_head(*args, **kwargs)
        if self.attending:
            return func(*args, **kwargs)
        if func in (SDPA, MULTI_HEAD) or self.again:
            result = super().__torch_function__(func, types, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if isinstance(result, Product):
            return result
        if module is not None and func in PRODUCTS:
            first = next((x for x in args if isinstance(x, Tensor)), result)
            self.products.setdefault(module, {}).setdefault(result.numel(), first.shape[-1])
        elif module is not None and func in SOFTMAXES:
            if isinstance(module, nn.Softmax) and len(self.running) > 1:
                module = self.running[-2]
            x = args[0] if args else kwargs["input"]
            self._note_softmax(module, x, args[1] if len(args) > 1 else kwargs.get("dim"))
        return result

    def _add(self, module: nn.Module, found: Found) -> None:
        """A softmax by hand counts where the module makes no attention call."""
        known = self.found.setdefault(module, [])
        if known and known[0].by_hand != found.by_hand:
            self.found[module] = [x for x in [*known, found] if not x.by_hand]
        else:
            known.append(found)

    def _attend_product(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if query.ndim == 3 and len(query) != self.samples:
            raise ValueError("heads or windows folded into the batch")  # the module is left as it is, see `_as_calls`
        return super()._attend_product(query, key, value, scale)

    def _note(self, call: Call) -> Tensor:
        q, k, v = call.query, call.key, call.value
        unsupported, causal = _unsupported(call), call.causality()
        reach = declared_reach(self.running[-1])
        if unsupported == DENSE and q.shape[-2] == k.shape[-2] and (seen := call.reach()) is not None:
            reach, causal = seen, call.looks_back()
            unsupported = reason(seen, k.shape[-2], causal)
        elif reach is not None and reach < k.shape[-2]:
            reach = None  # what it says is not so
        heads = q.shape[-3] if q.ndim > 2 else 1
        key_heads = k.shape[-3] if k.ndim > 2 and k.shape[-3] != heads else 0
        queries = 0 if q.shape[-2] == k.shape[-2] else q.shape[-2]
        width = 0 if v.shape[-1] == q.shape[-1] else v.shape[-1]
        found = Found(
            k.shape[-2], heads, q.shape[-1], bool(causal), unsupported,
            key_heads=key_heads, queries=queries, value_dim=width, reach=reach,
        )  # fmt: skip
        self._add(self.running[-1], found)
        return call.exact()

    def _note_softmax(self, module: nn.Module, x: Tensor, dim: int | None) -> None:
        """A softmax over the last dimension of what was a matrix product, as far as its size tells."""
        width = self.products.get(module, {}).get(x.numel())
        if width is None or x.ndim < 3 or dim not in (-1, x.ndim - 1):
            return
        said = f"a softmax of its own over {x.shape[-2]} x {x.shape[-1]} products, not seen to be softmax(Q K^T) V"
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager":
            said += "; load the model with attn_implementation='sdpa'"
        heads = x.shape[-3] if x.ndim > 3 else 1
        queries = 0 if x.shape[-2] == x.shape[-1] else x.shape[-2]
        self._add(module, Found(x.shape[-1], heads, width, unsupported=said, by_hand=True, queries=queries))

    def _note_multi_head(self, query: Tensor, key: Tensor, *args: Any, **options: Any) -> None:
        width, heads, _, _, bias_k, _, zero = args[1:8]
        weights = options.get("need_weights", True)
        if said := multi_head_reason(query, options.get("static_k"), bias_k, zero, weights):
            found = Found(key.shape[0], heads, width // heads, unsupported=said, by_hand=True)
            self._add(self.running[-1], found)

    # -- modules whose softmax is plain attention after all --------------------------------------------------------

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.running.pop()
        known = self.found.get(module, [])
        if not known or not known[0].by_hand or output is None or self.again:
            return
        self.again = True
        try:
            self.found[module] = self._as_calls(module, args, kwargs, output) or known
        finally:
            self.again = False

    def _as_calls(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> list[Found]:
        """The calls that a patched module would make, if they give what it gave by hand; else nothing.

        timm's modules have a switch, `fused_attn`; any other's products are looked at as they are made.
        """
        del self.found[module]
        switch = getattr(module, "fused_attn", True) is False
        if switch:
            module.fused_attn = True  # type: ignore[assignment]
        try:
            again = module(*args, **kwargs)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
        ):  # it does with a product what can only be done by hand
            return []
        finally:
            if switch:
                module.fused_attn = False  # type: ignore[assignment]
        calls = self.found.get(module, [])
        return calls if calls and not calls[0].by_hand and _same(output, again) else []


def _unsupported(call: Call) -> str | None:
    """Why a call cannot be patched, or None."""
    q, k, v = call.query, call.key, call.value
    if q.ndim != 4:
        windows = f"attention in windows of {k.shape[-2]} tokens, " if q.ndim > 4 else ""
        return f"{windows}{q.ndim}-D queries where (B, H, n, d) is meant"
    if len(k) != len(q) or q.shape[1] % k.shape[1] or v.shape[:2] != k.shape[:2]:
        return f"{k.shape[1]} key heads for {q.shape[1]} query heads"
    causal = call.causality()
    if causal is None:
        return DENSE
    queries, keys = q.shape[-2], k.shape[-2]
    if queries == 1 != keys:
        return f"1 query against {keys} keys, which it reads at less cost than any choice among them would have"
    if causal and queries != keys:
        return f"causal attention of {queries} queries against {keys} keys"
    if causal and v.shape[-1] != q.shape[-1]:
        return f"causal attention with values {v.shape[-1]} wide and queries {q.shape[-1]}"
    return None


def _same(a: Any, b: Any) -> bool:
    """Equal within the rounding of their type, one by one where they are several."""
    if isinstance(a, (tuple, list)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(_same, a, b))
    if not isinstance(a, Tensor):
        return a is b
    if not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    limit: float = torch.finfo(a.dtype).eps ** 0.5
    return bool(torch.linalg.vector_norm(a - b) <= limit * torch.linalg.vector_norm(a))
