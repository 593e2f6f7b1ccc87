"""What is to be patched and how: the plan, its file, the recipe it may follow, the report on it, and the patched model."""

from .patch import read_plan
from .plan import Plan, SitePlan
from .recipe import Recipe, read_recipe

__all__ = ["Plan", "Recipe", "SitePlan", "read_plan", "read_recipe"]
