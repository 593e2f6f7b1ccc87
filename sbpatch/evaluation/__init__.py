"""What a patched model is worth: accuracy, time and memory beside the exact one, and files for other runtimes."""

from .export import Format
from .variants import Subject

__all__ = ["Format", "Subject"]
