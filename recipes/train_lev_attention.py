"""LevAttention (Kannan et al., arXiv 2410.05462): small ViTs whose heads read the keys of largest leverage score alone.

    python recipes/train_lev_attention.py --data-dir DIR -o lev-attention

trains three models alike on CIFAR-10: with full attention, and with each head reading only the 64 or 32 of its 197 keys whose
leverage score is largest, chosen anew for each image. It writes lev-attention.md, a table of their top-1 beside that of the
full model with the same keys dropped in, and lev-attention.json, which also has the share of the full model's heavy entries
that these keys held as it was trained. DIR holds cifar10-train.parquet and cifar10-test.parquet; `--data` takes a folder in
their place, with class folders under `train/` and `test/`. States are kept in the folder lev-attention: a run that was stopped
goes on from them.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.attention.leverage import Leverage
from sbpatch.data.images import ImageSet
from sbpatch.data.preprocessing import Preprocessing
from sbpatch.data.sources import open_images
from sbpatch.measure import device_name
from sbpatch.plan.plan import versions
from sbpatch.sites.calls import Call
from sbpatch.sites.observe import observed
from sbpatch.sites.swap import PatchedSite, swapped

SIDE, PATCH, CLASSES = 28, 2, 10  # squares of 28 px of images of 32: 14 x 14 tokens and a class token, 197
WIDTH, DEPTH, HEADS = 128, 4, 4
STEMS = ("patches", "convolutions")
STEM = (3, 32, 64)  # channels before the first convolution, and after each
KEYS = (64, 32)  # that each head reads, of 197
STEPS, BATCH, WARM_UP = 6000, 64, 300  # about 8 epochs of 50,000 images
RATE, WEIGHT_DECAY, SMOOTHING = 1e-3, 0.05, 0.1
HEAVY = 1 / 32  # entries of softmax attention above this count as heavy
WATCHED = 32  # images in which they are counted
EVERY = 250  # steps between states that are kept, and between counts of heavy entries
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


@dataclass(frozen=True)
class Images:
    """Images as stored, (N, 3, 32, 32) uint8, and their labels (N,)."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    def read(cls, images: ImageSet) -> Images:
        stored = [np.asarray(item.open().convert("RGB").resize((32, 32))) for item in images.items]
        labels = torch.tensor([item.label for item in images.items])
        return cls(torch.from_numpy(np.stack(stored)).permute(0, 3, 1, 2), labels)

    def first(self, count: int) -> Images:
        return Images(self.pixels[:count], self.labels[:count])

    def squares(self) -> Tensor:
        """The middle of each image, (N, 3, SIDE, SIDE)."""
        edge = (32 - SIDE) // 2
        return normalised(self.pixels[..., edge : edge + SIDE, edge : edge + SIDE])


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, 32, 32) as stored -> (B, 3, SIDE, SIDE): a square of each image, mirrored or not."""
    batch, reach = len(pixels), torch.arange(SIDE)
    row, column = (torch.randint(0, 32 - SIDE + 1, (batch, 1), generator=generator) + reach for _ in range(2))
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    column = torch.where(mirrored, column.flip(1), column)
    sample = torch.arange(batch)[:, None, None]
    return normalised(pixels[sample, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2))


def fresh_model(seed: int, stem: str = STEMS[0]) -> VisionTransformer:
    """A token of a model with a stem of convolutions knows the 6 x 6 pixels around it before any attention."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        SIDE, PATCH, num_classes=CLASSES, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0
    )
    if stem == "convolutions":
        torch.manual_seed(seed + 1)  # the other weights are those of the model without
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(STEM):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GELU()]
        model.patch_embed.proj = nn.Sequential(*layers, nn.Conv2d(STEM[-1], WIDTH, PATCH, PATCH))
    return model


