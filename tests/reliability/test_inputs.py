"""Inputs that are not files of the right kind, names that are no text, and what must not reach a terminal."""

from __future__ import annotations

import os
import socket
import sys
import tarfile
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import CONTROL, command, one_line_of, refused_line
from PIL import Image

from sbpatch.calibration.costs import CostTable
from sbpatch.data.imagenet import imagenet_val
from sbpatch.data.preprocessing import Preprocessing
from sbpatch.data.sources import open_images
from sbpatch.data.texts import open_text
from sbpatch.errors import SbpatchError, one_line, printable
from sbpatch.models.load import load_checkpoint
from sbpatch.plan.recipe import read_recipe
from sbpatch.reading import read_json, read_text

SMALL = Preprocessing().resized(32)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # its name is bounded to a hundred bytes
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(before)


KINDS: dict[str, Callable[[Path], None]] = {
    "named pipe": fifo,
    "socket": a_socket,
    "directory": Path.mkdir,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "empty device": lambda path: path.symlink_to("/dev/null"),
    "circle": lambda path: path.symlink_to(path.name),
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
}
PLACES = {
    "weights": ("x.pth", ["inspect", "x.pth"]),
    "gguf": ("x.gguf", ["inspect", "x.gguf"]),
    "safetensors": ("x.safetensors", ["inspect", "x.safetensors"]),
    "checkpoint": ("x.pth", ["inspect", "vit_tiny_patch16_224", "--checkpoint", "x.pth"]),
    "recipe": ("r.yaml", ["calibrate", "tiny.pth", "--recipe", "r.yaml"]),
    "parquet": ("x.parquet", ["calibrate", "tiny.pth", "--data", "x.parquet"]),
    "text": ("x.txt", ["calibrate", "llama", "--data", "x.txt"]),
    "image": ("images/a/z.jpg", ["calibrate", "tiny.pth", "--data", "images", "--samples", "4"]),
    "evaluated image": ("images/a/z.jpg", ["eval", "tiny.pth", "--dataset", "images"]),
    "config": ("timm/config.json", ["inspect", "timm"]),
    "weights inside": ("timm/model.safetensors", ["inspect", "timm"]),
    "tokenizer": ("llama/tokenizer.json", ["inspect", "llama"]),
    "processor": ("vit/preprocessor_config.json", ["inspect", "vit"]),
    "further file": ("llama/generation_config.json", ["inspect", "llama"]),
    "plan": ("out/sbpatch.json", ["export", "out"]),
    "tensors": ("out/sbpatch.safetensors", ["export", "out"]),
    "cost table": (
        "costs.json",
        ["calibrate", "tiny.pth", "--data", "images", "--samples", "2", "--cost-table", "costs.json"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", PLACES)
def test_what_is_no_file_is_refused_and_not_waited_for(place, capfd, where, kind):
    name, arguments = PLACES[where]
    path = Path(name)
    harmless = {
        ("image", "directory"), ("evaluated image", "directory"), ("further file", "directory"),
        ("further file", "link to nowhere"), ("further file", "circle"),
        ("tensors", "link to nowhere"), ("tensors", "circle"), ("processor", "directory"), ("parquet", "directory"),
    }  # fmt: skip
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    if (where, kind) in harmless:
        pytest.skip("not read, or made anew")
    refused_line(capfd, *arguments, "--quiet")


READERS: dict[str, Callable[[Path], object]] = {
    "read_text": lambda path: read_text(path, "plan"),
    "read_json": lambda path: read_json(path, "plan"),
    "recipe": read_recipe,
    "cost table": lambda path: CostTable(path, __import__("torch").device("cpu")),
    "model": lambda path: load_checkpoint(str(path)),
    "text": lambda path: open_text(str(path)),
    "images": lambda path: open_images(str(path), SMALL),
    "imagenet": lambda path: imagenet_val([path]),
}


@pytest.mark.parametrize("kind", ["named pipe", "socket", "endless device", "circle"])
@pytest.mark.parametrize("reader", READERS)
def test_readers_of_the_library(tmp_path, reader, kind):
    KINDS[kind](tmp_path / "x")
    one_line_of(READERS[reader], tmp_path / "x")


# ---- images

SHAPES = [(20_000, 1), (1, 20_000), (65_000, 2), (3, 40_000), (20_000, 20_000), (1_000_000, 1), (60_000, 60_000)]


FINE = [(20_000, 1), (1, 20_000)]  # at 32 px; not at 224


def png_header(width: int, height: int) -> bytes:
    """A valid start of a PNG of that size, without its pixels."""
    file = BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = __import__("zlib").crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    "shape", [shape for shape in [*SHAPES, (2**31 - 1, 2**31 - 1), (0, 5)] if shape not in FINE], ids=str
)
@pytest.mark.parametrize("way", ["taken", "checked"])
def test_images_that_no_memory_holds(tmp_path, shape, way):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    (tmp_path / "a" / "1.png").write_bytes(png_header(*shape))
    images = open_images(str(tmp_path), SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line = one_line_of(images.__getitem__, 1) if way == "taken" else one_line_of(images.check)
    assert "1.png" in line


@pytest.mark.parametrize("shape", [(20_000, 1), (1, 20_000)])
def test_narrow_images_are_not_enlarged_to_gigabytes(tmp_path, shape):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    Image.new("L", shape).save(tmp_path / "a" / "0.png")
    Image.new("L", (8, 8)).save(tmp_path / "b" / "0.png")
    assert "too narrow" in one_line_of(open_images(str(tmp_path), Preprocessing()).__getitem__, 0)


def table(labels: list[int], kind: pa.DataType) -> pa.Table:
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return pa.table({"image": [file.getvalue()] * len(labels), "label": pa.array(labels, kind)})


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([0, -2], pa.int64()),
        ([0, 10**12], pa.int64()),
        ([2**64 - 1], pa.uint64()),
        ([-(2**63)], pa.int64()),
        ([2**31], pa.int64()),
    ],
    ids=str,
)
def test_labels_that_are_no_classes(tmp_path, labels, kind):
    pq.write_table(table(labels, kind), tmp_path / "x.parquet")
    assert "label" in one_line_of(open_images, str(tmp_path / "x.parquet"), SMALL)


@pytest.mark.parametrize("label", ["-1", "1000", "1e3", "1000000000000", "５", "n01440764", "1.0", "", "0 0 0"])
def test_labels_of_imagenet(tmp_path, label):
    Image.new("RGB", (8, 8)).save(tmp_path / "ILSVRC2012_val_00000001.JPEG")
    (tmp_path / "val.txt").write_text(f"ILSVRC2012_val_00000001.JPEG {label}\n")
    assert "labels" in one_line_of(imagenet_val, [tmp_path])


METADATA = {
    "empty": b"", "text": b"not a mat file" * 20, "version 7.3": 
        b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\x02IM" + b"\x89HDF" * 40,
    "version 5 cut": b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\x01IM", "version 4": b"\0" * 20 + b"\x01" * 300,
    "broken stream": b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\x01IM" + b"\x0f\0\0\0\x20\0\0\0" + b"\xff" * 32,
    "huge element": b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\x01IM" + b"\x0e\0\0\0\xff\xff\xff\x7f" + b"\x06\0\0\0" * 9,
}  # fmt: skip


@pytest.mark.parametrize("kind", METADATA)
@pytest.mark.parametrize("truth", [b"1\n", b"0\n", b"-1\n", b"10**12\n", "１\n".encode(), b"\xff\xfe", b"9" * 5000])
def test_metadata_of_imagenet(tmp_path, kind, truth):
    Image.new("RGB", (8, 8)).save(tmp_path / "ILSVRC2012_val_00000001.JPEG")
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_bytes(truth)
    (tmp_path / "meta.mat").write_bytes(METADATA[kind])
    assert "official form" in one_line_of(imagenet_val, [tmp_path])


@pytest.mark.parametrize("size", [10**12, 10**6, 10**18])
def test_archives_that_promise_more_than_they_hold(tmp_path, size):
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as archive:
        entry = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        entry.size = size
        archive.addfile(entry, None)
    (tmp_path / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 3\n")
    assert "tar" in one_line_of(imagenet_val, [tmp_path])


# ---- names, and what reaches the terminal

NAMES = [
    b"\xff\xfe",
    b"caf\xe9",
    b"\x1b[31mred",
    b"line\nbreak",
    b"\x07bell",
    "‮right to left".encode(),
    b"\x9b2J",
    b"\xed\xa0\x80",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("verb", ["inspect", "missing", "data", "text", "json"])
def test_names_that_are_no_text(place, capfd, name, verb):
    odd = os.fsdecode(name)
    os.rename(b"tiny.pth", name + b".pth")
    os.rename(b"images", b"images" + name)
    os.rename(b"text.txt", name + b".txt")
    model = f"{odd}.pth"
    arguments = {
        "inspect": ["inspect", model],
        "missing": ["inspect", f"{odd}.missing.pth"],
        "data": [
            "calibrate",
            model,
            "--data",
            f"images{odd}",
            "--samples",
            "2",
            "--keep-slow",
            "--budget",
            "0.2",
            "--dry-run",
        ],
        "text": ["calibrate", "llama", "--data", f"{odd}.txt", "--length", "5000000000"],
        "json": ["inspect", model, "--json", f"{odd}.json", "--quiet"],
    }[verb]
    code = command(*arguments)
    said = capfd.readouterr()
    assert code == {"missing": 1, "text": 2}.get(verb, 0), said.err
    assert "Traceback" not in said.err
    if verb != "text":  # wrong use is Typer's to say
        assert not CONTROL.search(said.out + said.err)
    if verb == "missing":
        assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "a\nb", "\x00", "\x9b", "\u2028", "\u202e", "\ufeff", "\udcff", "\r\b"], ids=repr
)
def test_an_error_is_one_printable_line(text):
    for line in (str(SbpatchError(f"before {text} after")), one_line(ValueError(text * 200))):
        assert "\n" not in line
        assert line.isprintable()
        assert line.encode("utf-8")
    assert printable("ünïcode │ ✓") == "ünïcode │ ✓"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory: "
                      "you tried to allocate 4000000000000 bytes. Error code 12"), "4e+03 GB were asked for"),
        (MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000000000,)"), "7.28 TiB were asked for"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), "20.00 GiB"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    ],
)  # fmt: skip
def test_what_was_asked_for_is_said(error, said):
    assert said in one_line(error)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), OSError(28, "No space")]
)
def test_what_nobody_caught_is_one_line_all_the_same(place, capfd, monkeypatch, error):
    def fails(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("sbpatch.cli.inspect.find_sites", fails)
    refused_line(capfd, "inspect", "tiny.pth", "--quiet")


def test_a_text_of_a_plan_does_not_reach_the_terminal_raw(place, capfd):
    plan = Path("out/sbpatch.json")
    plan.write_text(plan.read_text().replace('"tokens_to_token.attention1.attn"', '"x\\u001b[31m\\u0007"'))
    refused_line(capfd, "export", "out", "--quiet")
    assert sys.stderr
