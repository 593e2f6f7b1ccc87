"""Patch the attention of pretrained models with calibrated sparse + low-rank layers.

plan = sbpatch.calibrate(model, batches, budget=0.03)
sbpatch.patch(model, plan)      # in place; sbpatch.unpatch(model) takes it back
model = sbpatch.load("patched/")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import SbpatchError
from .interrupts import end_at_once
from .registration import register
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .calibration.stages import calibrate
    from .generation.generate import load
    from .plan.hub import push_to_hub
    from .plan.patch import patch, unpatch
    from .plan.plan import Plan

__all__ = ["Plan", "SbpatchError", "calibrate", "load", "patch", "push_to_hub", "unpatch"]

# Imported when they are first asked for: PyTorch and timm take seconds.
MODULES = {
    "Plan": "plan.plan",
    "calibrate": "calibration.stages",
    "load": "generation.generate",
    "patch": "plan.patch",
    "push_to_hub": "plan.hub",
    "unpatch": "plan.patch",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module 'sbpatch' has no attribute '{name}'")
    return getattr(import_module(f".{MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})


end_at_once()
register()  # attn_implementation="scatterbrain" of transformers