def sites() -> tuple[list[str], Geometry]:
    """The names of the model's attention, and what its calls are like."""
    geometry = Geometry((SIDE // PATCH) ** 2 + 1, HEADS, WIDTH // HEADS)
    return [f"blocks.{i}.attn" for i in range(DEPTH)], geometry


def product(call: Call, chosen: Leverage | None = None) -> Tensor:
    """Exact attention, to all keys or to the chosen ones, as two matrix products: here faster than the fused kernel on one
    core, backwards above all.
    """
    q, k, v = (x.to(torch.bfloat16) for x in (call.query, call.key, call.value))  # (B, H, n, d)
    if chosen is not None:
        index = chosen.universal(call.key, None)[..., None].expand(-1, -1, -1, k.shape[-1])  # (B, H, keys, d)
        k, v = k.gather(2, index), v.gather(2, index)
    return ((q * call.softmax_scale @ k.mT).softmax(-1, dtype=torch.bfloat16) @ v).to(call.value.dtype)


def reading(model: nn.Module, keys: int | None) -> AbstractContextManager[None]:
    """Attention of the model's heads to so many keys of largest leverage score, or to all."""
    names, geometry = sites()
    if model.training:
        chosen = None if keys is None else Leverage(geometry, 0, keys=keys)
        return swapped(model, dict.fromkeys(names, partial(product, chosen=chosen)))
    if keys is None:
        return nullcontext()
    layers = {name: PatchedSite(name, Scatterbrain("leverage", geometry, 0, keys=keys)) for name in names}
    return swapped(model, layers)


@torch.inference_mode()
def top1(model: nn.Module, keys: int | None, images: Images) -> float:
    """Percent right, float32."""
    right, device = 0, next(model.parameters()).device
    with reading(model.eval(), keys):
        for x, y in zip(images.squares().split(100), images.labels.split(100), strict=True):
            right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
    return 100 * right / len(images.labels)


@torch.inference_mode()
def heavy_share(model: nn.Module, images: Images) -> dict[str, float]:
    """Of the entries of softmax attention above `HEAVY`, and of all attention, the share in columns of each set of KEYS."""
    names, geometry = sites()
    sums: dict[str, float] = {"heavy": 0.0, "all": 0.0}
    sets = {keys: Leverage(geometry, 0, keys=keys) for keys in KEYS}

    def watch(call: Call, output: Tensor) -> None:
        p = (call.query @ call.key.mT * call.softmax_scale).softmax(-1)  # (B, H, n, n)
        heavy = p > HEAVY
        sums["heavy"] += float(heavy.sum())
        sums["all"] += float(p.sum())
        for keys, part in sets.items():
            inside = torch.zeros_like(p[..., 0, :]).scatter(-1, part.universal(call.key, None), 1.0)[..., None, :]
            for name, value in ((f"heavy_{keys}", heavy * inside), (f"mass_{keys}", p * inside)):
                sums[name] = sums.get(name, 0.0) + float(value.sum())

    pixels = images.squares().to(next(model.parameters()).device)
    observed(model.eval(), pixels, dict.fromkeys(names, watch), dict.fromkeys(names, False))
    whole = {"heavy": max(sums["heavy"], 1.0), "mass": sums["all"]}
    shares = {name: total / whole[name.partition("_")[0]] for name, total in sums.items() if "_" in name}
    return shares | {"heavy_per_row": sums["heavy"] / sums["all"]}


def batches(count: int, batch: int, start: int, steps: int, seed: int) -> Iterator[tuple[int, Tensor, torch.Generator]]:
    """Each step's number, images and generator: from its number alone, so that a run that was stopped goes on alike."""
    per_epoch = max(count // batch, 1)
    for step in range(start, steps):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1_000_000 + epoch))
        yield step, order[place * batch :][:batch], torch.Generator().manual_seed(seed + step)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a state goes on with, and no other."""
    return {name: getattr(args, name) for name in ("stem", "steps", "batch", "seed")}


def train(keys: int | None, data: Images, watched: Images, state: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train one model, or go on with it; what `state` holds at the end is returned."""
    model = fresh_model(args.seed, args.stem).to(args.device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2]},
    ]
    stepper = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0, betas=(0.9, 0.98))
    found: dict[str, Any] = {"settings": settings(args), "step": 0, "shares": [], "seconds": 0.0}
    if state.exists():
        found = torch.load(state, map_location=args.device, weights_only=True)
        if found.get("settings") != settings(args):
            raise SystemExit(f"{state} is of a run with other settings; name another folder with -o")
        model.load_state_dict(found["model"])
        stepper.load_state_dict(found["optimizer"])
    began, losses = time.perf_counter() - found["seconds"], []
    for step, index, generator in batches(len(data.labels), args.batch, found["step"], args.steps, args.seed):
        with reading(model.train(), keys), torch.autocast(args.device.type, torch.bfloat16):
            logits = model(augmented(data.pixels[index], generator).to(args.device))
        loss = F.cross_entropy(logits.float(), data.labels[index].to(args.device), label_smoothing=SMOOTHING)
        stepper.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in stepper.param_groups:
            group["lr"] = RATE * min((step + 1) / WARM_UP, 1 - step / args.steps)
        stepper.step()
        losses.append(loss.item())
        if (step + 1) % EVERY == 0 or step + 1 == args.steps:
            if keys is None:
                found["shares"].append({"step": step + 1} | heavy_share(model, watched))
            seconds = time.perf_counter() - began
            found |= {
                "step": step + 1,
                "model": model.state_dict(),
                "optimizer": stepper.state_dict(),
                "seconds": seconds,
            }
            torch.save(found, new := state.with_suffix(".new"))
            new.replace(state)
            mean = sum(losses) / len(losses)
            print(f"{state.stem}, step {step + 1}: loss {mean:.4f}, {seconds / 60:.1f} minutes", flush=True)
            losses.clear()
    return found


