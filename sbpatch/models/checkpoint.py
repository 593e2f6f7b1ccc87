"""A pretrained model with what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from ..data.preprocessing import Preprocessing, TextPreprocessing

# What `inputs.run` gets from a model: logits of the image's class; of each next token (causal) or of each token; features.
Answer = Literal["classes", "next-token", "tokens", "features"]


@dataclass
class Checkpoint:
    """A pretrained model, ready to run: evaluation mode, float32, on the CPU.

    `config` is what a saved `config.json` holds so that `load_checkpoint` can rebuild the model from its directory;
    where the family is "timm" or "transformers", that library's own loader reads it too. `sha256` is of the weights
    file, or, where there are several or timm chose the file, of the tensors (`tensors_sha256`).
    """

    name: str
    model: nn.Module
    family: Literal["t2t-vit", "timm", "transformers"]
    config: dict[str, Any]
    preprocessing: Preprocessing | TextPreprocessing
    sha256: str
    answer: Answer = "classes"
    processor: Any = None  # of transformers: the tokenizer or image processor that is saved beside the weights

    @property
    def classes(self) -> int | None:
        """How many classes the model tells apart; None where it answers with something else."""
        if self.answer != "classes":
            return None
        if self.family == "transformers":
            return int(cast(Any, self.model.config).num_labels)
        return int(self.config["classes" if self.family == "t2t-vit" else "num_classes"])
