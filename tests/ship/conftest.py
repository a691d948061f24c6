"""A store, a package in it, and a real server process on this machine."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from package.samples import save_model, tensors

from moestro.package.api import Options, Release, pack
from moestro.ship.store import Store
from moestro.ship.tokens import new_token
from moestro.ship.transport import Server

START_S = 60


@dataclass
class Running:
    """A server process."""

    folder: Path
    args: list[str]
    process: subprocess.Popen[str] | None = None
    url: str = ""
    authority: Path | None = None
    token: str = ""
    _port: str = field(default="0")

    def start(self) -> "Running":
        """Wait until it listens; again on the same port after a kill."""
        command = [sys.executable, "-m", "moestro", "serve-packages", str(self.folder), "--json", "--port", self._port]
        self.process = subprocess.Popen([*command, *self.args], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        assert select.select([self.process.stdout], [], [], START_S)[0], "the server did not start"
        table = json.loads(self.process.stdout.readline())
        self.url = table["url"]
        self._port = self.url.rpartition(":")[2]
        self.authority = Path(table["authority"]) if "authority" in table else None
        self.token = Path(table["admin_token"]).read_text().strip()
        return self

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it."""
        if self.process:
            self.process.send_signal(number)
            self.process.wait(30)
            assert self.process.stdout
            self.process.stdout.close()
            self.process = None

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

    def start(*args: str, folder: Path | None = None) -> Running:
        started.append(Running(folder or tmp_path / "store", list(args)))
        return started[-1].start()

    yield start
    for running in started:
        if running.process:
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
