"""Bytes of every kind of file changed at random: each loader gives what it gives, or refuses in one line."""

from __future__ import annotations

import json
import os
import random
import tarfile
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cases import works_or_refuses
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from sbpatch.calibration.costs import CostTable
from sbpatch.calibration.journal import Journal
from sbpatch.data.imagenet import imagenet_val
from sbpatch.data.images import ImageSet
from sbpatch.data.preprocessing import Preprocessing
from sbpatch.data.sources import open_images
from sbpatch.data.texts import open_text
from sbpatch.models.load import load_checkpoint
from sbpatch.models.weights import read_tensors
from sbpatch.plan.plan import PLAN_FILE, Plan
from sbpatch.plan.recipe import read_recipe

SMALL = Preprocessing().resized(32)
TOKENS = [
    b"\0",
    b"\xff" * 8,
    b"[" * 99,
    b"{",
    b'"',
    b"-1",
    b"1e999",
    b"NaN",
    b"99999999999999999999",
    b"\x1b[31m",
    b"null",
    b"&a",
    b"*a",
]


def picture(kind: str) -> bytes:
    file = BytesIO()
    Image.radial_gradient("L").resize((24, 18)).convert("RGB").save(file, kind)
    return file.getvalue()


def pickled() -> bytes:
    file = BytesIO()
    torch.save({"state_dict": {"a": torch.randn(3, 4), "b": torch.arange(5)}}, file)
    return file.getvalue()


def parquet(table: pa.Table) -> bytes:
    file = BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def archive() -> bytes:
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in (1, 2):
            entry = tarfile.TarInfo(f"ILSVRC2012_val_0000000{i}.JPEG")
            entry.size = len(picture("JPEG"))
            tar.addfile(entry, BytesIO(picture("JPEG")))
    return file.getvalue()


def all_images(images: ImageSet) -> None:
    for i in range(min(len(images), 4)):
        works_or_refuses(images.__getitem__, i)


def imagenet(path: Path) -> None:
    items = imagenet_val([path.parent])
    all_images(ImageSet("x", items, SMALL, 1000))


def one_image(path: Path) -> None:
    all_images(open_images(str(path.parent), SMALL))


RECIPE = b"budget: 0.1\ninclude: ['*attn*']\nsites:\n  '*a*': {method: window2d+favor, window: 3, rank: 8}\n"
ROWS = pa.table({"image": [picture("PNG")] * 3, "label": [0, 1, 2]})
KINDS: dict[str, tuple[str, bytes, Callable[[Path], object]]] = {
    "safetensors": ("x.safetensors", save({"a": torch.randn(3, 4), "b": torch.arange(5)}), read_tensors),
    "pickle": ("x.pth", pickled(), read_tensors),
    "recipe": ("r.yaml", RECIPE, read_recipe),
    "cost table": ("c.json", b'{"ms": {"cpu: exact": 1.5, "x": 0.25}}', lambda p: CostTable(p, torch.device("cpu"))),
    "journal": ("j", b'1bbb7cc0 "s"\n', lambda p: Journal(p, "s").close()),
    "parquet": ("x.parquet", parquet(ROWS), lambda p: all_images(open_images(str(p), SMALL))),
    "parquet of text": ("t.parquet", parquet(pa.table({"text": ["a" * 300, "b" * 300]})), lambda p: open_text(str(p))),
    "text": ("x.txt", "Ein Satz, größer als nötig. ".encode() * 30, lambda p: open_text(str(p))),
    "tar": ("ILSVRC2012_img_val.tar", archive(), imagenet),
    "labels": ("val.txt", b"ILSVRC2012_val_00000001.JPEG 65\nILSVRC2012_val_00000002.JPEG 970\n", imagenet),
    "jpeg": ("images/a/0.jpg", picture("JPEG"), lambda p: all_images(open_images(str(p.parents[1]), SMALL))),
    "png": ("images/a/0.png", picture("PNG"), lambda p: all_images(open_images(str(p.parents[1]), SMALL))),
    "gif": ("images/a/0.gif", picture("GIF"), lambda p: all_images(open_images(str(p.parents[1]), SMALL))),
    "webp": ("images/a/0.webp", picture("WEBP"), lambda p: all_images(open_images(str(p.parents[1]), SMALL))),
}  # fmt: skip
FROM_A_DIRECTORY = {  # file, loader of the folder
    "plan": (f"out/{PLAN_FILE}", lambda: Plan.read(Path("out", PLAN_FILE)).layers()),
    "tensors of a patch": ("out/model.safetensors", lambda: load_checkpoint("out")),
    "timm": ("timm/config.json", lambda: load_checkpoint("timm")),
    "llama": ("llama/config.json", lambda: load_checkpoint("llama")),
    "tokenizer": ("llama/tokenizer.json", lambda: load_checkpoint("llama")),
    "processor": ("vit/preprocessor_config.json", lambda: load_checkpoint("vit")),
    "gguf": ("x.gguf", lambda: load_checkpoint("x.gguf")),
}


def mutated(data: bytes, seed: int) -> bytes:
    """One to six changes: bytes flipped, cut, doubled, moved, or a token of some format put in."""
    draw, out = random.Random(seed), bytearray(data)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(out) + 1)
        size = draw.choice((1, 1, 2, 4, 8, 30))
        match draw.randrange(6):
            case 0:
                out[at : at + size] = draw.randbytes(size)
            case 1:
                del out[at : at + size]
            case 2:
                out[at:at] = out[at : at + size]
            case 3:
                out[at:at] = draw.choice(TOKENS)
            case 4:
                out = out[:at] if draw.random() < 0.2 else out
            case 5 if at < len(out):
                out[at] ^= 1 << draw.randrange(8)
    return bytes(out)


def tried(path: Path, original: bytes, load: Callable[[], object], examples: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)

    @settings(max_examples=examples, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
    @given(seed=st.integers(0, 2**32))
    def one(seed: int) -> None:
        path.write_bytes(mutated(original, seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            works_or_refuses(load)

    one()


def prepared(folder: Path, kind: str) -> Path:
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
    (folder / "images" / "b" / "1.jpg").write_bytes(picture("JPEG"))
    if kind in ("tar", "labels"):
        (folder / "val.txt").write_bytes(KINDS["labels"][1])
        (folder / "ILSVRC2012_img_val.tar").write_bytes(archive())
    return folder / KINDS[kind][0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_changed_files(tmp_path, kind):
    path = prepared(tmp_path, kind)
    tried(path, KINDS[kind][1], lambda: KINDS[kind][2](path), 25)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_changed_files(tmp_path, kind):
    path = prepared(tmp_path, kind)
    many = int(os.environ.get("SBPATCH_FUZZ", "250"))
    tried(path, KINDS[kind][1], lambda: KINDS[kind][2](path), many)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FROM_A_DIRECTORY)
def test_changed_files_of_a_directory(place, kind):
    name, load = FROM_A_DIRECTORY[kind]
    path = Path(name)
    original = path.read_bytes() if path.exists() else b"GGUF\3\0\0\0" + b"\0" * 64
    if kind in ("plan", "timm", "llama", "processor"):
        assert json.loads(original)
    tried(path, original, load, 60)
