"""How much the model's answer depends on each number that a site puts out: the weights that turn local errors into damage.

A small change D of a site's output O moves the answer by J D. Averaged over random directions of the answer with gradient g,
E (g . D)^2 is its squared length. For a vocabulary the answer is its logits, up to a constant, and not their softmax: where a
model is sure of a token, such as one that it copies from far back, the distribution hardly moves under small changes, and a
head that finds the token would look dispensable. One backward pass gives g for all sites.

With errors of different tokens taken as independent, damage = sum over tokens of (g_t . D_t)^2. They are not quite: neighbours
err alike, and where all tokens reach one answer it moves by (sum of g_t . D_t)^2, on average several times as far. That square
has far more noise, so candidates are measured by the first, times the ratio of the two over all candidates of a method at a
site (see `weigh.coherence`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.batch import Inputs, run
from ..models.answers import embedding
from ..models.checkpoint import Answer
from ..sites.calls import Call
from ..sites.swap import swapped

# Random directions a sample: one answer needs several, or a candidate's damage is mostly the luck of the draw; a text's are
# as many as its positions.
DIRECTIONS: Mapping[Answer, int] = {"classes": 8, "features": 8, "next-token": 1, "tokens": 1}


class Seen(NamedTuple):
    """A site in one run of the exact model: its call, its output, and the answer's gradients there, (R, B, H, n, d) float32."""

    call: Call
    output: Tensor
    gradient: Tensor


def answer_gradients(
    model: nn.Module, names: Sequence[str], inputs: Inputs, answer: Answer, seed: int, at_most: int | None = None
) -> dict[str, Tensor]:
    """Gradients of random directions of the answer at the output of each named site: {name: (R, B, H, n, d)}, float32."""
    return {name: seen.gradient for name, seen in with_gradients(model, names, inputs, answer, seed, at_most).items()}


def with_gradients(
    model: nn.Module,
    names: Sequence[str],
    inputs: Inputs,
    answer: Answer,
    seed: int,
    at_most: int | None = None,
    place: tuple[int, int] | None = None,
) -> dict[str, Seen]:
    """One forward pass of the exact model, and one backward pass for each of R random directions of the answer.

    R is that of `DIRECTIONS`, or `at_most`. The calls of all sites are held, as they are for the backward pass anyway.

    Logits over a vocabulary: one of them at random, less their mean, summed over positions. Class logits and features: a
    Gaussian direction. In both, confident answers count as much as doubtful ones. Where the samples are a part of a batch,
    `place` says behind how many they come in it, and how many it has: then they get the draws that they have there.
    """
    calls: dict[str, Call] = {}
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> object:
        def record(call: Call) -> Tensor:
            output = call.exact()
            if not output.requires_grad:  # the first site: nothing before it asks for gradients
                output = output.detach().requires_grad_()
            q, k, v = (x.detach() for x in (call.query, call.key, call.value))
            calls[name], outputs[name] = replace(call, query=q, key=k, value=v), output
            return output

        return record

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _frozen(model),
        swapped(model, {name: recorder(name) for name in names}),  # type: ignore[misc]
    ):
        count = min(DIRECTIONS[answer], at_most or DIRECTIONS[answer])
        directions = _directions(run(model, inputs), inputs, answer, seed, count, place)
        reached = {name: outputs[name] for name in names if name in outputs}
        found = [
            torch.autograd.grad(  # the last pass frees the activations on its way, as a text's only one must
                scalar, list(reached.values()), retain_graph=i + 1 < count, materialize_grads=True
            )
            for i, scalar in enumerate(directions)
        ]
    gradients = {
        name: torch.stack(draws).float() for name, draws in zip(reached, zip(*found, strict=True), strict=True)
    }
    return {name: Seen(calls[name], outputs[name].detach(), gradients[name]) for name in reached}


def damage(output: Tensor, exact: Tensor, gradient: Tensor) -> Tensor:
    """Sum over tokens of (g_t . (O'_t - O_t))^2 per sample and head, mean over the gradients (R, B, H, n, d): (B, H)."""
    return damages(output, exact, gradient)[0]


def damages(output: Tensor, exact: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """`damage`, and the same with the square outside the sum: what it is where errors of different tokens add up."""
    error = (output - exact).float()
    moved = [(error * g).sum(-1) for g in gradient]  # R times (B, H, n)
    apart, together = ([x.square().sum(-1) for x in moved], [x.sum(-1).square() for x in moved])
    return torch.stack(apart).mean(0), torch.stack(together).mean(0)


def _directions(
    answers: Tensor, inputs: Inputs, answer: Answer, seed: int, count: int, place: tuple[int, int] | None
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, whole = place or (0, len(answers))
    own = slice(start, start + len(answers))
    if answer in ("next-token", "tokens"):
        draws = [torch.rand(whole, answers.shape[1], generator=generator)[own] for _ in range(count)]
        return [_of_tokens(answers, inputs, uniform.to(answers.device)) for uniform in draws]
    values = (
        embedding(answers, inputs) if answer == "features" else answers.float() - answers.float().mean(-1, keepdim=True)
    )
    shape = whole, *values.shape[1:]
    normal = [torch.randn(shape, generator=generator, dtype=values.dtype)[own] for _ in range(count)]
    return [(values * x.to(values.device)).sum() for x in normal]


def _of_tokens(logits: Tensor, inputs: Inputs, uniform: Tensor) -> Tensor:
    """A logit at each real position, the one that `uniform` (B, n) says, less the mean of all there, summed.

    logits (B, n, vocabulary) -> a number, the mean square of whose change at a position is the variance of its logits' changes.
    """
    token = (uniform * 0.999999 * logits.shape[-1]).long()[..., None]
    found = logits.gather(-1, token)[..., 0].float() - logits.mean(-1, dtype=torch.float32)  # (B, n)
    if not isinstance(inputs, Tensor) and "attention_mask" in inputs:
        found = found[inputs["attention_mask"].bool()]
    return found.sum()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the weights, which would cost the memory of all activations before the first site."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
