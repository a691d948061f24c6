"""HTTP for clients, on the standard library: connections that are kept, retries, errors that come back as ours.

    with Connection(server) as connection:
        connection.json("GET", "/v1/packages")
        with connection.stream("GET", path, headers) as answer: answer.readinto(buffer)

An edge device needs nothing but Python for this. Certificates are always verified; a token never leaves over plain
HTTP except to this machine. Requests that may be repeated are, with exponential back-off, full jitter and Retry-After.
"""

import contextlib
import http.client
import json
import random
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moestro.core import errors
from moestro.core.errors import AccessError, ConfigError, FormatError, LimitExceeded, RefusalError, TransferError
from moestro.package import canonical
from moestro.ship import tls
from moestro.ship.settings import is_loopback

TRIES = 9
"""With the waits below about 25 s without a byte; a server that restarts is back by then."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 20.0
TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 256 << 20
"""Of an answer that is read whole."""
MAX_PROBLEM_BYTES = 1 << 16
AGAIN = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Where a store is and how to speak to it."""

    url: str
    token: str | None = None
    authority: Path | None = None
    """PEM file; without it the system's authorities count."""
    certificate: Path | None = None
    key: Path | None = None
    """Of this client, where the server asks for them."""
    timeout_s: float = TIMEOUT_S
    tries: int = TRIES

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"server is {self.url!r}; it must be like https://host:8443")
        if parts.scheme == "http" and self.token and not is_loopback(parts.hostname):
            raise ConfigError(f"server is {self.url}: a token is not sent without TLS; use https://")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ConfigError("the token holds characters that no token has; check --token-file")

    def context(self) -> ssl.SSLContext | None:
        """For https."""
        if not self.url.startswith("https:"):
            return None
        return tls.client_context(self.authority, self.certificate, self.key)


class Answer:
    """The head of an answer, and its body to be read."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.response = response
        self.status = response.status

    def header(self, name: str) -> str:
        """Its value, or nothing."""
        return self.response.headers.get(name, "")

    def fill(self, buffer: memoryview) -> None:
        """Read exactly so many bytes; raises TransferError where the body ends before."""
        filled = 0
        while filled < len(buffer):
            count = self.response.readinto(buffer[filled:])
            if not count:
                raise TransferError(f"the connection ended {len(buffer) - filled} bytes early")
            filled += count

    def read(self, most_bytes: int = MAX_ANSWER_BYTES) -> bytes:
        """All of it."""
        data = self.response.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise TransferError(f"the server's answer has more than {most_bytes} bytes")
        return data


class Connection:
    """One connection, for one thread."""

    def __init__(self, server: Server, context: ssl.SSLContext | None = None) -> None:
        self.server = server
        self._context = context or server.context()
        parts = urlsplit(server.url)
        self._host, self._port, self._prefix = parts.hostname or "", parts.port, parts.path.rstrip("/")
        self._connection: http.client.HTTPConnection | None = None

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; the next request connects again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _opened(self) -> http.client.HTTPConnection:
        if self._connection is None:
            timeout_s = self.server.timeout_s
            if self._context is None:
                self._connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
            else:
                self._connection = http.client.HTTPSConnection(
                    self._host, self._port, timeout=timeout_s, context=self._context
                )
        return self._connection

    @contextlib.contextmanager
    def stream(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Iterator[Answer]:
        """One try; a body not read to its end closes the connection.

        raises   TransferError for whatever the network does, else the error that the server names
        """
        sent = {"User-Agent": "moestro", **(headers or {})}
        sent |= {"Authorization": f"Bearer {self.server.token}"} if self.server.token else {}
        try:
            connection = self._opened()
            connection.request(method, self._prefix + path, body, sent)
            response = connection.getresponse()
            if response.status >= 400:
                raise _refusal(response)
            answer = Answer(response)
            yield answer
            if not response.isclosed() and (response.length or response.chunked):
                self.close()
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise AccessError(
                f"the certificate of {self.server.url} is not trusted ({error.verify_message}); "
                "give its authority with --authority, as moestro serve-packages prints it"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise TransferError(f"{self.server.url}: {str(error) or type(error).__name__}") from error
        except BaseException:
            self.close()
            raise

    def call(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> tuple[Answer, bytes]:
        """(head, body), tried again where that can help."""
        for turn in range(self.server.tries):
            try:
                with self.stream(method, path, headers, body) as answer:
                    return answer, answer.read()
            except (TransferError, RefusalError) as error:
                wait_or_raise(error, turn, self.server.tries)
        raise AssertionError("the last turn raises")

    def json(self, method: str, path: str, table: Any = None) -> Any:
        """Send and receive JSON."""
        body = None if table is None else json.dumps(table).encode()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        _, data = self.call(method, path, headers, body)
        try:
            return canonical.loads_loosely(data, MAX_ANSWER_BYTES, "the answer") if data else None
        except (FormatError, LimitExceeded) as error:
            raise TransferError(f"{self.server.url} answered {method} {path} with no JSON of ours ({error})") from error


class AgainError(RefusalError):
    """The server asks to come again later."""

    def __init__(self, message: str, status: int, after_s: float) -> None:
        super().__init__(message, status)
        self.after_s = after_s


def wait_or_raise(error: Exception, turn: int, tries: int) -> None:
    """Sleep before the next turn, or raise where there is none or it cannot help."""
    if isinstance(error, RefusalError) and not isinstance(error, AgainError):
        raise error
    if turn + 1 >= tries:
        raise TransferError(f"{error}; gave up after {tries} tries") from error
    longest = min(FIRST_WAIT_S * 2**turn, LONGEST_WAIT_S)
    after_s = error.after_s if isinstance(error, AgainError) else 0.0
    time.sleep(min(max(after_s, random.uniform(0, longest)), LONGEST_WAIT_S))


def _refusal(response: http.client.HTTPResponse) -> errors.Error:
    """The server's problem as one of our errors."""
    detail = _detail(response.read(MAX_PROBLEM_BYTES)) or f"{response.status} {response.reason}"
    status = response.status
    if status in AGAIN:
        after = response.headers.get("Retry-After", "0")
        return AgainError(detail, status, float(after) if after.isdecimal() else 0.0)
    if status in (401, 403):
        return AccessError(detail)
    return RefusalError(detail, status)


def _detail(body: bytes) -> str:
    """What the problem says, as one printable line."""
    with contextlib.suppress(FormatError, LimitExceeded, AttributeError):
        text = str(canonical.loads_loosely(body, MAX_PROBLEM_BYTES, "the problem").get("detail", ""))[:500]
        return "".join(c if c.isprintable() else " " for c in text)
    return ""
