"""Small models with random weights, and what a refusal must look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from sbpatch.errors import SbpatchError
from sbpatch.t2t_vit import T2TViT, T2TViTConfig


def t2t(seed: int = 0, **change: Any) -> T2TViT:
    """256 tokens in stage 1 at 64 px, and weights large enough that attention is far from uniform."""
    shape = {"width": 64, "depth": 1, "heads": 1, "mlp_ratio": 2.0, "classes": 5, "token_dim": 16, "input_size": 64}
    torch.manual_seed(seed)
    model = T2TViT(T2TViTConfig(**shape | change)).eval()
    for stage in (model.tokens_to_token.attention1, model.tokens_to_token.attention2):
        nn.init.normal_(stage.attn.qkv.weight, std=0.4)
    return model


def vit(name: str = "vit_tiny_patch16_224", seed: int = 0, **change: Any) -> nn.Module:
    """A timm model as `name`, by default with 16 patches and two blocks."""
    torch.manual_seed(seed)
    return timm.create_model(name, **({"img_size": 64, "depth": 2, "num_classes": 5} | change)).eval()


def refused(work: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The line of the SbpatchError that `work` must raise."""
    with pytest.raises(SbpatchError) as excinfo:
        work(*args, **kwargs)
    text = str(excinfo.value)
    assert text
    assert "\n" not in text
    assert len(text) < 700
    return text
