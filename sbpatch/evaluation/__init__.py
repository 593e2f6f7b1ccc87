"""What a patched model is worth: accuracy, time and memory beside the exact one, and files for other runtimes."""

from .evaluate import Subject
from .export import Format

__all__ = ["Format", "Subject"]
