"""Where the figures of a command go: the terminal, a JSON file, a plot."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from .. import processes
from ..errors import SbpatchError, printable, system_reason
from ..writing import check_apart, check_target, descriptor, written_whole

NAMED = 10  # skipped samples that are shown


class Terminal(Console):
    """A console that shows control characters in a text as their escapes; those of styles are its own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


out, err = Terminal(), Terminal(stderr=True)


def json_place(path: Path | None) -> Path | None:
    """Refuse a place that cannot be written to before any work is done."""
    if path is not None and descriptor(path) is None:
        check_target(path)
    return path


def check_places(
    *results: Path | None, inputs: Iterable[Path | str | None] = (), directory: Path | None = None
) -> None:
    """Refuse result files that would replace what the run reads, each other, or would lie in the directory it writes.

    Args:
        results: `--json`, `--plot` and the like.
        inputs: files, directories and names of models and data; a name that is no path here is left alone.
        directory: what `-o` replaces as a whole.

    Raises:
        SbpatchError: they do.
    """
    paths = [Path(os.path.expanduser(given)) for given in inputs if given is not None]
    read = [path for path in paths if os.path.exists(path)]
    written = [path for path in results if path is not None and descriptor(path) is None]
    places = [check_target(path, read) for path in written]
    if len(set(places)) < len(places):
        raise SbpatchError(f"{' and '.join(map(str, written))} are the same file: give each a name of its own")
    if directory is not None:
        check_apart(directory, [*read, *written])
        if any(place == directory.resolve() for place in places):
            raise SbpatchError(f"{directory} is to be a directory and a file: give each a name of its own")


def with_skipped(result: dict[str, Any], skipped: Sequence[str] | None, quiet: bool) -> dict[str, Any]:
    """A result with how many samples were left out, and which; on the terminal the first of them. None: they were errors."""
    if skipped is None:
        return result
    lines = list(dict.fromkeys(skipped))  # a text may be read twice
    if not quiet:
        out.print(f"skipped: {len(lines)}", *lines[:NAMED], sep="\n  ", markup=False, highlight=False, soft_wrap=True)
        if len(lines) > NAMED:
            out.print(f"  and {len(lines) - NAMED} more, all in --json")
    return result | {"skipped": len(lines), "skipped_samples": lines}


def write_json(path: Path | None, text: str) -> None:
    """A result to a file or a descriptor; of several processes the first one writes."""
    if path is None or not processes.is_first():
        return
    if (number := descriptor(path)) is not None:
        try:
            if number in (1, 2):
                stream = sys.stdout if number == 1 else sys.stderr
                stream.write(text)
                stream.flush()
            else:
                with open(number, "w", encoding="utf-8", closefd=False) as other:
                    other.write(text)
        except OSError as error:
            raise SbpatchError(f"cannot write {path}: {system_reason(error)}") from error
    else:
        with written_whole(path) as fresh:
            fresh.write_text(text, encoding="utf-8")


def write_plot(path: Path | None, plot: Callable[[Path], None]) -> None:
    """What `plot` writes, a PNG, in place of `path`; of several processes the first one writes."""
    if path is not None and processes.is_first():
        with written_whole(path) as fresh:
            plot(fresh)
