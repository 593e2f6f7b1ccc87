"""T2T-ViT with softmax tokens-to-token stages (Yuan et al., arXiv 2101.11986), in the official checkpoint layout.

This is the model that Scatterbrain (arXiv 2110.15343, section 5.1) patches without training. Module names follow the
release files, so that `81.7_T2T_ViTt_14.pth.tar` loads with every key used and none left over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..errors import SbpatchError

PATCH = 16  # pixels a side that one backbone token covers: the three soft splits have strides 4, 2 and 2
HEAD_DIM = 64  # of the backbone, in every released T2T-ViT


@dataclass(frozen=True)
class T2TViTConfig:
    """Shape of a T2T-ViT. `input_size` is the size the position table was stored at; any multiple of 16 can be run."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    classes: int
    token_dim: int = 64
    input_size: int = 224

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> T2TViTConfig:
        """Read the shape off a checkpoint in the official layout.

        Raises:
            SbpatchError: the tensors are not those of a softmax T2T-ViT; the line names what is missing.
        """

        def shape(key: str, dims: int) -> tuple[int, ...]:
            if key not in state or state[key].ndim != dims or not state[key].numel():
                raise SbpatchError(
                    f"not a softmax T2T-ViT checkpoint: no {dims}-D tensor '{key}' in it "
                    "(the Performer variants 81.5_T2T_ViT_14 and the like are other models)"
                )
            return tuple(state[key].shape)

        width = shape("cls_token", 3)[-1]
        token_dim, _ = shape("tokens_to_token.attention1.attn.proj.weight", 2)
        hidden, _ = shape("blocks.0.mlp.fc1.weight", 2)
        classes, _ = shape("head.weight", 2)
        tokens = shape("pos_embed", 3)[1] - 1
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        if width % HEAD_DIM:
            raise SbpatchError(f"T2T-ViT checkpoint of width {width}: the width must be a multiple of {HEAD_DIM}")
        if not tokens or math.isqrt(tokens) ** 2 != tokens:
            raise SbpatchError(f"T2T-ViT checkpoint with a position table of {tokens} patches: not a square image")
        return cls(
            width=width,
            depth=depth,
            heads=width // HEAD_DIM,
            mlp_ratio=hidden / width,
            classes=classes,
            token_dim=token_dim,
            input_size=PATCH * math.isqrt(tokens),
        )


def sinusoids(position: Tensor, width: int) -> Tensor:
    """Fixed position encoding (tokens, width), float32, of positions (tokens,); in float64 within, as the original."""
    channel = torch.arange(width, dtype=torch.float64, device=position.device)
    angle = position.double()[:, None] / 10000 ** (2 * (channel // 2) / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def sinusoid_table(tokens: int, width: int) -> Tensor:
    """The encodings of tokens 0, 1, ... in reading order, shape (1, tokens, width)."""
    return sinusoids(torch.arange(tokens, device="cpu"), width)[None]  # not on the meta device of a model being loaded


class TokenAttention(nn.Module):
    """Self-attention of a tokens-to-token stage: one head of width `token_dim` over tokens of width `dim`."""

    def __init__(self, dim: int, token_dim: int) -> None:
        super().__init__()
        # Released weights were trained with the scale of the *input* width (147 or 576), not of the 64-wide head.
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * token_dim, bias=False)
        self.proj = nn.Linear(token_dim, token_dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, n, dim) -> (B, n, token_dim)
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)  # (B, 1, n, token_dim) each: one head
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return v.squeeze(1) + self.proj(out.squeeze(1))  # the value is the residual: input and output widths differ


class TokenTransformer(nn.Module):
    def __init__(self, dim: int, token_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim, token_dim)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = Mlp(token_dim, token_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """Three overlapping soft splits with attention between them: 56 x 56, 28 x 28, then 14 x 14 tokens at 224 px."""

    def __init__(self, token_dim: int, width: int) -> None:
        super().__init__()
        self.attention1 = TokenTransformer(3 * 7 * 7, token_dim)
        self.attention2 = TokenTransformer(token_dim * 3 * 3, token_dim)
        self.project = nn.Linear(token_dim * 3 * 3, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, H/16 * W/16, width)
        rows, cols = x.shape[-2] // 4, x.shape[-1] // 4
        x = F.unfold(x, kernel_size=7, stride=4, padding=2).transpose(1, 2)  # (B, rows * cols, 147)
        for stage in (self.attention1, self.attention2):
            x = stage(x).transpose(1, 2).unflatten(2, (rows, cols))  # (B, token_dim, rows, cols)
            x = F.unfold(x, kernel_size=3, stride=2, padding=1).transpose(1, 2)
            rows, cols = rows // 2, cols // 2
        return self.project(x)


class T2TViT(nn.Module):
    """T2T-ViT for images (B, 3, H, W) with H and W multiples of 16; returns logits (B, classes).

    The attention runs through `torch.nn.functional.scaled_dot_product_attention`, where `sbpatch.sites` finds it.
    """

    def __init__(self, config: T2TViTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens_to_token = TokensToToken(config.token_dim, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        tokens = (config.input_size // PATCH) ** 2 + 1
        self.pos_embed = nn.Parameter(sinusoid_table(tokens, config.width).clone(), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, mlp_ratio=config.mlp_ratio, norm_layer=nn.LayerNorm)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % PATCH or width % PATCH:
            raise SbpatchError(f"T2T-ViT takes images whose sides are multiples of {PATCH} px, not {height} x {width}")
        x = self.tokens_to_token(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        position: Tensor = self.pos_embed
        if x.shape[1] != position.shape[1]:  # another input size: sinusoids extend to any length
            position = sinusoid_table(x.shape[1], x.shape[2]).to(position)
        x = x + position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def t2t_vit_from_state_dict(state: Mapping[str, Tensor]) -> T2TViT:
    """Build the T2T-ViT that a state dict in the official layout describes and load it, every key used.

    Raises:
        SbpatchError: keys are missing or left over, or a tensor has the wrong shape; the line names the first ones.
    """
    with torch.device("meta"):
        model = T2TViT(T2TViTConfig.from_state_dict(state))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for problem, names in (
        ("lacks", sorted(expected.keys() - state.keys())),
        ("has unknown", sorted(state.keys() - expected.keys())),
        ("has the wrong shape for", sorted(k for k in expected.keys() & state.keys() if state[k].shape != expected[k])),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise SbpatchError(f"T2T-ViT checkpoint {problem} {', '.join(names[:3])}{more}")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    model.pos_embed.requires_grad_(False)
    return model.eval()
