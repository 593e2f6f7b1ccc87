"""Answer HTTP requests with exported ONNX files: `python serve_onnx.py patched.onnx [longer.onnx ...] [--port 8000]`.

    curl -d '{"input_ids": [[5, 9, 2]], "attention_mask": [[1, 1, 1]]}' http://127.0.0.1:8000/
    {"answer": [[...]], "milliseconds": 3.1}

A request is a JSON object of the file's inputs by name, any number of samples. Texts go to the shortest file that takes them
and are padded to its length; what it answers at padding is cut off again. Needs onnxruntime and numpy, and no torch.
"""

from __future__ import annotations

import argparse
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import onnxruntime

MOST_BYTES = 64 << 20  # of a request
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Model:
    """One exported file."""

    def __init__(self, path: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {one.name: one for one in self.session.get_inputs()}
        self.text = "input_ids" in self.inputs
        self.length = self.inputs["input_ids"].shape[1] if self.text else 0

    def run(self, given: dict[str, np.ndarray]) -> np.ndarray:
        """The answer, (samples, ...); of a text that answers by token, (samples, tokens, ...)."""
        tokens = 0
        if self.text:
            tokens = given["input_ids"].shape[1]
            room = ((0, 0), (0, self.length - tokens))
            given = {name: np.pad(array, room) for name, array in given.items()}
        (answer,) = self.session.run(None, given)
        by_token = self.text and answer.ndim == 3 and answer.shape[1] == self.length
        return answer[:, :tokens] if by_token else answer


def arrays(model: Model, request: Any) -> dict[str, np.ndarray]:
    """The request's values as the file takes them, texts of any length.

    Raises:
        ValueError: one is missing, unknown, or of another shape.
    """
    if not isinstance(request, dict) or request.keys() != model.inputs.keys():
        raise ValueError(f"give a JSON object with {', '.join(model.inputs)}")
    found = {}
    for name, wanted in model.inputs.items():
        array = np.asarray(request[name], dtype=TYPES[wanted.type])
        shape = (None, None) if model.text else (None, *wanted.shape[1:])
        if len(array.shape) != len(shape) or any(b not in (None, a) for a, b in zip(array.shape, shape, strict=True)):
            raise ValueError(f"{name} has the shape {array.shape}, not {('samples', *wanted.shape[1:])}")
        found[name] = array
    if len({array.shape for array in found.values()}) > 1 or not all(array.size for array in found.values()):
        raise ValueError("the inputs are empty, or of several shapes")
    return found


def answer(models: list[Model], request: Any) -> dict[str, Any]:
    """The answer to one request, by the shortest file that takes it."""
    given = arrays(models[0], request)
    tokens = given["input_ids"].shape[1] if models[0].text else 0
    fitting = [model for model in models if model.length >= tokens]
    if not fitting:
        raise ValueError(f"{tokens} tokens: the longest file takes {models[-1].length}")
    start = time.perf_counter()
    found = fitting[0].run(given)
    return {"answer": found.tolist(), "milliseconds": round(1e3 * (time.perf_counter() - start), 1)}


def handler(models: list[Model]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                size = int(self.headers.get("Content-Length", -1))
                if not 0 <= size <= MOST_BYTES:
                    raise ValueError(f"a request has a Content-Length of at most {MOST_BYTES}")
                status, body = 200, answer(models, json.loads(self.rfile.read(size)))
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                status, body = 400, {"error": str(error)}
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="exported .onnx files: one, or of a text model one for each length")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=0, help="of one request; 0: all")
    given = parser.parse_args()
    models = sorted((Model(path, given.threads) for path in given.files), key=lambda model: model.length)
    server = ThreadingHTTPServer(("127.0.0.1", given.port), handler(models))
    print(f"http://127.0.0.1:{server.server_address[1]}/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
