"""Method names and parameters: what is wrong is refused in a line that says what to do."""

from __future__ import annotations

import pytest
from torch import nn

from sbpatch.attention import PARTS, Geometry, Scatterbrain, parse_method, register
from sbpatch.attention.registry import Sparse
from sbpatch.errors import SbpatchError

from .helpers import METHODS, PARAMETERS

SITE = Geometry(tokens=96, heads=2, head_dim=8, grid=(8, 12))


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("window", ("window", None)),
        ("favor", (None, "favor")),
        ("lsh+clusters", ("lsh", "clusters")),
        ("clusters+lsh", ("lsh", "clusters")),  # order carries no meaning
    ],
)
def test_a_method_splits_into_its_two_parts(method: str, parts: tuple[str | None, str | None]) -> None:
    assert parse_method(method) == parts


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("windw+favor", "unknown attention method 'windw'.*did you mean window"),
        ("zzz", "unknown attention method 'zzz'.*known: .*clusters, .*favor"),
        ("", "unknown attention method ''"),
        ("window+", "unknown attention method ''"),
        ("window + favor", "unknown attention method 'window '"),
        ("window+lsh", "two sparse parts"),
        ("window+window", "two sparse parts"),
        ("favor+clusters", "two low-rank parts"),
        ("window+favor+clusters", "two low-rank parts"),
    ],
)
def test_wrong_methods_are_refused(method: str, message: str) -> None:
    with pytest.raises(SbpatchError, match=message):
        parse_method(method)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_and_refuses_a_parameter_it_does_not_know(method: str) -> None:
    layer = Scatterbrain(method, SITE, 0, **PARAMETERS[method])
    assert layer.parameters_used == PARAMETERS[method]
    assert layer.stored == layer.nnz + (layer.low_rank.stored if layer.low_rank is not None else 0)
    with pytest.raises(SbpatchError, match=r"takes no parameter 'bogus'"):
        Scatterbrain(method, SITE, 0, bogus=1, **PARAMETERS[method])


def test_a_parameter_of_the_other_part_is_refused() -> None:
    with pytest.raises(SbpatchError, match="takes no parameter 'rank'"):
        Scatterbrain("window", SITE, 0, window=4, rank=8)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("window", {"window": 0}),
        ("window2d", {"window": 0}),
        ("lsh", {"bucket": 0}),
        ("lsh", {"bucket": 4, "rounds": 0}),
        ("favor", {"rank": 0}),
        ("clusters", {"rank": 0}),
        ("clusters", {"rank": 4, "steps": -1}),
        ("window+favor", {"window": 4, "rank": -3}),
    ],
)
def test_bad_values_are_refused(method: str, parameters: dict[str, int]) -> None:
    with pytest.raises(SbpatchError, match="at least"):
        Scatterbrain(method, SITE, 0, **parameters)


def test_a_grid_window_needs_a_grid() -> None:
    with pytest.raises(SbpatchError, match="Use window"):
        Scatterbrain("window2d", Geometry(96, 2, 8), 0, window=3)


@pytest.mark.parametrize("method", ["clusters", "window+clusters", "lsh+clusters"])
def test_clusters_are_not_causal(method: str) -> None:
    parameters = {"window": {"window": 64}, "lsh": {"bucket": 9}}.get(method.split("+")[0], {})
    with pytest.raises(SbpatchError, match="the future included"):
        Scatterbrain(method, Geometry(96, 2, 8, causal=True), 0, rank=4, **parameters)


def test_a_name_is_registered_once() -> None:
    class Other(Sparse):
        pass

    before = PARTS["window"]
    with pytest.raises(ValueError, match="registered twice"):
        register("window")(Other)
    assert PARTS["window"] is before


def test_a_new_part_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbpatch.attention.registry.PARTS", dict(PARTS))

    @register("mine")
    class Mine(nn.Module):
        kind = "low-rank"

    assert parse_method("window+mine") == ("window", "mine")
