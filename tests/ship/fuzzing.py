"""Hostile bytes for what speaks over a network: requests to the server, answers to the client, a device's state.

Requests go through the whole ASGI application with a token for everything; an answer of 500 or above, or anything that
escapes, is a finding. Mutations and the loop over them are those of tests/package/fuzzing.py.
"""

import asyncio
import http.client
import io
import json
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from package.fuzzing import Target, Written
from package.samples import save_model
from ship.conftest import Running

from moestro.core.config import build
from moestro.core.errors import Error
from moestro.package.api import MANIFEST, Manifest, Options, Release, pack
from moestro.ship.app import make_app
from moestro.ship.edge import Edge, State, Version
from moestro.ship.pull import Guard, find, offered
from moestro.ship.push import push
from moestro.ship.settings import ServerSettings
from moestro.ship.store import Store
from moestro.ship.transport import Connection, Server

UNLIMITED = {"requests_per_s": 1e9, "burst_requests": 10**9, "failures_per_s": 1e9}


class Client:
    """Sends requests, written as `METHOD path?query`, header lines, an empty line, the body, to an application."""

    def __init__(self, folder: Path, token: str) -> None:
        settings = build(ServerSettings, {"plain": True, "rates": UNLIMITED})
        self.store, self.token = Store.open(folder), token
        self.app, self.loop = make_app(self.store, settings), asyncio.new_event_loop()

    def close(self) -> None:
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.store.db.close()

    def send(self, data: bytes) -> None:
        head, _, body = data.partition(b"\n\n")
        first, *lines = head.split(b"\n")
        method, _, target = first.decode("latin-1").partition(" ")
        path, _, query = target.partition("?")
        headers = [(name.strip().lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
        headers.append((b"authorization", b"Bearer " + self.token.encode()))
        scope = {
            "type": "http",
            "http_version": "1.1",
            "scheme": "http",
            "method": method.upper(),
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode("latin-1"),
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        status = self.loop.run_until_complete(self._answer(scope, body))
        assert 200 <= status < 500, f"answered {status}"

    async def _answer(self, scope: MutableMapping[str, Any], body: bytes) -> int:
        coming: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
        found: list[int] = []

        async def receive() -> MutableMapping[str, Any]:
            if coming:
                return coming.pop()
            await asyncio.sleep(3600)
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                found.append(message["status"])

        await self.app(scope, receive, send)
        return found[0]


def _requests(package: Path) -> list[bytes]:
    """One good request of most kinds."""
    manifest = Manifest.parse((package / MANIFEST).read_bytes())
    large = max(manifest.files, key=lambda entry: entry.size)
    upload = {"package_id": "demo", "root": "ab" * 32, "size": 3 << 20, "chunk_size": 1 << 20, "hash": "sha256"}
    report = {"package_id": "demo", "state": "active", "sequence": 1, "weights_root": manifest.models[0].weights_root}
    texts = [
        "GET /v1/models?q=de&limit=10&cursor=a",
        "GET /v1/models/demo",
        "GET /v1/packages",
        "GET /v1/packages/demo\nif-none-match: x",
        "GET /v1/packages/demo/transfer?base=1&target=2",
        f"GET /v1/packages/demo/1/manifest?root={manifest.package_root}",
        "GET /v1/packages/demo/1/manifest.sig",
        "DELETE /v1/packages/demo/7",
        f"GET /v1/updates/demo?base={manifest.models[0].weights_root}&accept=exact,qres",
        f'GET /v1/blobs/{large.root}\nrange: bytes=10-99\nif-range: "{large.root}"',
        f"GET /v1/blobs/{large.root}/chunks",
        f"POST /v1/uploads\ncontent-length: 200\n\n{json.dumps(upload)}",
        f"PUT /v1/uploads/{'0' * 32}/3\ncontent-length: 4\ncontent-digest: sha-256=:x:\n\nabcd",
        f"PUT /v1/uploads/{'0' * 32}/leaves\n\n{'a' * 32}",
        f"POST /v1/uploads/{'0' * 32}:commit",
        f"POST /v1/devices/lab-1/reports\n\n{json.dumps(report)}",
        "GET /v1/audit?limit=10",
        f'POST /v1/packages/demo\n\n{{"manifest":"{"QUJD" * 4}","signature":"{"QUJD" * 4}"}}',
        "GET /openapi.json",
        "GET /",
    ]
    return [text.encode() for text in texts]


class _Wire:
    """A socket that has received everything already."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, _: str) -> io.BytesIO:
        return io.BytesIO(self.data)


class _Hostile(http.client.HTTPConnection):
    """A server whose every answer is the same bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__("nowhere")
        self.data = data

    def request(self, *_: object, **__: object) -> None:
        """Nobody listens."""

    def getresponse(self) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(_Wire(self.data))  # type: ignore[arg-type]
        response.begin()
        return response


class _Connection(Connection):
    def __init__(self, data: bytes) -> None:
        super().__init__(Server(url="http://127.0.0.1:1", tries=1))
        self.data = data

    def _opened(self) -> http.client.HTTPConnection:
        return _Hostile(self.data)


def _answer(status: str, body: bytes, kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _answers(package: Path) -> list[Target]:
    data = (package / MANIFEST).read_bytes()
    manifest = Manifest.parse(data)
    offer = {"sequence": 1, "package_root": manifest.package_root, "kind": "full", "size": manifest.size}
    head = {"package_id": "demo", "sequence": 1, "releases": [offer]}
    problem = {"type": "about:blank", "title": "RefusalError", "status": 429, "detail": "too many"}
    refusals = [_answer(s, json.dumps(problem).encode()) for s in ("429 X\r\nRetry-After: 1", "404 X", "403 X")]
    guard = Guard(trust=None)
    return [
        Target(
            "answers", [_answer("200 OK", json.dumps(head).encode()), *refusals],
            lambda given: offered(_Connection(given), "demo"), refuses=Error,
        ),
        Target(
            "answered manifest", [_answer("200 OK", data)],
            lambda given: find(_Connection(given), "demo", 1, guard), refuses=Error,
        ),
    ]  # fmt: skip


def _state(folder: Path) -> Target:
    edge = Edge(folder, "demo")
    edge.root.mkdir()
    version = Version(sequence=1, package_root="ab" * 32, folder="1-abab", weights={"demo": "cd" * 32})
    edge.write(State(package_id="demo", active=version, previous=version, highest=3, held_back=(2,)))
    path = edge.root / "state.json"
    return Target("state", [path.read_bytes()], Written(path, lambda _: edge.state).read, refuses=Error)


@contextmanager
def targets(folder: Path) -> Iterator[list[Target]]:
    """Parsers of the network and of a device."""
    model = save_model(folder / "model", {"a": np.arange(600_000)})
    pack(model, folder / "package", Options(release=Release(package_id="demo")))
    running = Running(folder / "store", {"plain": True}).start()
    push(running.server(), folder / "package")
    running.stop()
    client = Client(folder / "store", running.token)
    requests = Target("requests", _requests(folder / "package"), client.send, turns=2)
    try:
        yield [requests, *_answers(folder / "package"), _state(folder)]
    finally:
        client.close()
