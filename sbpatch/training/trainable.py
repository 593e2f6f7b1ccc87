"""Which weights of a patched model are trained, and how much of its activations is kept for that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import SbpatchError
from .settings import Train


class Trainable:
    """A model with its trained weights chosen: all others ask for no gradient and keep their bits.

    Args:
        sites: names of the patched sites.
        rank, seed: of LoRA's matrices; the first of each pair is drawn, the second starts at 0.

    Raises:
        SbpatchError: LoRA without `peft`, or nothing to train.
    """

    def __init__(self, model: nn.Module, sites: Sequence[str], train: Train, rank: int, seed: int) -> None:
        self.model, self._lora = model, None
        if train is Train.lora:
            self._lora = _with_lora(model, sites, rank, seed)
        elif train is not Train.all:
            chosen = {id(p) for module in _chosen(model, sites, train) for p in module.parameters()}
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.requires_grad and id(parameter) in chosen)
        if not self.parameters():
            raise SbpatchError(f"the model has no weights of the kind --train {train.value}: give another")

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained weights by name; tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def take(self, values: dict[str, Tensor]) -> None:
        """Give the trained weights these values."""
        for name, parameter in self.parameters().items():
            parameter.copy_(values[name])

    def merge(self) -> None:
        """Add what LoRA learned to the weights, in place: the model is of its own modules again."""
        if self._lora is not None:
            self._lora.merge_and_unload()
            self._lora = None


def _chosen(model: nn.Module, sites: Sequence[str], train: Train) -> list[nn.Module]:
    found = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    return found + ([model.get_submodule(name) for name in sites] if train is Train.attention else [])


def _with_lora(model: nn.Module, sites: Sequence[str], rank: int, seed: int) -> Any:
    if find_spec("peft") is None:
        raise SbpatchError("--train lora needs the extra 'train': pip install 'sbpatch[train]'")
    import peft  # slow to import, and only this needs it

    blocks = [(name, model.get_submodule(name)) for name in blocks_of(model, sites)]
    names = [f"{b}.{n}" for b, block in blocks for n, module in block.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise SbpatchError("the blocks of the patched sites have no linear layers for --train lora: give another")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(
            cast(Any, model), peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, lora_dropout=0.0)
        )


def blocks_of(model: nn.Module, sites: Sequence[str]) -> list[str]:
    """Names of the blocks that hold the sites: the nearest item of a list of modules around each, else its parent."""

    def block(site: str) -> str:
        parts = site.split(".")
        for end in range(len(parts), 0, -1):
            parent = model.get_submodule(".".join(parts[: end - 1]))
            if isinstance(parent, (nn.ModuleList, nn.Sequential)):
                return ".".join(parts[:end])
        return ".".join(parts[:-1]) or site

    return list(dict.fromkeys(map(block, sites)))


@contextmanager
def recomputed(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Within the block, activations inside of the named modules are computed again in the backward pass."""
    modules = [model.get_submodule(name) for name in blocks]
    for module in modules:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Within the block, a language model of transformers keeps no keys and values of the tokens it has read."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is not None:
        cast(Any, config).use_cache = False
    try:
        yield
    finally:
        if before is not None:
            cast(Any, config).use_cache = before
