"""Fine-tuning: a patched model's weights are trained on, the plan and the patch's tensors stay as they are."""

from .finetune import Result, finetune
from .settings import Settings, Train
from .write import save

__all__ = ["Result", "Settings", "Train", "finetune", "save"]
