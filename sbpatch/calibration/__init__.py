"""From a model and batches to a plan: propose layers for each site, measure them, share out the budget, learn, check."""

from .costs import CostTable
from .stages import calibrate

__all__ = ["CostTable", "calibrate"]
