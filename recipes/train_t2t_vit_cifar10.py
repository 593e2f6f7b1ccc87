"""Train the embedded `t2t-vit-cifar10`: a small softmax T2T-ViT at 224 px on CIFAR-10, on one CPU core.

To run it (the settings keep glibc from giving memory back after each operation: about a sixth more images a second):

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=500000000 \\
    python recipes/train_t2t_vit_cifar10.py --data-dir DIR -o sbpatch/assets/t2t-vit-cifar10

The embedded weights took 84 + 76 minutes on one core that was shared with other work (about 50 + 60 minutes of its own
time), and recognise 68.1 % of the 8,000 test images they were measured on. The second round (see STAGES) went on from the
half-precision weights of the first, with new optimizer states. Held-back training images, after each size: first round
61.7 % at 96 px; at 224 px 60.5 % after the squares, then 66.7 % and 67.5 % (of the first 400), and 64.2 % of the test images;
second round 73.6 % at 96 px; 69.6 % after the squares, then 71.8 % and 71.8 %. What makes it affordable:
- The first stage looks at small images, 96 px, where attention costs little.
- From then on the scale is that of 224 px, at which a 7 x 7 window covers one original pixel, but most steps see a square of
  160 px cut from the image. Each token carries the position encoding of its place in the 224 px image.
- Attention over the 56 x 56 tokens runs as 64 key clusters, this package's own, and exactly only in the last steps.
- Muon steps the matrices, AdamW the rest.
The checkpoint is kept as the training goes; a run that was stopped goes on from it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.data.images import ImageSet
from sbpatch.data.loading import batches
from sbpatch.data.preprocessing import Preprocessing
from sbpatch.data.sources import open_images
from sbpatch.models.t2t_vit import PATCH, T2TViT, T2TViTConfig, sinusoids
from sbpatch.sites.calls import Call
from sbpatch.sites.swap import PatchedSite, swapped


@dataclass(frozen=True)
class Stage:
    """Some steps at one scale, the learning rate falling in a straight line from `first` to `last`."""

    pixels: int  # side of the whole image
    crop: int  # side of the square of it that a step is shown
    steps: int
    batch: int
    first: float
    last: float
    rank: int | None = 64  # of the clusters that stand in for the first stage's attention; None: exact
    warm_up: int = 0  # steps


STAGES = (
    Stage(96, 96, 1200, 100, 4e-3, 3.184e-3, warm_up=100),
    Stage(224, 160, 1500, 50, 2.5e-3, 7e-4),
    Stage(224, 224, 480, 32, 7e-4, 1e-4),
    Stage(224, 224, 30, 32, 1e-4, 1e-5, rank=None),
    # A second round, once it was clear that four epochs were too few.
    Stage(96, 96, 2800, 64, 2.5e-3, 1e-3, warm_up=100),
    Stage(224, 160, 700, 50, 1e-3, 3e-4),
    Stage(224, 224, 200, 32, 3e-4, 2e-5),
    Stage(224, 224, 20, 32, 2e-5, 1e-5, rank=None),
)
HELD_BACK = 1000  # training images that only watch over the training
SAVE_EVERY = 200  # steps
PREPROCESSING = Preprocessing((3, 224, 224), "bicubic", 1.0, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262))


def pixels(images: ImageSet) -> tuple[Tensor, Tensor]:
    """All images as stored, (N, 3, 32, 32) uint8, and their labels (N,)."""
    stored = [np.asarray(item.open().convert("RGB")) for item in images.items]
    labels = torch.tensor([item.label for item in images.items])
    return torch.from_numpy(np.stack(stored)).permute(0, 3, 1, 2), labels


def resized(images: Tensor, size: int, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
    """(B, 3, 32, 32) with values to 255 -> (B, 3, size, size) as `PREPROCESSING` would make them, or a window of it."""
    eye = torch.eye(32)[None, None]
    weight = F.interpolate(eye, size=(size, 32), mode="bicubic", antialias=True)[0, 0]  # (size, 32)
    large = (weight[rows] @ images.float() @ weight[columns].mT).clamp(0, 255) / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (PREPROCESSING.mean, PREPROCESSING.std))
    return (large - mean) / std


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, 32, 32), each image shifted by up to 4 pixels and mirrored or not."""
    batch = len(images)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect")
    row, column = (torch.randint(0, 9, (batch, 1), generator=generator) + torch.arange(32) for _ in range(2))
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    column = torch.where(mirrored, column.flip(1), column)
    sample = torch.arange(batch)[:, None, None]
    return padded[sample, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)


