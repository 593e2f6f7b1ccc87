"""docs/adding-a-method.md is followed to the letter: its method, its test, and what it says of them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sbpatch.attention import PARTS, Geometry, Scatterbrain, parse_method
from sbpatch.errors import SbpatchError

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


def imported(source: str, name: str, folder: Path) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[ModuleType]:
    """The page's method, registered for the length of a test."""
    assert "mirror" not in PARTS
    try:
        yield imported(blocks()[0], "mirror", tmp_path)
    finally:
        PARTS.pop("mirror", None)


def test_the_page_has_a_method_and_its_test() -> None:
    assert len(blocks()) == 2


def test_the_pages_own_test_passes(mirror: ModuleType, tmp_path: Path, agrees: Callable[..., Scatterbrain]) -> None:
    module = imported(blocks()[1], "page_test", tmp_path)
    test = module.test_mirror_agrees_with_its_dense_reference
    marks = {mark.args[0]: mark.args[1] for mark in test.pytestmark}
    assert set(marks) == {"n", "causal"}
    for n in marks["n"]:
        for causal in marks["causal"]:
            test(n, causal, agrees)


def test_the_pages_method_joins_and_counts(mirror: ModuleType, counts: Callable[[Scatterbrain], float]) -> None:
    assert parse_method("mirror+clusters") == ("mirror", "clusters")
    for n in (1, 8, 33):
        layer = Scatterbrain("mirror", Geometry(n, 2, 8), 0)
        assert layer.nnz == pytest.approx(counts(layer))
    assert Scatterbrain("naive:mirror+favor", Geometry(9, 2, 8), 0, rank=4).naive
    with pytest.raises(SbpatchError, match="did you mean mirror"):
        parse_method("miror")
    q, v = torch.zeros(1, 1, 6, 4), torch.arange(6.0).view(1, 1, 6, 1)
    out = Scatterbrain("mirror", Geometry(6, 1, 4), 0)(q, q, v)
    assert out.flatten().tolist() == [2.5] * 6  # the mean of i and 5 - i


def test_a_wrong_method_would_be_noticed(tmp_path: Path, agrees: Callable[..., Scatterbrain]) -> None:
    """The page's test is no formality: with one pair counted twice it fails."""
    broken = blocks()[0].replace("i != i.flip(0)), dim=-1)", "torch.ones_like(i, dtype=torch.bool)), dim=-1)")
    assert broken != blocks()[0]
    try:
        imported(broken, "broken_mirror", tmp_path)
        agrees("mirror+favor", 64, rank=6)  # even: no token is its own mirror
        with pytest.raises(AssertionError):
            agrees("mirror+favor", 31, rank=6)
    finally:
        PARTS.pop("mirror", None)


def test_every_name_the_page_uses_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    folder = PAGE.parents[1] / "sbpatch" / "attention"
    names = re.findall(r"`(\w+\.py)`", text)
    assert names
    for name in names:
        assert (folder / name).is_file(), name
