"""Models whose queries and keys are of different numbers: found, calibrated, patched, measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny import command, refused
from torch import Tensor, nn

from sbpatch.attention import Geometry, Scatterbrain
from sbpatch.calibration.candidates import auto_methods
from sbpatch.calibration.costs import CostTable
from sbpatch.calibration.stages import calibrate
from sbpatch.data.batch import Inputs
from sbpatch.errors import SbpatchError
from sbpatch.evaluation.accounting import affordable, attention_memory_bytes
from sbpatch.evaluation.evaluate import Subject
from sbpatch.plan.patch import patch, unpatch
from sbpatch.plan.plan import PLAN_FILE, Plan, SitePlan
from sbpatch.sites.calls import Call
from sbpatch.sites.fidelity import head_profile, matrix_error, second_moments
from sbpatch.sites.find import Site, find_sites
from sbpatch.sites.swap import PatchedSite, swapped
from sbpatch.study import bench_model, compare


class PooledAttention(nn.Module):
    """BigGAN's self-attention: keys and values pooled by two, values four times as wide as keys, no head dimension, no scale,
    (V A^T) in place of (A V).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.theta, self.phi = (nn.Conv2d(width, width // 8, 1, bias=False) for _ in range(2))
        self.g, self.out = nn.Conv2d(width, width // 2, 1, bias=False), nn.Conv2d(width // 2, width, 1, bias=False)
        self.pool, self.softmax, self.gamma = nn.MaxPool2d(2), nn.Softmax(dim=-1), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (y.flatten(2) for y in (self.theta(x), self.pool(self.phi(x)), self.pool(self.g(x))))
        weights = self.softmax(torch.bmm(theta.permute(0, 2, 1), phi))
        read = torch.bmm(g, weights.permute(0, 2, 1)).view(len(x), -1, *x.shape[-2:])
        return x + self.gamma * self.out(read)


class Generator(nn.Module):
    """Noise (B, 8) and a class (B, 4) -> images (B, 3, side, side); attention among all pixels."""

    def __init__(self, side: int = 32, width: int = 32) -> None:
        super().__init__()
        self.start, self.side = nn.Linear(12, 16 * width), side
        self.attention, self.rgb = PooledAttention(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        x = self.start(torch.cat((z, label), dim=1)).unflatten(1, (-1, 4, 4))
        return self.rgb(self.attention(F.interpolate(x, size=(self.side, self.side), mode="bicubic"))).tanh()


def generator(**change: int) -> Generator:
    torch.manual_seed(0)
    model = Generator(**change).eval()
    for layer in (model.attention.theta, model.attention.phi):
        nn.init.normal_(layer.weight, std=0.5)
    return model


def noise(count: int, seed: int = 1) -> dict[str, Tensor]:
    z = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return {"z": z, "label": F.one_hot(torch.arange(count) % 4, 4).float()}


def pvt() -> nn.Module:
    """PVT v2 with 256 queries against 64 keys in stage 1, 64 against 16 in stage 2, at 64 px."""
    torch.manual_seed(0)
    return timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), sr_ratios=(2, 2, 1, 1), num_classes=5).eval()


def test_biggans_attention_is_a_site() -> None:
    model, x = generator(), noise(1)
    (site,) = find_sites(model, x)
    assert (site.name, site.unsupported) == ("attention", None)
    assert site.geometry == Geometry(256, 1, 4, queries=1024, value_dim=16)
    expected = model(**x)
    seen: list[Call] = []
    with swapped(model, {"attention": lambda call: seen.append(call) or call.exact()}):  # type: ignore[func-returns-value]
        torch.testing.assert_close(model(**x), expected)
    assert [tuple(t.shape) for t in (seen[0].query, seen[0].key, seen[0].value)] == [
        (1, 1, 1024, 4),
        (1, 1, 256, 4),
        (1, 1, 256, 16),
    ]
    assert seen[0].softmax_scale == 1
    assert torch.equal(model(**x), expected)


def test_pooled_attention_compiles_and_exports() -> None:
    model, x = nn.Sequential(PooledAttention(32)).eval(), torch.randn(2, 32, 16, 16)
    (site,) = find_sites(model, x[:1])
    layer = Scatterbrain("clusters", site.geometry, 0, rank=9)
    with torch.inference_mode(), swapped(model, {site.name: PatchedSite(site.name, layer)}):
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected)
        torch.compiler.reset()
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected, atol=1e-4, rtol=1e-4)


