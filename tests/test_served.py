"""The served example of docs/deployment.md, started as a reader would: answers of the models, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ROOT, plan_for, vit
from tiny_text import llama
from torch import nn

from sbpatch.data.batch import Inputs, run
from sbpatch.evaluation.runtimes import ONNX, Answer
from sbpatch.plan.patch import patch


@contextmanager
def serving(*files: Path) -> Iterator[str]:
    """The example's address, while it runs."""
    script = ROOT / "docs" / "examples" / "serve_onnx.py"
    arguments = [sys.executable, str(script), *map(str, files), "--port", "0", "--threads", "1"]
    server = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


def asked(url: str, request: Any) -> tuple[int, dict[str, Any]]:
    data = request if isinstance(request, bytes) else json.dumps(request).encode()
    try:
        with urllib.request.urlopen(url, data, timeout=60) as found:
            return found.status, json.load(found)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def exported(model: nn.Module, inputs: Inputs, path: Path) -> Path:
    ONNX.write(Answer(model).eval(), inputs, path)
    return path


@pytest.mark.slow
def test_images_are_answered_and_wrong_requests_refused(tmp_path):
    model = vit(depth=1)
    patch(model, plan_for(model, "clusters"))
    images = torch.randn(3, 3, 64, 64)
    with serving(exported(model, images, tmp_path / "x.onnx")) as url:
        status, body = asked(url, {"images": images[:2].tolist()})
        assert status == 200
        with torch.inference_mode():
            np.testing.assert_allclose(body["answer"], model(images[:2]), atol=1e-5)
        wrong = (b"{", b"[]", b'{"images": 1e999}', {"images": "x"}, {"images": [[1.0]]}, {"images": []}, {"other": 1})
        for request in wrong:
            status, body = asked(url, request)
            assert status == 400
            assert body["error"]
        assert asked(url, {"images": images[2:].tolist()})[0] == 200  # it still answers


@pytest.mark.slow
def test_a_text_goes_to_the_shortest_file_that_takes_it(tmp_path):
    """Its answers are those of the text alone, at its own length."""
    model = llama(num_hidden_layers=1)
    files = []
    for tokens in (24, 12):
        ids = torch.randint(3, 60, (2, tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        files.append(exported(model, inputs, tmp_path / f"{tokens}.onnx"))
    with serving(*files) as url:
        for tokens in (5, 12, 20):
            ids = torch.randint(3, 60, (1, tokens))
            mask = torch.ones_like(ids)
            status, body = asked(url, {"input_ids": ids.tolist(), "attention_mask": mask.tolist()})
            assert status == 200
            with torch.inference_mode():
                expected = run(model, {"input_ids": ids, "attention_mask": mask})
            np.testing.assert_allclose(body["answer"], expected, atol=1e-4)
        long = np.ones((1, 25), int).tolist()
        assert "the longest file takes 24" in asked(url, {"input_ids": long, "attention_mask": long})[1]["error"]
