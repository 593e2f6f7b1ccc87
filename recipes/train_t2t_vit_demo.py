"""Train the embedded default `t2t-vit-demo`: a small softmax T2T-ViT at 224 px on scikit-learn's handwritten digits.

    python recipes/train_t2t_vit_demo.py -o sbpatch/assets/t2t-vit-demo

About 25 minutes on 2 CPU cores. Progressive resizing makes it affordable: attention over 56 x 56 tokens costs 2,500 times
what it costs over 8 x 8, so most epochs run at 64 px and only the last ones at the 224 px that the model is used at.
The test digits (`sbpatch.data.digits_split`) are not seen; the accuracy on them is printed once, at the end.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from sbpatch.data import digits_split
from sbpatch.t2t_vit import T2TViT, T2TViTConfig

STAGES = ((64, 60, 64, 2e-3), (112, 14, 32, 7e-4), (224, 9, 16, 4e-4))  # pixels, epochs, batch, peak learning rate
MEAN, STD = 0.5, 0.5


def augmented(digits: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """(B, 1, 8, 8) in [0, 1] -> (B, 3, size, size), each under its own small affine map, resampled in one bicubic step."""
    batch = len(digits)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(batch).uniform_(low, high, generator=generator)

    angle, scale = uniform(-0.25, 0.25), uniform(0.85, 1.18)  # radians; above 1 shrinks the digit
    shear, stretch = uniform(-0.2, 0.2), uniform(0.9, 1.1)
    shift_x, shift_y = uniform(-0.18, 0.18), uniform(-0.12, 0.12)  # 1 is half the image
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack((cos * stretch, sin + shear, shift_x, -sin, cos / stretch, shift_y), dim=1).view(batch, 2, 3)
    grid = F.affine_grid(theta, [batch, 1, size, size], align_corners=False)
    image = F.grid_sample(digits, grid, mode="bicubic", padding_mode="border", align_corners=False)
    contrast = uniform(0.8, 1.2).view(-1, 1, 1, 1)
    return ((image.clamp(0, 1) * contrast - MEAN) / STD).expand(-1, 3, -1, -1)


def train(seed: int) -> T2TViT:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    images, labels = digits_split("train")
    digits = torch.as_tensor(images, dtype=torch.float32)[:, None] / 16  # (N, 1, 8, 8)
    target = torch.as_tensor(labels)
    model = T2TViT(T2TViTConfig(width=128, depth=4, heads=2, mlp_ratio=2.0, classes=10))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.trunc_normal_(module.weight, std=0.02)
    for size, epochs, batch, peak in STAGES:
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
        steps = epochs * (len(digits) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.2)
        losses = []
        for step in track(range(steps), description=f"{size} px"):
            if step % (len(digits) // batch) == 0:
                order = torch.randperm(len(digits), generator=generator)
            index = order[(step * batch) % (len(digits) // batch * batch) :][:batch]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(augmented(digits[index], size, generator))
            loss = F.cross_entropy(logits.float(), target[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(
            f"{size} px: mean loss of the last epoch {sum(losses[-(len(digits) // batch) :]) / (len(digits) // batch):.4f}"
        )
    return model.eval()


@torch.inference_mode()
def accuracy(model: T2TViT) -> float:
    images, labels = digits_split("test")
    digits = torch.as_tensor(images, dtype=torch.float32)[:, None] / 16
    upscaled = F.interpolate(digits, size=(224, 224), mode="bicubic", align_corners=False).clamp(0, 1)
    inputs = ((upscaled - MEAN) / STD).expand(-1, 3, -1, -1)
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(inputs.split(8), torch.as_tensor(labels).split(8)))
    return hits / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = train(args.seed).half().float()  # what is stored is what is measured
    print(f"top-1 on the test digits: {accuracy(model):.4f}")
    args.output.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, args.output / "model.safetensors")
    config = {
        "architecture": "t2t-vit",
        **model.config.to_dict(),
        "pretrained_cfg": {
            "input_size": [3, 224, 224],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
        },
    }
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    assert math.isfinite(sum(float(t.float().sum()) for t in state.values()))


if __name__ == "__main__":
    main()