def test_a_module_that_uses_its_weights_otherwise_is_left_as_it_is() -> None:
    """The transposed weights are added to, or multiplied from the other side than BigGAN does."""

    class Other(PooledAttention):
        def forward(self, x: Tensor) -> Tensor:
            theta, phi = self.theta(x).flatten(2), self.pool(self.phi(x)).flatten(2)
            weights = self.softmax(torch.bmm(theta.transpose(1, 2), phi)).transpose(1, 2)
            return x + torch.bmm(weights, x.flatten(2).mT).mean() + (weights + 1).mean()

    x = torch.randn(2, 32, 8, 8)
    model = nn.Sequential(Other(32)).eval()
    (site,) = find_sites(model, x)
    assert site.unsupported is not None
    expected = model(x)
    with swapped(model, {site.name: Call.exact}):
        assert "another way" in refused(model, x)
    assert torch.equal(model(x), expected)


def test_another_product_of_a_patched_module_is_multiplied_out() -> None:
    """What it puts out is a tensor, whether or not anything was done with the product."""

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            read = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
            return torch.bmm(read, x.mT), torch.bmm(x, read.mT).transpose(1, 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.two(x)
            return one + other

    model, x = Model(), torch.randn(2, 9, 4)
    (site,) = find_sites(model, x)
    expected = model(x)
    with swapped(model, {site.name: Call.exact}):
        assert all(isinstance(y, Tensor) for y in model.two(x))
        torch.testing.assert_close(model(x), expected)


def test_the_packages_own_biggan_is_found() -> None:
    biggan = pytest.importorskip("pytorch_pretrained_biggan", reason="pytorch-pretrained-biggan is not installed")
    config = biggan.BigGANConfig(
        output_dim=32, z_dim=8, channel_width=16, num_classes=5, attention_layer_position=2, n_stats=3,
        layers=[(True, 16, 16), (True, 16, 8), (False, 8, 4), (True, 4, 2), (False, 2, 1)],
    )  # fmt: skip
    torch.manual_seed(0)
    model = biggan.BigGAN(config)
    with torch.no_grad():
        for _ in range(20):  # spectral norms are found by power iteration, a step each
            model(torch.randn(1, 8), torch.ones(1, 5), 0.4)
    attention = next(m for m in model.modules() if type(m).__name__ == "SelfAttn")
    nn.init.ones_(attention.gamma)

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, z: Tensor, class_label: Tensor) -> Tensor:
            return self.model(z, class_label, 0.4)

    x = {"z": torch.randn(2, 8), "class_label": F.one_hot(torch.arange(2), 5).float()}
    one = {name: tensor[:1] for name, tensor in x.items()}
    cut = Cut().eval()
    (site,) = find_sites(cut, one)
    assert site.unsupported is None
    assert site.geometry == Geometry(64, 1, 16, queries=256, value_dim=64)
    expected = cut(**x)
    layer = Scatterbrain("topk", site.geometry, 0, keys=63)
    with torch.inference_mode(), swapped(cut, {site.name: PatchedSite(site.name, layer)}):
        torch.testing.assert_close(cut(**x), expected, atol=1e-3, rtol=1e-3)


