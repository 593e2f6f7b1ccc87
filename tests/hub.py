"""A local stand-in of the Hugging Face hub: repositories in memory, behind the parts of its HTTP interface that we use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_stand_in"


class Hub:
    """What was pushed: {owner/name: {path: bytes}}, and how often it was changed."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits = 0
        self.url = ""

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, status: int, body: bytes | dict[str, Any] | list[Any], **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", headers.get("length", str(len(data))))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            whole = b""
            while size := int(self.rfile.readline(), 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole

        def do_POST(self) -> None:
            sent = self.body()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid credentials"})
            if self.path == "/api/validate-yaml":
                front = json.loads(sent)["content"].split("---\n")[1]
                wrong = [] if isinstance(yaml.safe_load(front), dict) else [{"message": "no metadata"}]
                return self.answer(400 if wrong else 200, {"errors": wrong, "warnings": []})
            if self.path == "/api/repos/create":
                asked = json.loads(sent)
                name = f"{asked['organization'] or 'me'}/{asked['name']}"
                there = name in hub.repositories
                hub.repositories.setdefault(name, {})
                hub.private.setdefault(name, asked.get("visibility") == "private" or asked.get("private") is True)
                return self.answer(409 if there else 200, {"url": f"{hub.url}/{name}"})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
                files = [file["path"] for file in json.loads(sent)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
                return self.answer(200, {"files": modes})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
                files = hub.repositories[found[1]]
                for line in map(json.loads, sent.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        del files[line["value"]["path"]]
                hub.commits += 1
                return self.answer(
                    200, {"success": True, "commitUrl": f"{hub.url}/{found[1]}/commit/{hub.sha}", "commitOid": hub.sha}
                )
            return self.answer(404, {"error": self.path})

        def do_GET(self) -> None:
            if self.path == "/":
                return self.answer(200, {})
            found = re.match(r"/api/models/([^/]+/[^/]+?)(/.*|$)", self.path)
            name = found[1] if found else "/".join(self.path.split("/")[1:3])
            files = hub.repositories.get(name)
            if files is None:
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            if found and found[2].startswith("/tree"):
                tree = [{"type": "file", "path": p, "size": len(x), "oid": git_sha1(x)} for p, x in files.items()]
                return self.answer(200, tree)
            if found:
                siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
                return self.answer(200, {"id": name, "modelId": name, "sha": hub.sha, "siblings": siblings})
            _, _, rest = self.path.partition("/resolve/")
            data = files.get(rest.partition("/")[2].partition("?")[0])
            if data is None:
                return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return self.answer(200, data, X_Repo_Commit=hub.sha, ETag=f'"{git_sha1(data)}"')

        do_HEAD = do_GET

    return Handler


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def served() -> Iterator[Hub]:
    """A hub at `url`, while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
