"""The command line: what is said to the user and asked of the library. docs/ describes each command."""

from .commands import main

__all__ = ["main"]
