"""Where replayed calls find their inputs and leave their output. What is captured needs a device: see test_cuda.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.sites import graphs
from sbpatch.sites.calls import Call
from sbpatch.sites.graphs import Replays
from sbpatch.sites.swap import PatchedSite

SITE = Geometry(96, 4, 16)


def layer(seed: int) -> Scatterbrain:
    return Scatterbrain("local+favor", SITE, seed, side=8, tile=16, rank=24)


def call(seed: int, n: int = 96) -> list[Tensor]:
    """As a model lays them out, (B, n, H, d)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, 4, 16, generator=generator).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize("grad", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_sites_of_one_shape_take_turns_in_one_place(grad: type) -> None:
    """Whatever was called before, and in whichever mode; no output is overwritten by a later call."""
    first, second = layer(0), layer(1)
    replays = {first: Replays(), second: Replays()}
    with torch.inference_mode():
        for one in (first, second):
            replays[one].attend(one, *call(0), None)
    found, expected = [], []
    with grad():
        for seed in range(1, 4):
            for one in (first, second):
                found.append(replays[one].attend(one, *call(seed), None))
                expected.append(one(*call(seed)))
    assert all(x.equal(y) for x, y in zip(found, expected, strict=True))
    places = {id(graph.place) for kept in replays.values() for graph in kept._graphs.values()}
    assert len(places) == 1


def test_the_scale_and_the_shape_are_parts_of_a_call() -> None:
    one, replays = layer(0), Replays()
    with torch.inference_mode():
        for _ in range(3):
            for n, scale in ((96, None), (96, 0.5), (70, None)):
                assert replays.attend(one, *call(n, n), scale).equal(one(*call(n, n), scale=scale))


def test_the_latest_shapes_are_kept_and_the_first_call_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(work, device, pool):
        made.append(work)
        return work

    monkeypatch.setattr(graphs, "without_launches", counted)
    one, replays = layer(0), Replays()
    with torch.inference_mode():
        for n in range(60, 96, 2):
            replays.attend(one, *call(0, n), None)
        assert not made
        for expected in (1, 1):
            replays.attend(one, *call(0, 94), None)
            assert len(made) == expected
        replays.attend(one, *call(0, 60), None)  # forgotten, so that this is its first call again
        assert len(made) == 1
    assert len(replays._graphs) == graphs.SHAPES
    assert not copy.deepcopy(replays)._graphs
    replays.clear()
    assert not replays._graphs


def test_on_a_cpu_and_with_gradients_nothing_is_replayed() -> None:
    site = PatchedSite("site", layer(0), graphs=True)
    q, k, v = call(0)
    q.requires_grad_()
    for _ in range(3):
        assert site(Call(q, k, v)).requires_grad
    with torch.inference_mode():
        for _ in range(3):
            site(Call(*call(1)))
    assert not site._replays._graphs
