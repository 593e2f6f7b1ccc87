"""What needs a CUDA device: layers by compiled kernels, memory, timing and the commands. Skipped where there is none."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sbpatch.attention import Geometry, Scatterbrain, kernels
from sbpatch.attention.kmeans import members
from sbpatch.attention.per_head import Exact, PerHead
from sbpatch.cli.commands import app
from sbpatch.measure import elapsed_ms, peak_memory_bytes, without_launches
from sbpatch.sites.calls import Call
from sbpatch.sites.swap import PatchedSite

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LAYERS: list[tuple[str, dict[str, int], bool, int]] = [  # method, parameters, causal, key heads of four
    ("blocks", {"near": 128, "block": 64, "blocks": 3, "tile": 64}, True, 2),
    ("clusters", {"rank": 90}, False, 4),
    ("local+clusters", {"side": 64, "tile": 128, "rank": 60}, False, 4),
    ("sinks", {"window": 100}, True, 4),
    ("coreset", {"rank": 60}, False, 4),
]


def layer_and_call(method: str, parameters: dict[str, int], causal: bool, key_heads: int, n: int = 1000) -> Any:
    layer = Scatterbrain(
        method, Geometry(n, 4, 64, causal, key_heads=key_heads if key_heads < 4 else 0), 0, **parameters
    )
    return layer, [torch.randn(2, heads, n, 64) for heads in (4, key_heads, key_heads)]


@pytest.mark.parametrize(("method", "parameters", "causal", "key_heads"), LAYERS)
def test_a_gpu_computes_what_a_cpu_does(method: str, parameters: dict[str, int], causal: bool, key_heads: int) -> None:
    layer, call = layer_and_call(method, parameters, causal, key_heads)
    expected = layer(*call)
    layer, call = layer.cuda(), [x.cuda() for x in call]
    found = layer(*call)
    assert (found.cpu() - expected).norm() <= 2e-5 * expected.norm()
    assert found.equal(layer(*call))


@pytest.mark.parametrize(("method", "parameters", "causal", "key_heads"), LAYERS)
def test_bfloat16_differs_by_its_rounding_alone(
    method: str, parameters: dict[str, int], causal: bool, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, call = layer_and_call(method, parameters, causal, key_heads)
    layer, call = layer.cuda(), [x.cuda().bfloat16() for x in call]
    found, wide = layer(*call).float(), [x.float() for x in call]
    monkeypatch.setattr(kernels, "chosen", lambda x: False)
    expected = layer(*wide)
    if "clusters" not in method:
        off = (found - expected).norm(dim=-1) > 0.02 * expected.norm(dim=-1)
        assert not off.any()
        return
    # Lloyd steps of rounded keys end elsewhere; these clusters are as good
    exact = Exact(layer.site)(*wide)
    assert (found - exact).norm() <= 1.02 * (expected - exact).norm()


@pytest.mark.parametrize(("method", "parameters", "causal", "key_heads"), LAYERS)
def test_no_layer_waits_for_the_device(method: str, parameters: dict[str, int], causal: bool, key_heads: int) -> None:
    layer, call = layer_and_call(method, parameters, causal, key_heads)
    layer, call = layer.cuda(), [x.cuda() for x in call]
    with torch.no_grad():
        expected = layer(*call)  # also compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert layer(*call).shape == expected.shape
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer(*call)
        graph.replay()
        assert found.equal(expected)


def test_groups_of_heads_run_side_by_side_in_a_graph() -> None:
    site = Geometry(2000, 6, 64, True, key_heads=3)
    sizes = ({"near": 64, "block": 64, "blocks": 2, "tile": 64}, {"near": 128, "block": 64, "blocks": 1, "tile": 64})
    layers = [Scatterbrain("blocks", site.of_heads(2), 0, **size) for size in sizes]
    layer = PerHead(site, [[0, 1], [4, 5], [2, 3]], [*layers, Exact(site.of_heads(2))]).cuda()
    call = [torch.randn(1, heads, 2000, 64, device="cuda") for heads in (6, 3, 3)]
    with torch.no_grad():
        expected = layer(*call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer(*call)
        for _ in range(3):
            found.zero_()
            graph.replay()
            assert found.equal(expected)


def site_and_calls(method: str, parameters: dict[str, int], causal: bool, key_heads: int, calls: int) -> Any:
    """A patched site, calls of one shape, and a list that grows each time its layer runs from Python."""
    layer, _ = layer_and_call(method, parameters, causal, key_heads)
    ran: list[bool] = []
    layer.register_forward_hook(lambda *_: ran.append(True))
    made = [
        Call(
            *(torch.randn(2, 1000, h, 64, device="cuda").transpose(1, 2) for h in (4, key_heads, key_heads)),
            is_causal=causal,
        )
        for _ in range(calls)
    ]
    return PatchedSite("site", layer, graphs=True).cuda(), made, ran


@pytest.mark.parametrize(("method", "parameters", "causal", "key_heads"), LAYERS)
def test_a_site_replays_what_its_layer_computes(
    method: str, parameters: dict[str, int], causal: bool, key_heads: int
) -> None:
    """From the third call of a shape on without Python, to the same bits; sites of one shape take turns in one place."""
    once = 4  # runs of the first two calls: as it is, twice to see that it waits for nothing, and captured
    one, calls, ran = site_and_calls(method, parameters, causal, key_heads, 4)
    other, _, _ = site_and_calls(method, parameters | ({"first": 9} if causal else {}), causal, key_heads, 0)
    with torch.inference_mode():
        expected = [(call.through(one.layer), call.through(other.layer)) for call in calls]
        ran.clear()
        found = [(one(call), other(call)) for call in calls]
        assert len(ran) == once
        assert all(x.equal(y) for pair in zip(found, expected, strict=True) for x, y in zip(*pair, strict=True))
    with torch.no_grad():
        assert one(calls[0]).equal(expected[0][0])
    assert len(ran) == once
    moved = copy.deepcopy(one).cpu().cuda()  # its tensors lie elsewhere, and so do those of the site itself after this
    one.cpu().cuda()
    with torch.inference_mode():
        for site in (moved, one):
            assert site(calls[1]).equal(expected[1][0])
    assert len(ran) == once + 2


def test_gradients_are_not_replayed() -> None:
    site, (call,), ran = site_and_calls(*LAYERS[0], 1)
    call.query.requires_grad_()
    for _ in range(3):
        site(call).sum().backward()
    assert len(ran) == 3
    assert call.query.grad.isfinite().all()


def test_sums_of_clusters_are_the_same_bits_on_every_run() -> None:
    k, v, index = (
        torch.randn(2, 3, 5000, 64).cuda(),
        torch.randn(2, 3, 5000, 32).cuda(),
        torch.randint(50, (2, 3, 5000)).cuda(),
    )
    for one, other in zip(members(k, v, index, 50, None), members(k, v, index, 50, None), strict=True):
        assert one.equal(other)


def test_memory_and_time_are_the_device_s() -> None:
    x = torch.randn(1024, 1024, device="cuda")
    assert 4 << 20 <= peak_memory_bytes(lambda: x + 1, x.device) < 8 << 20
    _, launched = elapsed_ms(lambda: [x + 1 for _ in range(200)], x.device)
    _, replayed = elapsed_ms(without_launches(lambda: [x + 1 for _ in range(200)], x.device), x.device)
    assert 0 < replayed < launched


def test_bench_on_the_device(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = [
        "bench",
        "--device",
        "cuda",
        "--dtype",
        "bfloat16",
        "--lengths",
        "2048",
        "--methods",
        "blocks,sinks",
        "--causal",
    ]
    result = CliRunner().invoke(app, [*options, "--budget", "0.2", "--json", str(file)])
    assert result.exit_code == 0, result.output
    by_method = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert {"sdpa", "eager", "blocks", "sinks"} <= by_method.keys()
    assert all(row["launched_ms"] > 0 and row["peak_memory_bytes"] > 0 for row in by_method.values())


@pytest.mark.slow
def test_calibrate_and_eval_the_demo(tmp_path: Path) -> None:
    options = ["--device", "cuda", "--samples", "8", "--quiet"]
    result = CliRunner().invoke(
        app, ["calibrate", "t2t-vit-demo", "--keep-slow", "-o", str(tmp_path / "patched"), *options]
    )
    assert result.exit_code == 0, result.output
    file = tmp_path / "eval.json"
    run = [
        "eval",
        str(tmp_path / "patched"),
        "--dataset",
        "demo",
        "--limit",
        "16",
        "--device",
        "cuda",
        "--json",
        str(file),
    ]
    result = CliRunner().invoke(app, run)
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text())["variants"]["patched"]["agreement"] > 90
