"""Train the embedded default `t2t-vit-demo`: a small softmax T2T-ViT at 224 px on scikit-learn's handwritten digits.

    python recipes/train_t2t_vit_demo.py -o sbpatch/assets/t2t-vit-demo

About 25 minutes on 2 CPU cores. Progressive resizing makes it affordable: attention over 56 x 56 tokens costs 150 times
what it costs over 16 x 16, so most epochs run at 64 px and only the last ones at the 224 px that the model is used at. At the
smaller sizes each token carries the position encoding of its place in the 224 px image, so nothing is learned anew.
The test digits are not seen; the accuracy on them is printed once, at the end.
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

from sbpatch.data.preprocessing import Preprocessing
from sbpatch.data.sources import batches, open_images
from sbpatch.models.t2t_vit import T2TViT, T2TViTConfig, sinusoids

STAGES = ((64, 60, 64, 2e-3), (112, 25, 32, 1e-3), (224, 9, 16, 4e-4))  # pixels, epochs, batch, peak learning rate
PREPROCESSING = Preprocessing((3, 224, 224), "bicubic", 1.0, (0.5,) * 3, (0.5,) * 3)


def augmented(digits: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """(B, 1, 224, 224), as the model is fed -> (B, 3, size, size), each under its own small affine map and contrast."""
    batch = len(digits)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(batch).uniform_(low, high, generator=generator)

    angle, scale = uniform(-0.25, 0.25), uniform(0.85, 1.18)  # radians; above 1 shrinks the digit
    shear, stretch = uniform(-0.2, 0.2), uniform(0.9, 1.1)
    shift_x, shift_y = uniform(-0.18, 0.18), uniform(-0.12, 0.12)  # 1 is half the image
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack((cos * stretch, sin + shear, shift_x, -sin, cos / stretch, shift_y), dim=1).view(batch, 2, 3)
    grid = F.affine_grid(theta, [batch, 1, size, size], align_corners=False)
    image = F.grid_sample(digits, grid, mode="bilinear", padding_mode="border", align_corners=False)
    contrast = uniform(0.8, 1.2).view(-1, 1, 1, 1)
    return ((image + 1) * contrast - 1).expand(-1, 3, -1, -1)  # -1 is black


def positions(size: int, width: int) -> Tensor:
    """Encodings (1, tokens, width) of the tokens of a `size` px image by their places in a 224 px one."""
    grid, full = size // 16, 224 // 16
    place = (torch.arange(grid, dtype=torch.float64) + 0.5) * full / grid - 0.5
    index = 1 + place[:, None] * full + place[None, :]
    return sinusoids(torch.cat((torch.zeros(1, dtype=torch.float64), index.flatten())), width)[None]


def train(seed: int) -> T2TViT:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pairs = list(open_images("demo", PREPROCESSING, split="train"))
    digits = torch.stack([image[:1] for image, _ in pairs])  # (N, 1, 224, 224), grey: one channel says all
    target = torch.tensor([label for _, label in pairs])
    model = T2TViT(T2TViTConfig(width=128, depth=4, heads=2, mlp_ratio=2.0, classes=10))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.trunc_normal_(module.weight, std=0.02)
    for size, epochs, batch, peak in STAGES:
        model.pos_embed.data = positions(size, model.config.width)
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
    test = open_images("demo", PREPROCESSING)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(test, 8)) / len(test)


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
        "pretrained_cfg": PREPROCESSING.to_dict(),
    }
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    assert math.isfinite(sum(float(t.float().sum()) for t in state.values()))


if __name__ == "__main__":
    main()
