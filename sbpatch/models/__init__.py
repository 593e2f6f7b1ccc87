"""Pretrained models: read from timm, transformers, T2T-ViT checkpoints or a directory, and how their answers are read."""

from .checkpoint import Checkpoint
from .load import load_checkpoint

__all__ = ["Checkpoint", "load_checkpoint"]
