"""Tensors of a checkpoint that are not plain: refused by name, and no code of a file is run."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from cases import one_line_of, refused_line, works_or_refuses

from sbpatch.models.weights import read_tensors

PLAIN = torch.randn(4, 4)
ODD = {
    "meta": (lambda: torch.empty(4, 4, device="meta"), "without values"),
    "quantised": (lambda: torch.quantize_per_tensor(PLAIN, 0.1, 0, torch.qint8), "quantised"),
    "quantised by channel": (
        lambda: torch.quantize_per_channel(PLAIN, torch.ones(4), torch.zeros(4), 0, torch.qint8),
        "quantised",
    ),
    "sparse": (lambda: PLAIN.to_sparse(), "sparse"),
    "sparse by row": (lambda: PLAIN.to_sparse_csr(), "sparse"),
    "sparse by column": (lambda: PLAIN.to_sparse_csc(), "sparse"),
    "sparse by block": (lambda: PLAIN.to_sparse_bsr((2, 2)), "sparse"),
    "complex": (lambda: PLAIN.to(torch.complex64), "complex"),
    "complex of double": (lambda: PLAIN.to(torch.complex128), "complex"),
    "expanded": (lambda: torch.zeros(1).expand(10**6, 10**6), "expanded"),
    "expanded once": (lambda: torch.zeros(4, 1).expand(4, 9), "expanded"),
    "of 16 bits unsigned": (lambda: torch.zeros(4, dtype=torch.uint16), "uint16"),
    "of bits": (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.bits8), "bits8"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_that_is_not_plain_is_named(tmp_path, kind, wrapper):
    make, said = ODD[kind]
    state = {"fine": PLAIN, "module.odd.weight": make()}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "x.pth")
    line = one_line_of(read_tensors, tmp_path / "x.pth")
    assert "'odd.weight'" in line or "damaged" in line  # some kinds torch does not read back by itself
    assert said in line or "damaged" in line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["complex", "sparse", "meta", "expanded"])
@pytest.mark.parametrize("verb", ["inspect", "calibrate"])
def test_commands_name_it(place, capfd, verb, kind):
    state = torch.load("tiny.pth", weights_only=True)["state_dict_ema"]
    state["norm.bias"] = ODD[kind][0]()
    torch.save(state, "odd.pth")
    assert "'norm.bias'" in refused_line(capfd, verb, "odd.pth", "--quiet")


@pytest.mark.parametrize(
    "kind", [None, 3, "text", [], {}, {"a": 3}, {"a": None}, {"a": [torch.zeros(2)]}, {1: "x"}, (1,)]
)
def test_pickles_of_something_else(tmp_path, kind):
    torch.save(kind, tmp_path / "x.pth")
    assert "no state dict" in one_line_of(read_tensors, tmp_path / "x.pth")


class Planted:
    def __reduce__(self):
        return Path.touch, (Path("planted"),)


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "pth.tar", "safetensors"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_that_want_to_run_something(tmp_path, monkeypatch, suffix, protocol):
    monkeypatch.chdir(tmp_path)
    Path(f"x.{suffix}").write_bytes(pickle.dumps({"a": Planted()}, protocol))
    one_line_of(read_tensors, Path(f"x.{suffix}"))
    if suffix != "safetensors":
        torch.save({"a": Planted()}, f"x.{suffix}")
        assert "refused" in one_line_of(read_tensors, Path(f"x.{suffix}"))
    assert not Path("planted").exists()


HEADERS = [
    b"", b"\0" * 8, b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}", b"\x10\0\0\0\0\0\0\0" + b"{" * 16,
    (1 << 40).to_bytes(8, "little") + b"{}",
]  # fmt: skip
ENTRIES = [
    '{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}',
    '{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    '{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
    '{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,4]}}',
    '{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}',
    '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}',
    '{"a\\u001b[31m":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":3}',
    '{"__metadata__":{"format":3}}',
    "[" * 1000,
]


@pytest.mark.parametrize(
    "data", [*HEADERS, *(len(e).to_bytes(8, "little") + e.encode() + b"\0" * 4 for e in ENTRIES)], ids=range(15)
)
def test_headers_of_safetensors(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    works_or_refuses(read_tensors, tmp_path / "x.safetensors")
