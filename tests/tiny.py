"""Small models with random weights, plans for them, and what a refusal must look like."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.attention.per_head import Exact, Layer
from sbpatch.calibration.costs import CostTable
from sbpatch.errors import SbpatchError
from sbpatch.models.checkpoint import Checkpoint
from sbpatch.models.load import load_checkpoint
from sbpatch.models.t2t_vit import T2TViT, T2TViTConfig
from sbpatch.plan.plan import Budget, Plan, SitePlan, patch_tensors
from sbpatch.sites.find import find_sites

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # for tensors this small a second thread costs time, on a busy machine fifty times as much


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


class Times(CostTable):
    """A cost table without a clock: exact attention takes `n / 100` ms a head, a layer the given share of that."""

    def __init__(self, share: Callable[[Layer], float]) -> None:
        super().__init__(None, torch.device("cpu"))
        self.share = share

    def exact_ms(self, site: Geometry) -> float:
        return site.heads * site.tokens / 100

    def ms(self, layer: Layer) -> float:
        return self.exact_ms(layer.site) * (1.0 if isinstance(layer, Exact) else self.share(layer))


PARAMETERS: dict[str, dict[str, int]] = {
    "window+clusters": {"window": 5, "rank": 7},
    "leverage": {"keys": 8},
    "window2d+favor": {"window": 3, "rank": 6},
    "lsh": {"bucket": 9, "rounds": 2},
    "window": {"window": 5},
    "clusters": {"rank": 12, "steps": 1},
}


def plan_for(model: nn.Module, method: str = "window2d+favor", *, seed: int = 0, pixels: int = 64) -> Plan:
    """Every site of `model` patched by `method`, with figures such as calibration leaves."""
    plan = Plan(model="tiny", seed=seed, input_size=[3, pixels, pixels], budget=Budget(requested=0.2), sites=[])
    for i, site in enumerate(find_sites(model, torch.zeros(1, 3, pixels, pixels))):
        entry = SitePlan.of(site, "patch", f"reason {i}")
        entry.use(Scatterbrain(method, site.geometry, seed + i, **PARAMETERS[method]), seed + i)
        entry.entropy = [(1 - 0.1 * i) * math.log(entry.tokens)] * entry.heads
        entry.entropy_ratio, entry.matrix_error, entry.output_error = 1 - 0.1 * i, 0.1234 + i / 100, 0.0567 + i / 100
        plan.sites.append(entry)
    plan.settle_budget()
    plan.data = {"source": "demo", "samples": 8, "fingerprint": "f" * 64}
    plan.check = {"samples": 8, "unseen": 1, "agreement": 87.5, "divergence": 0.25, "drop": 12.5}
    layers = plan.layers()
    plan.tensors = {f"{n}.{k}": t.clone() for n, layer in layers.items() for k, t in patch_tensors(layer).items()}
    return plan


def checkpoint_of(model: T2TViT, folder: Path) -> Checkpoint:
    """The model as `load_checkpoint` gives it."""
    path = folder / "tiny-t2t.pth"
    torch.save(model.state_dict(), path)
    return load_checkpoint(str(path))


def process(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `sbpatch ARGS` as users do."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    arguments = [sys.executable, "-m", "sbpatch.cli", *args]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=500, cwd=cwd)


def command(*args: str) -> int:
    """Run `sbpatch ARGS` in this process, as `main` does; the exit code."""
    from sbpatch.cli import commands  # slow to import, and few tests need it

    before = sys.argv
    sys.argv = ["sbpatch", *args]
    try:
        commands.main()
    except SystemExit as done:
        return int(done.code or 0)
    finally:
        sys.argv = before
    return 0


def exact_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """At scale 1."""
    seen = None if mask is None else mask[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=1.0)
