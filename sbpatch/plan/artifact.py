"""The directory that calibrate writes, as one step: all of it, or what was there before."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file

from ..errors import SbpatchError
from ..models.checkpoint import Checkpoint
from .patch import BASE_FOLDER, TENSORS_FILE
from .plan import PLAN_FILE, Plan
from .report import model_card, plot_plan


def check_output(directory: Path) -> None:
    """Refuse an output directory that holds something else, before any work is done.

    Raises:
        SbpatchError: it is a file, the current directory, or a directory with files in it that sbpatch did not write.
    """
    if directory.resolve() == Path.cwd():
        raise SbpatchError(f"output {directory} is the current directory, which cannot be replaced: give a name to -o")
    if directory.exists() and not directory.is_dir():
        raise SbpatchError(f"output {directory} is a file: give another -o")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / PLAN_FILE).is_file():
        raise SbpatchError(f"output directory {directory} holds something else: give another -o, or empty it")
    parent = directory.absolute().parent
    if not parent.is_dir():
        raise SbpatchError(f"no directory {parent} to write {directory.name} into")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or directory to; it takes the target's place only if the block succeeds."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.absolute().parent) as scratch:
        fresh = Path(scratch) / "new"
        yield fresh
        if target.is_dir():
            target.rename(Path(scratch) / "old")  # goes with the scratch folder
        fresh.replace(target)


def save(directory: Path, checkpoint: Checkpoint, plan: Plan, base: Checkpoint | None = None) -> None:
    """Write plan, weights, patch tensors, model card and plot to `directory`; `base` too, where the weights are not its own.

    Raises:
        SbpatchError: the directory holds something else.
    """
    check_output(directory)
    with written_whole(directory) as fresh:
        fresh.mkdir()
        _save_model(fresh, checkpoint)
        if base is not None:
            (fresh / BASE_FOLDER).mkdir()
            _save_model(fresh / BASE_FOLDER, base)
        if plan.tensors:
            save_file({name: tensor.contiguous() for name, tensor in plan.tensors.items()}, fresh / TENSORS_FILE)
        (fresh / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
        (fresh / "README.md").write_text(model_card(plan), encoding="utf-8")
        plot_plan(plan, fresh / "report.png")
        for tensors in fresh.rglob("*.safetensors"):
            tensors.chmod(0o644)  # safetensors makes them readable by their owner alone


def _save_model(folder: Path, checkpoint: Checkpoint) -> None:
    """The unpatched model and what prepares its inputs, so that the library it is from can load them."""
    if checkpoint.family == "transformers":
        from ..models import transformers_models  # slow to import, and only such models need it

        transformers_models.save(folder, checkpoint)
        return
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(checkpoint.config, indent=2) + "\n", encoding="utf-8")


def copy(directory: Path, target: Path) -> None:
    """Copy a patched directory to `target`, whole or not at all."""
    check_output(target)
    if target.resolve().is_relative_to(directory.resolve()):
        raise SbpatchError(f"cannot copy {directory} into itself: give another -o than {target}")
    with written_whole(target) as fresh:
        shutil.copytree(directory, fresh)
