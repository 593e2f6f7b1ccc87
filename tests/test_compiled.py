"""A package that AOTInductor compiled: run by a Python that has no sbpatch, and by the C++ example of docs/deployment.md."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ROOT, checkpoint_of, plan_for, t2t

import sbpatch
from sbpatch.evaluation.export import Format, export
from sbpatch.plan import artifact

PAGE = ROOT / "docs" / "deployment.md"
SCRIPT = """
import sys, numpy, torch
images = torch.from_numpy(numpy.fromfile(sys.argv[2], numpy.float32)).reshape(-1, 3, 64, 64)
answer = torch._inductor.aoti_load_package(sys.argv[1])(images)
assert "sbpatch" not in sys.modules
print("\\n".join(" ".join(str(float(x)) for x in row) for row in answer))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor generates C++ here, and there is no g++"),
]


def ran(command: list[str], images: Path) -> np.ndarray:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with images.open("rb") as standard_input:
        done = subprocess.run(
            command,
            stdin=standard_input,
            capture_output=True,
            text=True,
            timeout=200,
            env=environment,
            cwd=images.parent,
        )
    assert done.returncode == 0, done.stderr
    return np.array([[float(x) for x in line.split()] for line in done.stdout.splitlines()])


def built(folder: Path) -> Path:
    """The example, compiled by the command that the page has."""
    text = PAGE.read_text(encoding="utf-8")
    start = text.index("g++ -std")
    line = text[start : text.index("./run_pt2", start)]
    place = {"TORCH": str(Path(torch.__file__).parent), "PATH": os.environ["PATH"]}
    command = line.replace("docs/examples/", f"{ROOT}/docs/examples/")
    subprocess.run(command, shell=True, check=True, cwd=folder, env=os.environ | place, timeout=230)
    return folder / "run_pt2"


def test_a_compiled_package_runs_without_sbpatch(tmp_path):
    model = t2t()
    artifact.save(tmp_path / "out", checkpoint_of(model, tmp_path), plan_for(model, "clusters"))
    images = torch.randn(3, 3, 64, 64)
    assert export(tmp_path / "out", Format.pt2, tmp_path / "x.pt2", images, compiled=True) < 1e-4
    others = torch.randn(5, 3, 64, 64)  # another number of samples
    others.numpy().tofile(tmp_path / "images.f32")
    with torch.inference_mode():
        expected = sbpatch.load(tmp_path / "out")(others).numpy()
    files = [str(tmp_path / "x.pt2"), str(tmp_path / "images.f32")]
    found = ran([sys.executable, "-c", SCRIPT, *files], tmp_path / "images.f32")
    np.testing.assert_allclose(found, expected, atol=1e-4)
    found = ran([str(built(tmp_path)), files[0], "3", "64", "64"], tmp_path / "images.f32")
    np.testing.assert_allclose(found, expected, atol=1e-4)
