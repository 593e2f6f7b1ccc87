"""What a recipe leaves: a table in Markdown, and beside it the figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbpatch.writing import written_whole


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, one line for each row of cells."""
    lines = [f"| {' | '.join(map(str, cells))} |\n" for cells in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|\n")
    return "".join(lines)


def write(output: Path, text: str, figures: Mapping[str, Any]) -> None:
    """Write the text and the figures to files of one name, `.md` and `.json`; a folder that is missing is made."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".md", text), (".json", json.dumps(figures, indent=1) + "\n")):
        with written_whole(output.with_suffix(suffix)) as fresh:
            fresh.write_text(content, encoding="utf-8")
