"""Patch the attention of pretrained models with calibrated sparse + low-rank layers, and prove what it gained.

sbpatch calibrate t2t-vit-demo · sbpatch eval --dataset demo · sbpatch export
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ..errors import SbpatchError
from ..version import __version__
from .analyze import analyze_command
from .bench import bench_command
from .calibrate import calibrate_command
from .compare import compare_command
from .evaluate import eval_command
from .export import export_command
from .finetune import finetune_command
from .flags import err, out
from .inspect import inspect_command

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(value: bool) -> None:
    if value:
        out.print(f"sbpatch {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect_command,
    "calibrate": calibrate_command,
    "eval": eval_command,
    "export": export_command,
    "compare": compare_command,
    "analyze": analyze_command,
    "bench": bench_command,
    "finetune": finetune_command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """Entry point: an SbpatchError is one line and exit code 1; wrong use is exit code 2 (by Typer)."""
    try:
        app()
    except SbpatchError as error:
        err.print(f"sbpatch: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