def test_a_generator_is_calibrated_and_patched(tmp_path: Path) -> None:
    model, batches = generator(), [noise(4), noise(4, 2)]
    expected = model(**batches[0])
    plan = calibrate(model, batches, budget=0.1, keep_slow=True)
    (site,) = plan.sites
    assert (site.tokens, site.queries, site.value_dim, site.decision) == (256, 1024, 16, "patch")
    assert site.entries == 1024 * 256
    assert plan.budget.used <= 0.1
    assert site.output_error is not None
    assert site.output_error < 0.2
    (tmp_path / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
    again = Plan.read(tmp_path / PLAN_FILE, plan.tensors)
    assert again.sites == plan.sites
    patch(model, again)
    with torch.inference_mode():
        found = model(**batches[0])
    unpatch(model)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert torch.equal(model(**batches[0]), expected)


def test_methods_are_compared_on_a_generator() -> None:
    model = generator()
    evaluation: list[tuple[Inputs, Tensor]] = [(noise(4, 3), torch.full((4,), -1))]
    rows = compare.compare(
        model, [noise(4)], evaluation, methods=["clusters", "window", "auto"], budgets=[0.1], answer="features"
    )
    by = {row["method"]: row for row in rows}
    assert "1024 queries read 256 keys" in by["window"]["skipped"]
    assert by["auto"]["output_error"] <= by["clusters"]["output_error"] * 1.05
    assert by["clusters"]["budget"] <= 0.1
    assert by["clusters"]["cosine"] > 0.99


def test_auto_leaves_out_what_goes_by_position() -> None:
    site = SitePlan.of(Site("a", "A", Geometry(64, 2, 8, grid=(8, 8), queries=256)), "patch", "")
    site.entropy_ratio = 0.5
    assert set(auto_methods(site)) == {"clusters", "coreset", "lsh+clusters", "top-clusters+clusters"} - {"clusters"}


@pytest.mark.parametrize("queries", [1, 5, 64, 300])
def test_a_patched_site_takes_other_numbers_of_queries_and_keys(queries: int) -> None:
    """Few queries cost exact attention less than any choice of keys; a square call is no different from another."""
    site = Geometry(64, 2, 8, queries=256)
    patched = PatchedSite("a", Scatterbrain("clusters", site, 0, rank=9))
    call = Call(torch.randn(1, 2, queries, 8), *torch.randn(2, 1, 2, 64, 8))
    found = patched(call)
    assert found.shape == call.query.shape
    assert torch.equal(found, call.exact()) == (queries <= 10)
    square = PatchedSite("a", Scatterbrain("clusters", Geometry(64, 2, 8), 0, rank=9))
    if queries != 64:
        assert "self-attention" in refused(square, call)


def test_figures_of_a_call_are_those_of_its_matrix() -> None:
    q, k, v = torch.randn(2, 2, 40, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 5)
    mask = torch.arange(12) < torch.tensor([[12], [7]])
    for key_mask in (None, mask):
        call = Call(q, k, v, key_mask=key_mask)
        logits = q @ k.mT / 8**0.5
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
        p = logits.softmax(-1)
        profile = head_profile(call, rows=64)
        torch.testing.assert_close(profile["entropy"], -torch.xlogy(p, p).sum(-1).mean(-1))
        torch.testing.assert_close(profile["sink_mass"], p[..., :4].sum(-1).mean(-1))
        layer = Scatterbrain("clusters", Geometry(12, 2, 8, queries=40, value_dim=5), 0, rank=4)
        found = torch.stack([layer(q, k, torch.eye(12).expand(2, 2, 12, 12), key_mask)])[0]
        wrong = torch.linalg.matrix_norm(found - p) / torch.linalg.matrix_norm(p)
        torch.testing.assert_close(matrix_error(layer, call, columns=5), wrong, atol=1e-4, rtol=1e-4)
        query, _ = second_moments(call)
        torch.testing.assert_close(query.float(), q.mT @ q / 40 / 8**0.5)


def test_accounting_counts_pairs_of_queries_and_keys() -> None:
    site = SitePlan.of(Site("a", "A", Geometry(64, 2, 8, queries=256)), "exact", "")
    subject = Subject("tiny")
    assert attention_memory_bytes([site], "eager", subject) == 4 * 2 * 256 * 64
    assert attention_memory_bytes([site], "sdpa", subject) == 4 * 2 * 256
    large = site.model_copy(update={"queries": 1 << 16, "tokens": 1 << 14})
    assert "eager" not in affordable([large], None, 1, "float32")
    assert "eager" in affordable([site], None, 1, "float32")


def test_times_are_of_the_sites_own_shape() -> None:
    table = CostTable(None, torch.device("cpu"))
    shapes: list[tuple[torch.Size, ...]] = []

    class Recorder(nn.Module):
        method, parameters_used = "recorder", {}
        site = Geometry(64, 2, 8, queries=256, value_dim=20)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            shapes.append((q.shape[1:], k.shape[1:], v.shape[1:]))
            return q

    table.ms(Recorder())  # type: ignore[arg-type]
    assert set(shapes) == {((2, 256, 8), (2, 64, 8), (2, 64, 20))}
    assert len({key for key in table.rows if "queries=256" in key}) == 2


def test_bench_measures_the_call_as_it_is() -> None:
    rows = bench_model.bench_model(
        pvt(), [(torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64))], ["clusters", "window"], budget=0.1
    )
    first = [row for row in rows if row.get("queries") == 256]
    assert {row["tokens"] for row in first} == {64}
    by = {row["method"]: row for row in first}
    assert "256 queries read 64 keys" in by["window"]["skipped"]
    assert by["clusters"]["output_error"] < 1


