"""What a model's answers come to: of each batch the part that figures need, and over batches the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batch import Inputs
from ..errors import SbpatchError
from .checkpoint import Answer

# Ranges of tokens seen before the scored one, by the name of their perplexity; at the start attention is short and exact.
RANGES = {"perplexity_to_1k": (0, 1024), "perplexity_1k_to_4k": (1024, 4096), "perplexity_from_4k": (4096, 1 << 62)}
POSITIONS = 256  # of logits over a vocabulary that are looked at together: whole windows would be copied
MOST_NLL = 700.0  # nats a token: exp of more is no number
Kept = Mapping[str, np.ndarray]


def kept(answer: Answer, output: Tensor, inputs: Inputs, labels: Tensor) -> Kept:
    """What figures need of a batch's output; of next-token logits (B, n, vocabulary) a few thousandths of them.

    `choice` is the top-1, per sample, scored position or real token; `top1` and `top5` whether the label is it, or among
    the five highest, of the samples that have one; `nll` the negative log-likelihood of every scored token in nats, and
    `position` the number of tokens that the model had seen before it;
    `embedding` (B, width) the mean of the features over the sample's real tokens, of length 1.

    Args:
        answer: what `output` is, see `models.Answer`.
        labels: (B,) classes, or (B, n) next tokens; -1 where there is none.

    Raises:
        SbpatchError: the output holds values that are not finite, or is of another shape than such an answer.
    """
    if answer != "features" and output.ndim != (2 if answer == "classes" else 3):
        raise SbpatchError(f"the model answers with {tuple(output.shape)}: those are no logits of {answer}")
    labels = labels.to(output.device)
    if answer == "classes":
        found = _classes(output, labels)
    elif answer == "features":
        found = {"embedding": embedding(output, inputs)}
    else:
        found = _tokens(output, labels if answer == "next-token" else None, real_tokens(output, inputs))
    if not all(tensor.isfinite().all() for tensor in found.values()):
        raise SbpatchError("the model answers with values that are not finite: try --dtype float32")
    return {name: tensor.cpu().numpy() for name, tensor in found.items() if name != "highest"}


def embedding(features: Tensor, inputs: Inputs) -> Tensor:
    """(B, C) float64, of length 1: features (B, n, C) averaged over the real tokens, (B, C, H, W) over pixels, or (B, C)."""
    features = features.float()
    if features.ndim == 4:
        features = features.flatten(2).mT
    if features.ndim == 3:
        weight = real_tokens(features, inputs).to(features.dtype)[..., None]
        features = (features * weight).sum(1) / weight.sum(1).clamp(min=1)
    return F.normalize(features.double(), dim=-1)


def real_tokens(output: Tensor, inputs: Inputs) -> Tensor:
    """Which positions of an output (B, n, ...) belong to real tokens, (B, n) bool."""
    mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
    if mask is None or mask.shape != output.shape[:2]:
        return torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)
    return mask.to(output.device).bool()


def _classes(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    order = logits.float().argsort(dim=-1, descending=True, stable=True)
    right = order[:, :5] == labels[:, None]
    known = labels >= 0
    found = {"choice": order[:, 0], "top1": right[known, 0], "top5": right[known].any(-1)}
    return found | {"highest": logits.amax(-1)}  # not a number where any logit is none


def _tokens(logits: Tensor, labels: Tensor | None, real: Tensor) -> dict[str, Tensor]:
    """Top-1 and, where there are labels, their negative log-likelihood, of the scored (or else the real) positions."""
    scores = real if labels is None else labels >= 0
    scored = scores.flatten().split(POSITIONS)
    choice, highest, nll = [], [], []
    for i, part in enumerate(logits.flatten(0, 1).split(POSITIONS)):
        chosen = part[scored[i]].float()
        choice.append(chosen.argmax(-1))
        highest.append(chosen.amax(-1))
        if labels is not None:
            target = labels.flatten().split(POSITIONS)[i][scored[i]]
            nll.append(F.cross_entropy(chosen, target, reduction="none"))
    found = {"choice": torch.cat(choice), "highest": torch.cat(highest)}
    return found | ({"nll": torch.cat(nll), "position": scores.nonzero()[:, 1] + 1} if nll else {})


@dataclass
class Scores:
    """Running sums over batches, of one variant against the exact model."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, found: Kept, exact: Kept) -> None:
        """Take in a batch: what `kept` has of this variant and of the exact model."""
        for name in ("top1", "top5", "nll"):
            if name in found:
                self._add(name, found[name])
        if "nll" in found:
            for name, (first, stop) in RANGES.items():
                within = (found["position"] >= first) & (found["position"] < stop)
                self._add(name, found["nll"][within])
        if "choice" in found:
            self._add("agreement", found["choice"] == exact["choice"])
        if "embedding" in found:
            self._add("cosine", (found["embedding"] * exact["embedding"]).sum(-1))

    def _add(self, name: str, values: np.ndarray) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.sum(dtype=np.float64))
        self.counts[name] = self.counts.get(name, 0) + values.size

    def take(self, other: Scores) -> None:
        """Take in what others have summed up."""
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]

    def figures(self) -> dict[str, float]:
        """`top1`, `top5`, `agreement` in percent, `perplexity`, that of each of `RANGES`, `cosine`; only what applies."""
        means = {name: self.sums[name] / count for name, count in self.counts.items() if count}
        figures: dict[str, float] = {n: 100 * means[n] for n in ("top1", "top5", "agreement") if n in means}
        if "nll" in means:
            if means["nll"] > MOST_NLL:
                raise SbpatchError(f"a perplexity of exp({means['nll']:.4g}): the model predicts nothing of this text")
            figures["perplexity"] = float(np.exp(means["nll"]))
            ranges = {name: float(np.exp(means[name])) for name in RANGES if name in means}
            figures |= ranges if len(ranges) > 1 else {}
        return figures | ({"cosine": means["cosine"]} if "cosine" in means else {})
