"""The small Transformer of the `train_*.py` recipes on sequences, whose attention is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sbpatch.attention.per_head import Layer

# Each token answers, from those before it; or one answer a sequence comes from its first token or the mean of all real ones.
Answer = Literal["each", "first", "mean"]


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864): pairs of coordinates of q and k turn by the token's place.

    The first pair turns by 1 radian a token, the last by 1 / `base`.
    """

    turn: Tensor  # (2, n, d): cosines and sines

    def __init__(self, tokens: int, width: int, base: float) -> None:
        super().__init__()
        angle = torch.outer(torch.arange(tokens), base ** -torch.linspace(0, 1, width // 2)).repeat(1, 2)
        self.register_buffer("turn", torch.stack((angle.cos(), angle.sin())), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.turn[0] + torch.cat((-second, first), -1) * self.turn[1]


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a normalisation and added to its input."""

    def __init__(self, width: int, rotary: Rotary, attend: Layer) -> None:
        super().__init__()
        self.heads, self.rotary, self.attend = attend.site.heads, rotary, attend
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        qkv = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))  # (B, n, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, n, d) each
        x = x + self.out(self.attend(self.rotary(q), self.rotary(k), v, real).transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    """Tokens (B, n), and which of them are real, (B, n) -> logits (B, n, classes) if each answers, else (B, classes).

    It has as many blocks as there are layers of attention.
    """

    def __init__(
        self, vocabulary: int, classes: int, width: int, layers: Sequence[Layer], answer: Answer, base: float
    ) -> None:
        super().__init__()
        self.answer = answer
        self.embedding = nn.Embedding(vocabulary, width)
        rotary = Rotary(layers[0].site.tokens, layers[0].site.head_dim, base)
        self.blocks = nn.ModuleList(Block(width, rotary, layer) for layer in layers)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, real)
        if self.answer == "first":
            x = x[:, 0]
        elif self.answer == "mean":
            x = x.mean(1) if real is None else (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return self.head(self.norm(x))