@pytest.mark.slow
def test_every_command_runs_on_pooled_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PVT v2 with random weights, 1,024 queries against 256 keys in stage 1."""
    folder, data = tmp_path / "pvt", tmp_path / "images"
    change = {"depths": [1, 1, 1, 1], "sr_ratios": [2, 2, 1, 1]}
    torch.manual_seed(0)
    model = timm.create_model("pvt_v2_b0", num_classes=3, **change)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {
        "input_size": [3, 128, 128],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    config = {"architecture": "pvt_v2_b0", "num_classes": 3, "model_args": change, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    for i in range(12):
        path = data / str(i % 3) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (32, 32), torch.randint(256, (3072,), dtype=torch.uint8).numpy().tobytes()).save(path)
    source = ["--data", str(data)]
    plan, out = tmp_path / "inspect.json", tmp_path / "patched"
    with monkeypatch.context() as slow:  # whether a patch pays at so few keys depends on the machine
        slow.setattr(CostTable, "exact_ms", lambda self, site: 1e3)
        assert command("inspect", str(folder), "--json", str(plan), "--quiet") == 0
    site = json.loads(plan.read_text())["sites"][0]
    assert (site["queries"], site["tokens"], site["decision"]) == (1024, 256, "patch")
    asked = ["--samples", "4", "--budget", "0.1", "--keep-slow", "--quiet"]
    assert command("calibrate", str(folder), "-o", str(out), *source, *asked) == 0
    read = Plan.read(out / PLAN_FILE)
    assert read.sites[0].decision == "patch"
    assert "1024/256" in (out / "README.md").read_text()
    found = tmp_path / "eval.json"
    assert command("eval", str(out), "--dataset", str(data), "--json", str(found), "--quiet") == 0
    variants = json.loads(found.read_text())["variants"]
    assert variants["patched"]["attention_memory_bytes"] < variants["eager"]["attention_memory_bytes"] / 4
    rows = tmp_path / "compare.json"
    arguments = [
        "--dataset",
        str(data),
        "--methods",
        "clusters,window",
        "--budgets",
        "0.1",
        "--samples",
        "4",
        "--quiet",
    ]
    assert command("compare", str(folder), *arguments, "--json", str(rows)) == 0
    by = {row["method"]: row for row in json.loads(rows.read_text())["rows"]}
    assert by["clusters"]["output_error"] < 1
    assert "queries read" in by["window"]["skipped"]
    assert command("analyze", str(folder), "-o", str(tmp_path / "analysis"), *source, "--samples", "1", "--quiet") == 0


def test_calibration_by_a_method_of_positions_is_refused() -> None:
    with pytest.raises(SbpatchError, match="1024 queries read 256 keys"):
        calibrate(generator(), [noise(2)], method="window+clusters", keep_slow=True)
