"""A store, packages, and real servers on this machine."""

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from package.samples import save_model, tensors

from moestro.core.config import build
from moestro.package.api import Options, Release, pack
from moestro.ship.serve import PackageServer
from moestro.ship.settings import ServerSettings
from moestro.ship.store import Store
from moestro.ship.tokens import new_token
from moestro.ship.transport import Server

START_S = 240


@dataclass
class Running:
    """A server, in a thread, or in a process that can be killed; started again it keeps its port."""

    folder: Path
    settings: dict[str, Any]
    as_process: bool = False
    process: subprocess.Popen[str] | None = None
    url: str = ""
    authority: Path | None = None
    token: str = ""
    _port: int = 0
    _server: PackageServer | None = None
    _thread: threading.Thread | None = None

    def start(self) -> "Running":
        """Wait until it listens."""
        table = self._start_process() if self.as_process else self._start_thread()
        self.url, self._port = table["url"], int(table["url"].rpartition(":")[2])
        self.authority = Path(table["authority"]) if table.get("authority") else None
        self.token = Path(table["admin_token"]).read_text().strip()
        return self

    def _start_thread(self) -> dict[str, Any]:
        settings = build(ServerSettings, self.settings | {"port": self._port})
        self._server = PackageServer(self.folder, settings)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        return dataclasses.asdict(self._server.address)

    def _start_process(self) -> dict[str, Any]:
        settings = self.folder.with_name("settings.toml")
        settings.write_text(tomli_w.dumps(self.settings | {"port": self._port}))
        command = [sys.executable, "-m", "moestro", "serve-packages", str(self.folder), "--json"]
        self.process = subprocess.Popen([*command, "--settings", str(settings)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        assert select.select([self.process.stdout], [], [], START_S)[0], "the server did not start"
        table: dict[str, Any] = json.loads(self.process.stdout.readline())
        return table

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it."""
        if self.process:
            self.process.send_signal(number)
            self.process.wait(30)
            assert self.process.stdout
            self.process.stdout.close()
            self.process = None
        if self._server and self._thread:
            self._server.stop()
            self._thread.join(30)
            self._server.__exit__()
            self._server = None

    def server(self, token: str | None = "", **how: object) -> Server:
        """For a client; without a token where that is None."""
        return Server(url=self.url, token=self.token if token == "" else token, authority=self.authority, **how)

    def token_for(self, *scopes: str, days: float = 1) -> str:
        """A new token."""
        store = Store.open(self.folder)
        try:
            return new_token(store.db, "tester", scopes, int(days * 86400))
        finally:
            store.db.close()


Serve = Callable[..., Running]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers; they end with the test."""
    started: list[Running] = []

    def start(folder: Path | None = None, as_process: bool = False, **settings: object) -> Running:
        started.append(Running(folder or tmp_path / "store", settings, as_process))
        return started[-1].start()

    yield start
    for running in started:
        running.stop(signal.SIGKILL)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store on disk, without a server."""
    opened = Store.open(tmp_path / "store")
    yield opened
    opened.db.close()


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make packages: `make(sequence=2, seed=1)`."""

    def build(package_id: str = "demo", sequence: int = 1, seed: int = 0, **release: object) -> Path:
        name = f"{package_id}-{sequence}-{seed}-{len(os.listdir(tmp_path))}"
        model = save_model(tmp_path / f"model-{name}", tensors(seed))
        out = tmp_path / f"package-{name}"
        pack(model, out, Options(release=Release(package_id=package_id, sequence=sequence, **release)))
        return out

    return build
