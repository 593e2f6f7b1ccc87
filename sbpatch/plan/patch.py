"""Carry out a plan on a model, take it back, and keep both as a directory."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import SbpatchError
from ..models.load import load_checkpoint
from ..models.weights import check_tensors
from ..reading import check_folder
from ..sites.swap import PatchedSite, restore, swap
from .plan import PLAN_FILE, Plan, patch_tensors

TENSORS_FILE = "sbpatch.safetensors"
BASE_FOLDER = "base"  # of a fine-tuned directory: the base model as it was


def patch(model: nn.Module, plan: Plan, *, graphs: bool = False) -> nn.Module:
    """Replace the attention of the plan's patched sites, in place; returns the model. `unpatch` undoes it exactly.

    graphs: on a CUDA device, replay sites as CUDA graphs from the second call of a shape on. They keep memory for one site's
        call of each shape, and while one is captured no other thread may wait for the device.

    Raises:
        SbpatchError: the plan was made for another model, or the model is patched already.
    """
    first = next(chain(model.parameters(), model.buffers()))  # every model has a tensor
    reach = {site.name: site.reach for site in plan.patched}
    layers = {name: PatchedSite(name, layer, reach[name], graphs) for name, layer in plan.layers().items()}
    swap(model, {name: site.to(first.device) for name, site in layers.items()})
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give every patched site its own attention back, in place; returns the model."""
    restore(model)
    return model


def read_plan(directory: Path) -> Plan:
    """The plan of a directory that `calibrate -o` wrote, with the patch's tensors.

    Raises:
        SbpatchError: the directory is no such one, or one of its files is damaged.
    """
    if not directory.is_dir():
        raise SbpatchError(f"no directory {directory}; `sbpatch calibrate MODEL -o {directory}` makes it")
    check_folder(directory)
    tensors = {}
    if (path := directory / TENSORS_FILE).exists():
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise SbpatchError(f"{path} cannot be read ({error}): calibrate again") from error
        check_tensors(tensors, path)
    plan = Plan.read(directory / PLAN_FILE, tensors)
    if not tensors and any(patch_tensors(layer) for layer in plan.layers().values()):
        raise SbpatchError(f"{path} is missing, and the plan needs the tensors in it: copy it too, or calibrate again")
    return plan


def base_of(directory: Path) -> Path:
    """Where the exact base model of a patched directory is: in it, or, where its weights were tuned, in a folder within it.

    Raises:
        SbpatchError: the plan cannot be read, or the weights were tuned and the folder is missing.
    """
    if Plan.read(directory / PLAN_FILE).finetuned is None:
        return directory
    if not (directory / BASE_FOLDER).is_dir():
        raise SbpatchError(
            f"the weights in {directory} were tuned, and {directory / BASE_FOLDER} is missing: copy it too"
        )
    return directory / BASE_FOLDER


def load(directory: str | Path) -> nn.Module:
    """The patched model of a directory that `calibrate -o` wrote, in evaluation mode, float32, on the CPU.

    Raises:
        SbpatchError: the directory is no such one, or one of its files is damaged.
    """
    plan = read_plan(Path(directory))
    return patch(load_checkpoint(str(directory)).model, plan)