def table(rows: list[dict[str, Any]]) -> str:
    cells = ((r["trained"], r["evaluated"], f"{r['top1']:.2f}") for r in rows)
    return results.table(("trained with", "evaluated with", "top-1"), cells)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the models, or take those that are there, and evaluate them."""
    size = Preprocessing((3, 32, 32), "bicubic", 1.0, MEAN, STD)
    opened = partial(open_images, args.data, size, data_dir=args.data_dir)
    data, test = (
        Images.read(opened(split=split, limit=limit)) for split, limit in (("train", None), ("test", args.limit))
    )
    args.output.mkdir(parents=True, exist_ok=True)
    (n,) = {sites()[1].tokens}
    named = {None: f"all {n} keys"} | {keys: f"{keys} keys" for keys in KEYS}
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = settings(args) | {"versions": versions(), "device": device_name(args.device.type)}
    result |= {"train": len(data.labels), "test": len(test.labels), "heavy": HEAVY, "minutes": {}}
    for keys, name in named.items():
        found = train(keys, data, test.first(WATCHED), args.output / f"{name.replace(' ', '-')}.pt", args)
        model = fresh_model(args.seed, args.stem).to(args.device)
        model.load_state_dict(found["model"])
        result["minutes"][name] = found["seconds"] / 60
        if keys is None:
            result["shares"] = found["shares"]
        for other in named if keys is None else (keys,):
            rows.append({"trained": name, "evaluated": named[other], "top1": top1(model, other, test)})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    return result | {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="or a folder of class folders under train/ and test/")
    parser.add_argument("--data-dir", type=Path, help="of cifar10-train.parquet and cifar10-test.parquet")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("lev-attention"), help="states; and .md and .json beside it"
    )
    parser.add_argument(
        "--stem", choices=STEMS, default=STEMS[0], help="what makes tokens of pixels (default: patches)"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--limit", type=int, help="test images (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = run(args)
    results.write(args.output, table(result["rows"]), result)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
