"""The command line: a module for each command, which reads its flags and calls the library. docs/ describes them."""

from .commands import main

__all__ = ["main"]
