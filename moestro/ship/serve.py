"""Run a package server: uvicorn with TLS, bounded headers and patience, on a store folder.

    with PackageServer(folder, settings) as server:
        server.address      where it is, and what clients need
        server.run()        until SIGINT, SIGTERM or server.stop()

The first start makes a token for everything and leaves it in `admin.token`, readable by its owner only.
"""

import asyncio
import contextlib
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from moestro.core.errors import ConfigError
from moestro.ship import tls
from moestro.ship.app import make_app
from moestro.ship.sendfile import offer
from moestro.ship.settings import ServerSettings
from moestro.ship.store import Store
from moestro.ship.tokens import new_token

HEADER_BYTES = 64 << 10
HEADER_S = 20
"""Time for the whole head of a request."""
BACKLOG = 2048
DRAIN_S = 5
"""Answers under way get this long when the server stops."""


class GuardedProtocol(HttpToolsProtocol):
    """HTTP/1.1 whose request heads are bounded in bytes and in time; uvicorn bounds neither."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes, self._in_head = 0, True
        self._head_timer = self.loop.call_later(HEADER_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEADER_BYTES + len(data):
                self._give_up()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._head_bytes, self._in_head = 0, True
        self._head_timer.cancel()
        self._head_timer = self.loop.call_later(HEADER_S, self._give_up)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_timer.cancel()
        super().on_headers_complete()
        if self.scheme == "http" and self.cycle is not None and self.cycle.scope is self.scope:
            offer(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        self.transport.abort()


@dataclass(frozen=True, slots=True)
class Address:
    """Where a running server is."""

    url: str
    authority: Path | None
    """What clients must be given to believe its certificate; None for plain HTTP or a given certificate."""
    admin_token: Path


def admin_token(store: Store, folder: Path) -> Path:
    """The file with the first token, made where it is missing."""
    path = folder / "admin.token"
    if not path.exists():
        text = new_token(store.db, "admin", ["admin:*"])
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text + "\n")
    return path


class PackageServer:
    """A server that listens from the start and answers while `run` runs; a context manager."""

    def __init__(self, folder: Path, settings: ServerSettings, log_level: str = "warning") -> None:
        self.store = Store.open(folder, settings.database, settings.objects, settings.quotas)
        token = admin_token(self.store, folder)
        context, authority = _context(folder, settings)
        self._listener = _listening(settings)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http{'s' if context else ''}://{host}:{self._listener.getsockname()[1]}"
        self.address = Address(url, authority, token)
        config = uvicorn.Config(
            make_app(self.store, settings),
            http=GuardedProtocol,
            ws="none",
            loop="auto",
            lifespan="on",
            log_level=log_level,
            access_log=False,
            server_header=False,
            limit_concurrency=settings.max_connections,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=DRAIN_S,
            ssl_context_factory=(lambda *_: context) if context else None,
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Until SIGINT, SIGTERM or `stop`."""
        with contextlib.suppress(KeyboardInterrupt):
            self._server.run([self._listener])

    def stop(self) -> None:
        """Let `run` end soon; from any thread."""
        self._server.should_exit = True

    def __enter__(self) -> "PackageServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.store.db.close()


def _context(folder: Path, settings: ServerSettings) -> tuple[ssl.SSLContext | None, Path | None]:
    if settings.plain or settings.plain_anywhere:
        return None, None
    if settings.certificate and settings.key:
        return tls.server_context(settings.certificate, settings.key, settings.client_authority), None
    names = {*settings.names, socket.gethostname(), *([] if settings.host in ANY else [settings.host])}
    certificate, key, authority = tls.own_certificate(folder / "tls", sorted(names))
    return tls.server_context(certificate, key, settings.client_authority), authority


ANY = ("0.0.0.0", "::")


def _listening(settings: ServerSettings) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)  # before anybody is told the address
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{settings.host}:{settings.port} cannot be listened on: {error.strerror or error}; "
            "choose another with --host and --port"
        ) from error
    return listener
