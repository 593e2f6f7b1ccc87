"""The version of this package, which plans, cost tables and results state."""

__version__ = "0.1.0"