def positions(size: int, width: int, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
    """Encodings (1, tokens, width) of the tokens of a `size` px image by their places in a 224 px one.

    `rows` and `columns` of the grid of tokens: those of a window.
    """
    grid, full = size // PATCH, 224 // PATCH
    place = (torch.arange(grid, dtype=torch.float64) + 0.5) * full / grid - 0.5
    index = 1 + place[rows, None] * full + place[None, columns]
    return sinusoids(torch.cat((torch.zeros(1, dtype=torch.float64), index.flatten())), width)[None]


def window(stage: Stage, generator: torch.Generator) -> tuple[slice, slice]:
    """Rows and columns of a random square of `crop` px, in tokens."""
    spare = (stage.pixels - stage.crop) // PATCH
    top, left = torch.randint(0, spare + 1, (2,), generator=generator).tolist()
    return slice(top, top + stage.crop // PATCH), slice(left, left + stage.crop // PATCH)


def in_pixels(tokens: slice) -> slice:
    return slice(tokens.start * PATCH, tokens.stop * PATCH)


def product(call: Call) -> Tensor:
    """Exact attention as two matrix products: at these sizes faster on one core than the fused kernel, backwards above all."""
    q, k, v = (x.to(torch.bfloat16) for x in (call.query, call.key, call.value))
    return (q * call.softmax_scale @ k.mT).softmax(-1, dtype=torch.bfloat16) @ v


def attention(model: T2TViT, stage: Stage) -> AbstractContextManager[None]:
    """The attention of this stage's steps: clusters in the first tokens-to-token stage, if so wanted, else exact."""
    names = [name for name, _ in model.named_modules() if name.endswith(".attn")]
    replacements: dict[str, Callable[[Call], Tensor]] = dict.fromkeys(names, product)
    if stage.rank is not None:
        side = stage.crop // 4
        layer = Scatterbrain("clusters", Geometry(side**2, 1, 64, False, (side, side), 0), 0, rank=stage.rank)
        replacements[names[0]] = PatchedSite(names[0], layer)
    return swapped(model, replacements)


def fresh_model() -> T2TViT:
    model = T2TViT(T2TViTConfig(width=256, depth=5, heads=4, mlp_ratio=2.0, classes=10))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
    return model


def optimizers(model: T2TViT) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices within, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("head")]
    rest = [p for name, p in model.named_parameters() if p.requires_grad and (p.ndim != 2 or name.startswith("head"))]
    return (
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.98)),
    )


@torch.inference_mode()
def accuracy_at(model: T2TViT, images: Tensor, labels: Tensor, size: int) -> float:
    """Top-1 with exact attention in bfloat16."""
    right = 0
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(images.split(50), labels.split(50), strict=True):
            right += int((model(resized(x, size)).argmax(1) == y).sum())
    return right / len(labels)


