"""BigGAN with a patched self-attention: Inception score and Frechet Inception distance beside those of the exact one.

    pip install pytorch-pretrained-biggan 'torchmetrics[image]'
    python recipes/biggan.py --weights biggan-deep-512 --images imagenet/val -o biggan

`--weights` is a folder with config.json and pytorch_model.bin as released for pytorch-pretrained-biggan; to `--images`, a
folder of class folders or a parquet file, the distance is measured. Its attention layer, 4,096 queries by 1,024 keys in the
512 px model, is calibrated on latents of its own at each of `--budgets` (arXiv 2110.15343, section 5) and every variant draws
the same images. biggan.md is the table, biggan.json the same with the settings. The metrics are torchmetrics', whose network
torch-fidelity downloads once; scores of fewer than 50,000 images are not those of the literature.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
import torch
import torch.nn.functional as F
from scipy.stats import truncnorm
from torch import Tensor, nn

import sbpatch
from sbpatch.data import Preprocessing, batches, open_images
from sbpatch.plan.plan import versions

CALIBRATED = 8  # latents that a patch is calibrated on
NETWORK = ("logits_unbiased", 2048)  # what the two metrics take of torchmetrics' own network


class Drawn(nn.Module):
    """A generator at one truncation: latents (B, noise + classes) -> images (B, 3, side, side), 0 to 1."""

    def __init__(self, gan: nn.Module, noise: int, truncation: float) -> None:
        super().__init__()
        self.gan, self.noise, self.truncation = gan, noise, truncation

    def forward(self, latent: Tensor) -> Tensor:
        return (self.gan(latent[:, : self.noise], latent[:, self.noise :], self.truncation) + 1) / 2


@dataclass(frozen=True)
class Latents:
    """Noise of a normal distribution cut at 2, times the truncation, and a class each; drawn by the seed."""

    noise: int
    classes: int
    truncation: float

    def draw(self, count: int, seed: int) -> Tensor:
        """(count, noise + classes)."""
        noise = truncnorm.rvs(-2, 2, size=(count, self.noise), random_state=seed)
        label = torch.randint(self.classes, (count,), generator=torch.Generator().manual_seed(seed))
        return torch.cat((self.truncation * torch.from_numpy(noise).float(), F.one_hot(label, self.classes)), dim=1)


def released(folder: Path) -> nn.Module:
    """The package's generator with the weights of a folder."""
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig

    gan = BigGAN(BigGANConfig.from_json_file(str(folder / "config.json")))
    gan.load_state_dict(torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True))
    return gan.eval()


class Metrics:
    """Inception score, and distance to real images (B, 3, side, side), 0 to 1, whose features are taken once."""

    def __init__(self, real: Iterator[Tensor], networks: tuple[Any, Any], device: torch.device) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore

        self.device = device
        self.score = InceptionScore(networks[0], normalize=True).to(device)
        self.distance = FrechetInceptionDistance(networks[1], reset_real_features=False, normalize=True).to(device)
        for images in real:
            self.distance.update(images.to(device), real=True)

    @torch.inference_mode()
    def of(self, model: nn.Module, latents: Tensor, batch: int) -> dict[str, float]:
        """Of what the model draws from the latents."""
        self.score.reset()
        self.distance.reset()
        torch.manual_seed(0)  # by which the score cuts the images into parts
        for some in latents.split(batch):
            images = model(some.to(self.device))
            self.score.update(images)
            self.distance.update(images, real=False)
        return {"inception": float(self.score.compute()[0]), "fid": float(self.distance.compute())}


def run(args: argparse.Namespace, gan: nn.Module, networks: tuple[Any, Any] = NETWORK) -> list[dict[str, Any]]:
    """The rows of the table: the exact generator, and each budget's patch."""
    config = gan.config
    device = torch.device(args.device)
    model = Drawn(gan, config.z_dim, args.truncation).to(device).eval()
    latents = Latents(config.z_dim, config.num_classes, args.truncation)
    side = config.output_dim
    real = open_images(
        str(args.images), Preprocessing((3, side, side), "bicubic", 1.0, (0.0,) * 3, (1.0,) * 3), limit=args.samples
    )
    metrics = Metrics((images for images, _ in batches(real, args.batch)), networks, device)
    drawn = latents.draw(args.samples, args.seed)
    sample = [x.to(device) for x in latents.draw(CALIBRATED, args.seed + 1).split(1)]
    rows: list[dict[str, Any]] = [{"attention": "exact", "stored": 1.0, **metrics.of(model, drawn, args.batch)}]
    for budget in args.budgets:
        plan = sbpatch.calibrate(model, sample, budget=budget, method=args.method, keep_slow=True, seed=args.seed)
        if not plan.patched:
            raise SystemExit(f"nothing to patch at a budget of {budget:g}: {plan.sites[0].reason}")
        sbpatch.patch(model, plan)
        figures = metrics.of(model, drawn, args.batch)
        sbpatch.unpatch(model)
        methods = ", ".join(dict.fromkeys(str(site.method) for site in plan.patched))
        rows.append({"attention": methods, "stored": plan.budget.used, **figures})
        print(table(rows).splitlines()[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    cells = ((r["attention"], f"{r['stored']:.4f}", f"{r['inception']:.2f}", f"{r['fid']:.2f}") for r in rows)
    return results.table(("attention", "stored of the entries", "Inception score", "FID"), cells)


def main(gan: nn.Module | None = None, networks: tuple[Any, Any] = NETWORK) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="folder of config.json and pytorch_model.bin")
    parser.add_argument("--images", type=Path, required=True, help="real ones: class folders, or a parquet file")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2])
    parser.add_argument("--method", default="auto")
    parser.add_argument("--samples", type=int, default=50_000, help="images drawn, and the most that are read")
    parser.add_argument("--truncation", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("biggan"), help="without its suffix")
    args = parser.parse_args()
    if gan is None:
        if args.weights is None:
            parser.error("--weights: give the folder of the released weights")
        gan = released(args.weights)
    rows = run(args, gan, networks)
    settings = {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items()}
    results.write(args.output, table(rows), {"settings": settings, "versions": versions(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
