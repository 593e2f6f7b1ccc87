"""Patch the attention of pretrained models with calibrated sparse + low-rank layers.

plan = sbpatch.calibrate(model, batches, budget=0.03)
sbpatch.patch(model, plan)      # in place; sbpatch.unpatch(model) takes it back
model = sbpatch.load("patched/")
"""

# ruff: noqa: E402
from .interrupts import end_at_once

end_at_once()  # the imports take seconds

from .calibration.stages import calibrate
from .errors import SbpatchError
from .generation.generate import load
from .plan.hub import push_to_hub
from .plan.patch import patch, unpatch
from .plan.plan import Plan
from .sites import interface
from .version import __version__ as __version__

__all__ = ["Plan", "SbpatchError", "calibrate", "load", "patch", "push_to_hub", "unpatch"]

interface.register()  # attn_implementation="scatterbrain" of transformers
