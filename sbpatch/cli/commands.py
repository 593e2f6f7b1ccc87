"""Patch the attention of pretrained models with calibrated sparse + low-rank layers, and prove what it gained.

sbpatch calibrate t2t-vit-demo · sbpatch eval --dataset demo · sbpatch export
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import processes
from ..errors import SbpatchError, one_line, out_of_memory, system_reason
from ..interrupts import Stopped, ending, ignored, raising
from ..version import __version__
from .results import err, out

# Each command's module and what its help begins with. The module is imported when the command runs, which takes seconds.
COMMANDS = {
    "inspect": (
        "inspect",
        "List the attention sites of MODEL: which can be patched, which not, and why.",
    ),
    "calibrate": (
        "calibrate",
        "Measure the attention of MODEL on a sample, choose a patch within a budget, and write the patched directory.",
    ),
    "eval": (
        "evaluate",
        "Measure accuracy or perplexity, agreement, time and memory of the model with eager attention, with SDPA, and patched.",
    ),
    "export": (
        "export",
        "Export the patched model, run the file in its runtime, and print the largest difference from the model.",
    ),
    "compare": (
        "compare",
        "Compare attention methods at the same budget: accuracy, agreement, errors, time.",
    ),
    "analyze": (
        "analyze",
        "Plot the errors of sparse, low-rank and robust PCA approximations of each head against its entropy.",
    ),
    "bench": (
        "bench",
        "Measure time and memory of single attention calls against eager attention and SDPA, by length (the paper's Figure 6).",
    ),
    "finetune": (
        "finetune",
        "Train the weights of a patched model with its patch in place, and write the state with the lowest validation loss.",
    ),
}
SHARED = ("calibrate", "eval", "compare", "analyze", "finetune")  # that several processes share


class Commands(TyperGroup):
    """The commands of COMMANDS, listed by their help alone. (Any: of Click or of the copy in Typer.)"""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed and _imported(str(listed.name)), rest


def _imported(name: str) -> Any:
    module, text = COMMANDS[name]
    with ending():
        function = getattr(import_module(f".{module}", __package__), f"{name}_command")
    alone = typer.Typer(add_completion=False)
    alone.command(name, help=text)(function)
    return typer.main.get_command(alone)


app = typer.Typer(cls=Commands, help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


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


def _listed() -> None:
    """What stands for a command until it runs."""


for name, (_, text) in COMMANDS.items():
    app.command(name, help=text)(_listed)


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
        flushed = _flushed()
        ignored()
        sys.exit(done.code if flushed else 1)
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
    ignored()
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
