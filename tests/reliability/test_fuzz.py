"""Files of every kind changed at random: each loader gives what it gives, or refuses in one line, in bounded time and memory.

Two kinds of change: bytes of any file, and the values of a file that is JSON or YAML, which then still is.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from cases import works_or_refuses
from PIL import Image
from safetensors.torch import save
from tiny import ROOT
from tiny_text import llama, words

from sbpatch.calibration.costs import CostTable
from sbpatch.calibration.journal import Journal
from sbpatch.data.imagenet import imagenet_val
from sbpatch.data.images import ImageSet, Item, opened_file
from sbpatch.data.preprocessing import Preprocessing
from sbpatch.data.sources import open_images
from sbpatch.data.texts import open_text
from sbpatch.models.load import load_checkpoint
from sbpatch.models.weights import read_tensors
from sbpatch.plan.plan import PLAN_FILE, Plan
from sbpatch.plan.recipe import read_recipe

SMALL = Preprocessing().resized(32)
SECONDS = 20  # of one input
MEMORY = 4 << 30  # bytes beyond what the tests have
TIMES = int(os.environ.get("SBPATCH_FUZZ", "1"))  # as many inputs as the slow tests make
GUIDED = 500  # inputs of each loader that atheris tries
FEW = 20  # inputs of a kind in the tests that are not slow; of those whose loader builds a model, none


# ---- changes

TOKENS = [
    b"\0", b"\xff" * 8, b"[" * 99, b"{", b'"', b"-1", b"1e999", b"NaN", b"99999999999999999999", b"\x1b[31m", b"null",
    b"&a", b"*a", b"<<: *a", b"!!python/name:os.system", b"\xe2\x80\xae", b"\xed\xa0\x80",
]  # fmt: skip
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, -(2**31), 2**53, 2**64, 10**12, 10**40, 0.5, -0.0, 1e-300, 1e300,
    float("inf"), float("-inf"), float("nan"), "", "x", "\x1b[31m\x07", "a" * 5000, "../../../etc/passwd", "\u202e", "1", "NaN",
    [], {}, [[]], [None], {"": None}, [1e308] * 3, list(range(50)), {"seed": 1, "self": 2, "site": 3, "layer": 4},
]  # fmt: skip


def changed_bytes(data: bytes, seed: int) -> bytes:
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


def places(values: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree of lists and dictionaries."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [place for key, value in items for place in ((values, key), *places(value))]


def changed_values(data: bytes, seed: int) -> bytes:
    """One to four values replaced, removed, renamed, wrapped, nested deeply, exchanged or scaled; written as JSON."""
    draw, root = random.Random(seed), [yaml.safe_load(data)]
    for _ in range(draw.randint(1, 4)):
        container, key = draw.choice(places(root))
        value = container[key]
        match draw.randrange(8):
            case 0 | 1 | 2:
                container[key] = deepcopy(draw.choice(HOSTILE))
            case 3 if isinstance(container, dict):
                container[draw.choice([*map(str, container), "seed", "self", "", "\x1b"])] = container.pop(key)
            case 4:
                container[key] = deepcopy(draw.choice([[value], {str(key): value}, [value] * 3, str(value)]))
            case 5 if isinstance(container, dict):
                del container[key]
            case 6 if isinstance(value, (int, float)):
                container[key] = value * draw.choice([-1, 0, 2, 0.1, 1e6, 10**18])
            case 7:
                other, there = draw.choice(places(root))
                container[key] = json.loads(json.dumps(other[there]))
    for _ in range(draw.choice([50, 900]) if draw.random() < 0.01 else 0):
        root[0] = [root[0]]
    return json.dumps(root[0]).encode()


# ---- the files


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


def archive(*members: tuple[str, bytes]) -> bytes:
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, BytesIO(data))
    return file.getvalue()


def gguf() -> bytes:
    """A tiny Llama, as llama.cpp's converter writes one."""
    import gguf as library

    numbers = words().get_vocab()
    vocabulary = [*sorted(numbers, key=lambda word: numbers[word])[:-2], "w", "0"]
    model = llama(num_hidden_layers=1)
    path = Path("made.gguf")
    writer = library.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 512), (writer.add_embedding_length, 32), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 48), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_vocab_size, len(vocabulary)),
        (writer.add_tokenizer_model, "gpt2"), (writer.add_token_list, vocabulary), (writer.add_token_merges, ["w 0"]),
        (writer.add_bos_token_id, 2), (writer.add_eos_token_id, 2),
    ):  # fmt: skip
        add(value)
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, 1)
    for name, tensor in model.state_dict().items():
        if found := names.get_name(name, try_suffixes=(".weight",)):
            writer.add_tensor(found, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def all_images(images: ImageSet) -> None:
    for i in range(min(len(images), 4)):
        works_or_refuses(images.__getitem__, i)


def imagenet(path: Path) -> None:
    all_images(ImageSet("x", imagenet_val([path.parent]), SMALL, 1000))


def one_image(path: Path) -> None:
    ImageSet("x", [Item("x", "x", 0, lambda: opened_file(path))], SMALL, 1)[0]


def a_set(path: Path) -> None:
    all_images(open_images(str(path), SMALL, skip_bad=True))


RECIPE = b"budget: 0.1\ninclude: ['*attn*']\nsites:\n  '*a*': {method: window2d+favor, window: 3, rank: 8}\n"
ROWS = pa.table({"image": [picture("PNG")] * 3, "label": [0, 1, 2]})
SHARD = archive(*((f"{i}.{end}", data) for i in "01" for end, data in (("png", picture("PNG")), ("cls", b"1"))))
OFFICIAL = archive(*((f"ILSVRC2012_val_0000000{i}.JPEG", picture("JPEG")) for i in (1, 2)))
LABELS = b"ILSVRC2012_val_00000001.JPEG 65\nILSVRC2012_val_00000002.JPEG 970\n"
COSTS = b'{"ms": {"cpu: exact": 1.5, "x": 0.25}}'


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it lies, what is in it, what reads it, and how many inputs the slow tests make of it."""

    name: str
    data: Callable[[], bytes]
    load: Callable[[Path], object]
    many: int
    change: Callable[[bytes, int], bytes] = changed_bytes
    quick: bool = True


def file(name: str, data: bytes, load: Callable[[Path], object], many: int, **more: Any) -> Kind:
    return Kind(name, lambda: data, load, many, **more)


def model_file(name: str, load: Callable[[], object], many: int, **more: Any) -> Kind:
    """A file of the folders in `made`."""
    return Kind(name, lambda: Path(name).read_bytes(), lambda path: load(), many, quick=False, **more)


VALUES = {"change": changed_values}
KINDS = {
    "safetensors": file("x.safetensors", save({"a": torch.randn(3, 4), "b": torch.arange(5)}), read_tensors, 2500),
    "pickle": file("x.pth", pickled(), read_tensors, 1500),
    "recipe": file("r.yaml", RECIPE, read_recipe, 1500),
    "recipe, values": file("r.yaml", RECIPE, read_recipe, 1500, **VALUES),
    "cost table": file("c.json", COSTS, lambda p: CostTable(p, torch.device("cpu")), 1500),
    "cost table, values": file("c.json", COSTS, lambda p: CostTable(p, torch.device("cpu")), 1500, **VALUES),
    "journal": file("j", b'1bbb7cc0 "s"\n', lambda p: Journal(p, "s").close(), 1500),
    "parquet of images": file("x.parquet", parquet(ROWS), a_set, 600),
    "parquet of text": file("t.parquet", parquet(pa.table({"text": ["a" * 300] * 2})), lambda p: open_text(str(p)), 1500),
    "text": file("x.txt", "Ein Satz, größer als nötig. ".encode() * 30, lambda p: open_text(str(p)), 1500),
    "WebDataset shard": file("x.tar", SHARD, a_set, 600),
    "ImageNet's tar": file("ILSVRC2012_img_val.tar", OFFICIAL, imagenet, 400),
    "ImageNet's labels": file("val.txt", LABELS, imagenet, 400),
    **{kind: file(f"x.{kind}", picture(kind), one_image, 600) for kind in ("jpeg", "png", "webp", "tiff", "bmp")},
    "plan": model_file(f"out/{PLAN_FILE}", lambda: Plan.read(Path("out", PLAN_FILE)).layers(), 500),
    "plan, values": model_file(f"out/{PLAN_FILE}", lambda: Plan.read(Path("out", PLAN_FILE)).layers(), 1500, **VALUES),
    "tensors of a model": model_file("out/model.safetensors", lambda: load_checkpoint("out"), 60),
    "timm's config.json": model_file("timm/config.json", lambda: load_checkpoint("timm"), 40),
    "timm's config.json, values": model_file("timm/config.json", lambda: load_checkpoint("timm"), 80, **VALUES),
    "config.json": model_file("llama/config.json", lambda: load_checkpoint("llama"), 60),
    "config.json, values": model_file("llama/config.json", lambda: load_checkpoint("llama"), 120, **VALUES),
    "tokenizer.json": model_file("llama/tokenizer.json", lambda: load_checkpoint("llama"), 60),
    "preprocessor_config.json": model_file("vit/preprocessor_config.json", lambda: load_checkpoint("vit"), 60),
    "preprocessor_config.json, values": model_file(
        "vit/preprocessor_config.json", lambda: load_checkpoint("vit"), 120, **VALUES
    ),
    "GGUF": Kind("x.gguf", gguf, lambda p: load_checkpoint(str(p)), 100, quick=False),
}  # fmt: skip


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Whoever asks for gigabytes does not get them, and says so."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def prepared(kind: Kind, folder: Path) -> Path:
    """The file as it is before it is changed, beside what its loader needs."""
    path = folder / kind.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if "ILSVRC" in kind.name or kind.name == "val.txt":
        (folder / "val.txt").write_bytes(LABELS)
        (folder / "ILSVRC2012_img_val.tar").write_bytes(OFFICIAL)
    path.write_bytes(kind.data())
    return path


def tried(kind: Kind, folder: Path, many: int) -> None:
    path, original = prepared(kind, folder), kind.data()
    if kind.name != "j":  # a journal goes away as it is closed
        kind.load(path)  # it is a file that can be read, before it is changed
    for seed in range(many):
        path.write_bytes(kind.change(original, seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                works_or_refuses(kind.load, path, seconds=SECONDS)
            except BaseException as error:
                error.add_note(f"input {seed} of {kind.name}")
                raise


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.quick])
def test_a_few_changed_files(tmp_path, name, bounded_memory):
    tried(KINDS[name], tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.quick])
def test_many_changed_files(tmp_path, name, bounded_memory):
    tried(KINDS[name], tmp_path, TIMES * KINDS[name].many)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.quick])
def test_many_changed_files_of_a_model(place, name, bounded_memory):
    tried(KINDS[name], Path(), TIMES * KINDS[name].many)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: pip install 'sbpatch[fuzz]'")
@pytest.mark.parametrize("name", ["recipe", "cost table", "journal", "ImageNet's labels"])
def test_inputs_led_by_what_they_reach(tmp_path, name):
    """The loaders whose readers are sbpatch's own; see fuzz_loader.py for the others."""
    program = [
        sys.executable,
        str(Path(__file__).with_name("fuzz_loader.py")),
        name,
        f"-runs={GUIDED * TIMES}",
        "-seed=1",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"stat::number_of_executed_units: {GUIDED * TIMES}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_loader_that_fails_is_found(tmp_path):
    """That these tests can fail: on another exception, a line break, a control character, and a loader that does not end."""

    def raises(text: str) -> Callable[[Path], object]:
        def load(path: Path) -> None:
            if path.read_bytes() != b"1":
                raise ValueError(text)

        return load

    with pytest.raises(ValueError, match="x"):
        tried(file("x", b"1", raises("x"), 1), tmp_path, 50)


def count_table() -> str:
    """The table of docs/reliability.md."""
    rows = [f"| {name} | {kind.many:,} |" for name, kind in KINDS.items()]
    return "\n".join(["| file | inputs |", "|---|---|", *rows, f"| together | {total():,} |"])


def total() -> int:
    return sum(kind.many for kind in KINDS.values())


def test_the_page_has_the_counts():
    assert total() >= 20_000
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert count_table() in page, f"put this into docs/reliability.md:\n{count_table()}"
