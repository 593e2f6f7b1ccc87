"""The variants that `eval` compares, and how each is built."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..attention.core import repeated
from ..attention.masks import allowed
from ..data.batch import Inputs, moved
from ..models.checkpoint import Answer
from ..models.load import load_checkpoint
from ..plan.patch import base_of, patch, read_plan
from ..plan.plan import PLAN_FILE
from ..sites.calls import Call
from ..sites.find import find_sites
from ..sites.swap import swap

VARIANTS = ("eager", "sdpa", "patched", "finetuned")


@dataclass(frozen=True)
class Subject:
    """What a worker process loads: a directory that calibrate wrote, or any MODEL; and how it runs it."""

    model: str
    checkpoint: Path | None = None
    answer: Answer = "classes"
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        """Those of `VARIANTS` that there are."""
        if not (Path(self.model) / PLAN_FILE).is_file():
            return VARIANTS[:2]
        return VARIANTS[:3] if base_of(Path(self.model)) == Path(self.model) else VARIANTS


def eager_attention(call: Call) -> Tensor:
    """softmax(Q K^T scale + mask) V with the matrix held in memory, as attention was written before fused kernels.

    A query that may see no key at all gets zeros, as PyTorch's attention gives it.
    """
    key, value = call.key, call.value
    if call.enable_gqa:
        key, value = (repeated(x, call.query.shape[1]) for x in (key, value))
    logits = call.query @ key.mT * call.softmax_scale
    mask = call.attn_mask
    if call.key_mask is not None:
        mask = allowed(call.key_mask, call.is_causal, *logits.shape[-2:])
    elif call.is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is None:
        return logits.softmax(-1) @ value
    if mask.dtype != torch.bool:
        return (logits + mask).softmax(-1) @ value
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.masked_fill(~mask.any(-1, keepdim=True), 0) @ value


def load_base(subject: Subject) -> nn.Module:
    """The model without a patch that all variants start from but the finetuned one, which has its own weights."""
    name = str(base_of(Path(subject.model))) if subject.variants == VARIANTS else subject.model
    return load_checkpoint(name, subject.checkpoint).model


def build(subject: Subject, variant: str, example: Inputs, base: nn.Module | None = None) -> nn.Module:
    """The model in one of `VARIANTS`, on its device and in its dtype; `base`, as `load_base` gives it, is changed in place."""
    if variant == "finetuned":
        model = load_checkpoint(subject.model, subject.checkpoint).model
    else:
        model = load_base(subject) if base is None else base
    if variant in VARIANTS[2:]:
        patch(model, read_plan(Path(subject.model)))
    dtype = getattr(torch, subject.dtype)
    model = model.to(subject.device, dtype)
    if variant == "eager":
        found = find_sites(model, moved(example, subject.device, dtype))
        swap(model, {site.name: eager_attention for site in found if not site.by_hand})
    return model


def as_generation_starts(model: nn.Module, inputs: Inputs) -> Inputs:
    """Inputs that ask a causal language model of transformers for the logits of its last position alone.

    The logits of all positions over a vocabulary, which perplexity needs and generation does not, take more memory than
    eager attention does, and would hide it.
    """
    if isinstance(inputs, Tensor) or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return inputs
    ids = inputs["input_ids"]
    return {**inputs, "logits_to_keep": torch.tensor([ids.shape[-1] - 1], device=ids.device)}
