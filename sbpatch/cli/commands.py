"""Patch the attention of pretrained models with calibrated sparse + low-rank layers, and prove what it gained.

sbpatch calibrate t2t-vit-demo · sbpatch eval --dataset demo · sbpatch export
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import typer

from .. import processes
from ..errors import SbpatchError, one_line, out_of_memory, system_reason
from ..interrupts import Stopped, raising
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
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    name = context.invoked_subcommand
    processes.join()
    if processes.count() > 1 and name not in SHARED:
        raise SbpatchError(f"'{name}' runs in one process: start it without the launcher")


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
SHARED = ("calibrate", "eval", "compare", "analyze", "finetune")  # that several processes share
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """Entry point. Exit codes: 0 done; 1 refused or failed, one line; 2 wrong use, by Typer; 128 + a signal's number.

    An exception that no one foresaw is one line too; with SBPATCH_DEBUG set it is shown whole.
    """
    try:
        with raising(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries: what is wrong is said by our own errors
            app()
    except SystemExit as done:
        processes.leave()
        sys.exit(done.code if _flushed() else 1)
    except Stopped as stopped:
        others = "; another process of this run ended, or the launcher was stopped" if processes.count() > 1 else ""
        _fail(f"{stopped}{others}", stopped.code)
    except SbpatchError as error:
        _fail(str(error))
    except Exception as error:
        if os.environ.get("SBPATCH_DEBUG"):
            raise
        _fail(_unforeseen(error))


def _unforeseen(error: Exception) -> str:
    if out_of_memory(error):
        return f"{one_line(error)}; ask for fewer or shorter samples, or a smaller batch"
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {system_reason(error)}"
    said = f"{type(error).__name__}: {one_line(error)}"
    return f"this should not have happened ({said}): set SBPATCH_DEBUG=1 to see where, and report it"


def _fail(line: str, code: int = 1) -> None:
    """End with a line and a code; of several processes the first one that fails says its line."""
    if not processes.is_first():
        sys.stderr = sys.__stderr__
    with suppress(OSError):  # nobody reads
        if processes.first_to_fail():
            err.print(f"sbpatch: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    _flushed()
    sys.exit(code)


def _flushed() -> bool:
    """Whether standard output took all; it is closed where it did not, or Python would report that as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return False
    return True
