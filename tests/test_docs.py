"""What README and docs tell a reader to type works: every `bash` block runs, every `python` block too."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def run(arguments: Sequence[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}"


RUN = (ROOT / "README.md", ROOT / "docs" / "finetuning.md")  # whose Python runs too; other pages show parts of programs


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder in which a calibration of the embedded model ran: once, for all pages that have the same one."""

    @cache
    def folder(*arguments: str) -> Path:
        place = tmp_path_factory.mktemp("calibrated")
        run(["-m", "sbpatch.cli", *arguments], place)
        return place

    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash") or p in RUN], ids=lambda p: p.name)
def test_command_lines_and_then_the_python_run(page: Path, tmp_path: Path, calibrated: Callable[..., Path]) -> None:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("sbpatch ")]
    assert lines
    for line in lines:
        arguments = shlex.split(line, comments=True)[1:]
        if arguments[:2] == ["calibrate", "t2t-vit-demo"]:
            shutil.copytree(calibrated(*arguments), tmp_path, dirs_exist_ok=True)
        else:
            run(["-m", "sbpatch.cli", *arguments], tmp_path)
    for i, block in enumerate(blocks(page, "python") if page in RUN else []):
        (tmp_path / f"block{i}.py").write_text(block, encoding="utf-8")
        run([f"block{i}.py"], tmp_path)


def test_set_up_commands_name_what_the_project_has() -> None:
    """The two set-up lines need a network for pip, so CI runs them itself; here: that their parts exist."""
    setup = [
        line for line in "".join(blocks(ROOT / "README.md", "bash")).splitlines() if line.startswith("python3 -m venv")
    ]
    assert len(setup) == 2
    assert "sbpatch calibrate t2t-vit-demo" in setup[0]
    assert "'.[dev]'" in setup[1]
    assert "pytest" in setup[1]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "'.[dev]'" in ci
    assert "python -m pytest" in ci


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for recipe in re.findall(r"`(recipes/[\w.-]+)`", text):
        assert (ROOT / recipe).exists(), recipe
