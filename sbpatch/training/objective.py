"""What is minimised: the labels' cross-entropy, or the distance to the exact model's answer; one number a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batch import Inputs
from ..errors import SbpatchError
from ..models.answers import real_tokens
from ..models.checkpoint import Answer


def labelled_loss(answer: Answer, output: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labels in nats, mean over the scored positions of a sample: (B,) float32.

    Args:
        answer: `classes`: output (B, classes), labels (B,); `next-token`: (B, n, vocabulary) and (B, n), -1 where not scored.

    Raises:
        SbpatchError: the model answers with something that has no labels, or the samples have none.
    """
    if answer not in ("classes", "next-token"):
        raise SbpatchError(f"the model answers with {answer}, for which there are no labels: add --distill")
    scored = labels >= 0
    if answer == "classes" and not scored.all():
        raise SbpatchError("the samples have no labels: add --distill, or give a data set that has some")
    nll = F.cross_entropy(output.float().flatten(0, -2), labels.flatten(), ignore_index=-1, reduction="none")
    return _mean(nll.view(labels.shape), scored)


def distilled_loss(answer: Answer, output: Tensor, exact: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
    """Distance to the exact model's answer, mean over the positions that count: (B,) float32.

    Logits: the Kullback-Leibler divergence of the answer's distribution from the exact one's, in nats. Features: one minus
    the cosine of each real token's (each pixel's) features.
    """
    if answer == "features":
        output, exact = (x.flatten(2).mT if x.ndim == 4 else x for x in (output, exact))  # (B, C, H, W) -> (B, HW, C)
        return _mean(1 - F.cosine_similarity(output.float(), exact.float(), dim=-1), _counted(output, inputs))
    target = exact.float().log_softmax(-1)
    divergence = F.kl_div(output.float().log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
    if answer == "classes":
        return divergence
    return _mean(divergence, labels >= 0 if answer == "next-token" else _counted(output, inputs))


def _counted(output: Tensor, inputs: Inputs) -> Tensor:
    """Real tokens of an output (B, n, C), or (B,) ones where a sample has one answer."""
    if output.ndim == 2:
        return torch.ones(len(output), dtype=torch.bool, device=output.device)
    return real_tokens(output, inputs)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted positions of each sample: (B, ...) -> (B,)."""
    values, weight = values.reshape(len(values), -1), counted.reshape(len(counted), -1).to(values.dtype)
    return (values * weight).sum(-1) / weight.sum(-1).clamp(min=1)
