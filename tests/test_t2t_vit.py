"""The T2T-ViT architecture against a second writing of it, and what it reads off a state dict."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import refused, t2t
from torch import Tensor, nn

from sbpatch.models.t2t_vit import T2TViT, T2TViTConfig, TokenAttention, sinusoid_table, t2t_vit_from_state_dict

STATE = t2t().state_dict()
configs = st.builds(
    T2TViTConfig,
    width=st.sampled_from([64, 128]),
    depth=st.integers(1, 3),
    heads=st.just(0),  # follows from the width
    mlp_ratio=st.sampled_from([1.0, 2.0, 2.5, 3.0]),
    classes=st.integers(1, 9),
    token_dim=st.sampled_from([8, 24, 64]),
    input_size=st.sampled_from([16, 48, 96]),
).map(lambda c: T2TViTConfig(**c.to_dict() | {"heads": c.width // 64}))


# ---- the same network, written a second time: loops over windows, softmax by its definition, float64


def windows(x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """(C, H, W) -> (tokens, C * size * size): what each window sees, channel by channel, in reading order."""
    x = F.pad(x, (padding,) * 4)
    starts = [range(0, side - size + 1, stride) for side in x.shape[-2:]]
    return torch.stack([x[:, r : r + size, c : c + size].flatten() for r in starts[0] for c in starts[1]])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    weight = (q @ k.T * scale).exp()
    return weight @ v / weight.sum(1, keepdim=True)


def stage(tokens: Tensor, part: nn.Module, scale: float) -> Tensor:
    q, k, v = part.attn.qkv(part.norm1(tokens)).chunk(3, dim=1)
    x = v + part.attn.proj(softmax_attention(q, k, v, scale))
    return x + part.mlp.fc2(F.gelu(part.mlp.fc1(part.norm2(x))))


def backbone_block(x: Tensor, block: nn.Module) -> Tensor:
    q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=1)
    heads = [
        softmax_attention(a, b, c, 64**-0.5)
        for a, b, c in zip(q.split(64, 1), k.split(64, 1), v.split(64, 1), strict=True)
    ]
    x = x + block.attn.proj(torch.cat(heads, 1))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def position(index: int, width: int) -> list[float]:
    angles = [index / 10000 ** (2 * (i // 2) / width) for i in range(width)]
    return [math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(angles)]


def by_hand(model: T2TViT, image: Tensor) -> Tensor:
    t2t_part, (height, width) = model.tokens_to_token, image.shape[1:]
    dim = model.config.token_dim
    x = stage(windows(image, 7, 4, 2), t2t_part.attention1, 147**-0.5)
    x = windows(x.T.reshape(dim, height // 4, width // 4), 3, 2, 1)
    x = stage(x, t2t_part.attention2, (9 * dim) ** -0.5)
    x = t2t_part.project(windows(x.T.reshape(dim, height // 8, width // 8), 3, 2, 1))
    x = torch.cat([model.cls_token[0], x])
    x = x + torch.tensor([position(i, x.shape[1]) for i in range(len(x))], dtype=torch.float64)
    for block in model.blocks:
        x = backbone_block(x, block)
    return model.head(model.norm(x)[0])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (16, 48)])
@torch.inference_mode()
def test_logits_are_those_of_the_network_written_again(height, width):
    model = t2t(width=128, heads=2, depth=2).double()
    nn.init.normal_(model.cls_token)
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = torch.stack([by_hand(model, image) for image in images])
    torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=1e-6)  # the position table is float32


def test_token_attention_scales_by_the_input_width():
    """The trap: q and k are 64 wide, and released weights still want 147 ** -0.5."""
    attention = TokenAttention(147, 64)
    x = 3 * torch.randn(2, 30, 147)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    for scale, same in ((147**-0.5, True), (64**-0.5, False)):
        out = torch.stack([softmax_attention(*row, scale) for row in zip(q, k, v, strict=True)])
        assert torch.allclose(attention(x), v + attention.proj(out), atol=1e-5) == same


def test_sinusoids_are_those_of_the_paper():
    expected = torch.tensor([position(i, 64) for i in range(300)], dtype=torch.float64)
    torch.testing.assert_close(sinusoid_table(300, 64)[0].double(), expected, atol=1e-7, rtol=0)


def test_stored_position_table_is_used_at_its_own_size_only():
    model, images = t2t(), torch.randn(1, 3, 64, 64)
    larger = torch.randn(1, 3, 96, 96)
    before, other = model(images), model(larger)
    model.pos_embed.data += torch.randn_like(model.pos_embed)
    assert not torch.allclose(model(images), before)
    assert torch.equal(model(larger), other)


@pytest.mark.parametrize(("height", "width"), [(40, 64), (64, 72), (8, 16)])
def test_sides_that_are_no_multiple_of_16_are_refused(height, width):
    assert f"not {height} x {width}" in refused(t2t(), torch.zeros(1, 3, height, width))


# ---- state dicts


@settings(max_examples=20)
@given(config=configs)
def test_shape_is_read_off_the_state_dict(config):
    model = T2TViT(config).eval()
    again = t2t_vit_from_state_dict(model.state_dict())
    assert again.config == config
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))


def test_tensors_are_read_and_not_copied_into_other_places():
    """Every tensor of the file arrives under its own name."""
    state = {name: torch.full_like(tensor, i) for i, (name, tensor) in enumerate(STATE.items())}
    for i, tensor in enumerate(t2t_vit_from_state_dict(state).state_dict().values()):
        assert (tensor == i).all()


@pytest.mark.parametrize("key", STATE)
def test_every_missing_tensor_is_refused(key):
    refused(t2t_vit_from_state_dict, {k: v for k, v in STATE.items() if k != key})


@settings(max_examples=150)
@given(key=st.sampled_from(sorted(STATE)), shape=st.lists(st.integers(0, 70), max_size=4))
@example(key="cls_token", shape=[1, 1, 0])
@example(key="pos_embed", shape=[1, 0, 64])
@example(key="pos_embed", shape=[1, 10, 64])
@example(key="pos_embed", shape=[1, 1, 64])
@example(key="blocks.0.mlp.fc1.weight", shape=[0, 64])
@example(key="tokens_to_token.attention1.attn.proj.weight", shape=[0, 0])
def test_no_tensor_of_another_shape_gets_in(key, shape):
    if tuple(shape) == tuple(STATE[key].shape):
        return
    state = STATE | {key: torch.zeros(shape)}
    side = math.isqrt(shape[1] - 1) if len(shape) == 3 and shape[1] > 1 else 0
    if key == "pos_embed" and side and shape == [1, side**2 + 1, 64]:  # the table of another image size is as good
        assert t2t_vit_from_state_dict(state).config.input_size == 16 * side
    else:
        refused(t2t_vit_from_state_dict, state)


@pytest.mark.parametrize(
    "key",
    ["extra", "blocks.1.attn.qkv.weight", "blocks.x", "blocks.one.attn.qkv.weight", "blocks.99999999.x", "head.w"],
)
def test_every_tensor_left_over_is_refused(key):
    refused(t2t_vit_from_state_dict, STATE | {key: torch.zeros(1)})


def test_position_tables_of_one_model_do_not_reach_another():
    """Neither loading (on the meta device) nor exporting (on fake tensors) leaves anything behind for the next model."""
    model, images = t2t(input_size=32), torch.randn(1, 3, 64, 64)
    t2t_vit_from_state_dict(STATE)  # its table, 64 px, is of the size that the other model computes
    with torch.no_grad():
        torch.export.export(model, (images,))
    assert t2t().pos_embed.device.type == "cpu"
    found = model(images)
    assert type(found) is torch.Tensor
    assert torch.isfinite(found).all()