def draw(count: int, stage: Stage, number: int, step: int, seed: int) -> tuple[Tensor, torch.Generator]:
    """The images of this step, and the generator that varies them: from its number alone, so that a resumed run goes on alike.

    Each run of count / batch steps goes once through all images.
    """
    first = seed + 1_000_000 * number
    epoch, place = divmod(step, count // stage.batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(first + 500_000 + epoch))
    return order[place * stage.batch :][: stage.batch], torch.Generator().manual_seed(first + step)


def save(checkpoint: Path, number: int, step: int, model: T2TViT, steppers: Sequence[torch.optim.Optimizer]) -> None:
    """Keep how far it is: `step` of stage `number` comes next."""
    states = [stepper.state_dict() for stepper in steppers]
    torch.save(
        {"stage": number, "step": step, "model": model.state_dict(), "optimizers": states},
        new := checkpoint.with_suffix(".new"),
    )
    new.replace(checkpoint)


def resume(checkpoint: Path, model: T2TViT, steppers: Sequence[torch.optim.Optimizer]) -> tuple[int, int]:
    """Take up what `save` kept; returns the stage and the step that come next."""
    saved = torch.load(checkpoint, weights_only=True)
    model.pos_embed.data = saved["model"]["pos_embed"]  # its length is that of the size last trained at
    model.load_state_dict(saved["model"])
    for stepper, state in zip(steppers, saved["optimizers"], strict=True):
        stepper.load_state_dict(state)
    return saved["stage"], saved["step"]


def train(data_dir: Path, checkpoint: Path, seed: int) -> T2TViT:
    torch.manual_seed(seed)
    images, labels = pixels(open_images("cifar10", PREPROCESSING, data_dir=data_dir, split="train"))
    images, labels, watch, watch_labels = images[HELD_BACK:], labels[HELD_BACK:], images[:HELD_BACK], labels[:HELD_BACK]
    model = fresh_model()
    steppers = optimizers(model)
    first_stage, first_step = resume(checkpoint, model, steppers) if checkpoint.exists() else (0, 0)
    for number, stage in enumerate(STAGES[first_stage:], first_stage):
        model.train()
        losses: list[float] = []
        began = time.perf_counter()
        for step in range(first_step if number == first_stage else 0, stage.steps):
            index, generator = draw(len(images), stage, number, step, seed)
            x = augmented(images[index], generator)
            rows, columns = window(stage, generator)
            model.pos_embed.data = positions(stage.pixels, model.config.width, rows, columns)
            with attention(model, stage), torch.autocast("cpu", torch.bfloat16):
                logits = model(resized(x, stage.pixels, in_pixels(rows), in_pixels(columns)))
            loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.1)
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = stage.first + (stage.last - stage.first) * step / stage.steps
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / max(stage.warm_up, 1))
                stepper.step()
            losses.append(loss.item())
            if (step + 1) % 50 == 0:
                speed = len(losses) * stage.batch / (time.perf_counter() - began)
                mean = sum(losses[-50:]) / len(losses[-50:])
                print(
                    f"{stage.crop} of {stage.pixels} px, step {step + 1}: loss {mean:.4f}, {speed:.0f} images/s",
                    flush=True,
                )
            if (step + 1) % SAVE_EVERY == 0:
                save(checkpoint, number, step + 1, model, steppers)
        save(checkpoint, number + 1, 0, model, steppers)
        model.pos_embed.data = positions(stage.pixels, model.config.width)
        right = accuracy_at(model.eval(), watch, watch_labels, stage.pixels)
        print(f"{stage.pixels} px: {right:.3f} of the images held back", flush=True)
    model.pos_embed.data = positions(224, model.config.width)
    return model.eval()


@torch.inference_mode()
def accuracy(model: T2TViT, data_dir: Path) -> float:
    test = open_images("cifar10", PREPROCESSING, data_dir=data_dir)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(test, 16)) / len(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="of cifar10-train and -test.parquet")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path("t2t-vit-cifar10.pt"), help="resumed where it exists")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = train(args.data_dir, args.checkpoint, args.seed).half().float()  # what is stored is what is measured
    args.output.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, args.output / "model.safetensors")
    config = {"architecture": "t2t-vit", **model.config.to_dict(), "pretrained_cfg": PREPROCESSING.to_dict()}
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"top-1 on the test images: {accuracy(model, args.data_dir):.4f}")


if __name__ == "__main__":
    main()
