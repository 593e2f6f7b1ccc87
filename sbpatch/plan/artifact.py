"""The directory that calibrate writes, as one step: all of it, or what was there before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from ..errors import SbpatchError
from ..models.checkpoint import Checkpoint
from ..reading import kind
from ..writing import check_directory, written_whole
from .card import model_card, plot_plan
from .hub import front_matter, metadata
from .patch import BASE_FOLDER, TENSORS_FILE
from .plan import PLAN_FILE, Plan


def check_output(directory: Path) -> None:
    """Refuse an output directory that holds something else, before any work is done.

    Raises:
        SbpatchError: it is a file, a link that leads nowhere, the current directory, or a directory with files in it that
            sbpatch did not write.
    """
    directory = check_directory(directory)
    if directory == Path.cwd():
        raise SbpatchError(f"output {directory} is the current directory, which cannot be replaced: give a name to -o")
    if directory.exists() and not directory.is_dir():
        raise SbpatchError(f"output {directory} is {kind(directory) or 'a file'}: give another -o")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / PLAN_FILE).is_file():
        raise SbpatchError(f"output directory {directory} holds something else: give another -o, or empty it")


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
        (fresh / "README.md").write_text(model_card(plan, front_matter(metadata(base or checkpoint))), encoding="utf-8")
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
        try:
            shutil.copytree(directory, fresh)
        except shutil.Error as error:  # of each file that could not be copied: from, to, why
            raise SbpatchError(f"cannot copy {error.args[0][0][0]} to {target}: {error.args[0][0][2]}") from error
