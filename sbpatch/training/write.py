"""A fine-tuned model as a directory: like what `calibrate` writes, with the tuned weights, and the base beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import SbpatchError, one_line
from ..models.load import load_checkpoint
from ..plan import artifact
from ..plan.patch import base_of, read_plan


def save(
    output: Path | str,
    directory: Path | str,
    tuned: nn.Module | Mapping[str, Tensor],
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write the patched `directory` with other weights to `output`, whole or not at all.

    Args:
        tuned: the model of `directory` after training, patched or not, or its state dict.
        record: how it was trained, for the plan and the model card.

    Raises:
        SbpatchError: the directory is no patched one, the weights are not of its model, or `output` holds something else.
    """
    source = Path(directory)
    plan, checkpoint, base = read_plan(source), load_checkpoint(str(source)), load_checkpoint(str(base_of(source)))
    weights = tuned.state_dict() if isinstance(tuned, nn.Module) else tuned
    try:
        checkpoint.model.load_state_dict(weights)
    except RuntimeError as error:
        raise SbpatchError(f"the trained weights are not of the model in {source}: {one_line(error)}") from None
    plan.finetuned = dict(record or {})
    artifact.save(Path(output), checkpoint, plan, base)
