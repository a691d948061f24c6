"""What every request passes first: who is it, not too often, counted; and refusals in one shape.

    ASGI app = Gate(routes, ...)      request.scope["principal"]      problem(error) -> application/problem+json

Errors are RFC 9457 problems whose `kind` is the name of our error class, so that a client raises the same again.
"""

import asyncio
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from moestro.core import errors
from moestro.ship.metrics import Metrics
from moestro.ship.settings import Rates
from moestro.ship.store import Store
from moestro.ship.tokens import Principal, Scope, authenticate

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Message, Receive, Send], Awaitable[None]]
Key = TypeVar("Key")
Value = TypeVar("Value")
logger = logging.getLogger("moestro.ship")
REMEMBER_S = 5.0
"""How long a checked token or a file's place is believed; revoking takes effect after at most this."""
MAX_REMEMBERED = 10_000
FAILURE_BURST = 20
MAX_PATH = 1024
"""Characters; the longest path of ours has a name of 128 and a few words."""
CLIENT_LEFT = 499
"""Counted where a client went away in the middle of its request."""
STATUS: dict[type[errors.Error], int] = {
    errors.StorageError: 507,
    errors.LimitExceeded: 413,
    errors.PackageError: 422,
    errors.ConfigError: 400,
}


class Remembered(Generic[Key, Value]):
    """A small cache whose entries expire."""

    def __init__(self, capacity: int = MAX_REMEMBERED, lifetime_s: float = REMEMBER_S) -> None:
        self.capacity, self.lifetime_s = capacity, lifetime_s
        self._entries: OrderedDict[Key, tuple[float, Value]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        """None where it is unknown or too old."""
        found = self._entries.get(key)
        return found[1] if found and found[0] > time.monotonic() else None

    def put(self, key: Key, value: Value) -> None:
        """Remember; the oldest entry leaves."""
        with self._lock:
            self._entries.pop(key, None)
            self._entries[key] = time.monotonic() + self.lifetime_s, value
            if len(self._entries) > self.capacity:
                self._entries.popitem(last=False)


@dataclass(slots=True)
class Bucket:
    """A token bucket: so much at once, then so much a second."""

    per_s: float
    burst: float
    held: float
    at: float = field(default_factory=time.monotonic)

    def wait_s(self, amount: float) -> float:
        """Take an amount; 0, or the seconds until there would have been enough (then nothing is taken)."""
        now = time.monotonic()
        self.held, self.at = min(self.burst, self.held + (now - self.at) * self.per_s), now
        if amount > self.held:
            return (amount - self.held) / self.per_s
        self.held -= amount
        return 0.0


class Limiter:
    """A bucket per client, the least recently seen forgotten first."""

    def __init__(self, per_s: float, burst: float) -> None:
        self.per_s, self.burst = per_s, burst
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def bucket(self, client: str) -> Bucket:
        """Of one client; a new one is full."""
        bucket = self._buckets.pop(client, None) or Bucket(self.per_s, self.burst, self.burst)
        self._buckets[client] = bucket
        if len(self._buckets) > MAX_REMEMBERED:
            self._buckets.popitem(last=False)
        return bucket


def problem(error: errors.Error) -> Response:
    """An error as `application/problem+json`."""
    status = status_of(error)
    table = {"type": "about:blank", "title": type(error).__name__, "status": status, "detail": str(error)}
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return Response(json.dumps(table), status, headers, "application/problem+json")


def status_of(error: errors.Error) -> int:
    """The HTTP status that fits an error of ours."""
    if isinstance(error, errors.RefusalError):
        return error.status
    if isinstance(error, errors.AccessError):
        return 403 if isinstance(error, ForbiddenError) else 401
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 400)


class ForbiddenError(errors.AccessError):
    """Known, but without the right."""


def require(principal: Principal, action: str, package_id: str) -> None:
    """Raise unless the principal may do that; an anonymous one is asked for a token instead."""
    if principal.allows(action, package_id):
        return
    if principal.name == "anonymous":
        raise errors.AccessError(f"{action} on {package_id} needs a token; give one with --token-file")
    raise ForbiddenError(f"this token may not {action} {package_id}; ask the store's owner for such a scope")


class Gate:
    """ASGI middleware around the routes."""

    def __init__(self, app: ASGIApp, store: Store, rates: Rates, public: tuple[str, ...], metrics: Metrics) -> None:
        self.app, self.store, self.metrics = app, store, metrics
        self.anonymous = Principal("anonymous", tuple(Scope("read", pattern) for pattern in public))
        self.requests = Limiter(rates.requests_per_s, rates.burst_requests)
        self.failures = Limiter(rates.failures_per_s, FAILURE_BURST)
        self._known: Remembered[str, Principal] = Remembered()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, answered = time.perf_counter(), [0]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered[0] = message["status"]
            await send(message)

        try:
            try:
                scope["principal"] = await self._principal(scope)
                if len(scope["path"]) > MAX_PATH:
                    raise errors.RefusalError(f"the path has {len(scope['path'])} characters; at most {MAX_PATH}", 414)
                if not scope["query_string"].isascii():
                    raise errors.RefusalError("the query has bytes above 127; encode them as %XX", 400)
                await self.app(scope, receive, counted)
            except errors.Error as error:
                if answered[0]:
                    raise  # mid-answer: cutting the connection is the only honest sign left
                await problem(error)(scope, receive, counted)
        except ClientDisconnect:
            answered[0] = CLIENT_LEFT
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self.metrics.observe(scope["method"], route, answered[0], time.perf_counter() - begin)

    async def _principal(self, scope: Message) -> Principal:
        """Check the token and the rates."""
        address = scope["client"][0] if scope.get("client") else "local"
        text = next((value for name, value in scope["headers"] if name == b"authorization"), None)
        if text is None:
            principal = self.anonymous
        else:
            principal = await self._authenticated(text.decode("latin-1"), address)
        client = address if principal is self.anonymous else f"token {principal.name}"
        self._slow_down(self.requests.bucket(client), "requests")
        return principal

    async def _authenticated(self, header: str, address: str) -> Principal:
        kind, _, token = header.partition(" ")
        known = self._known.get(token)
        if known is not None:
            return known
        failures = self.failures.bucket(address)
        if failures.held < 1:
            self._slow_down(failures, "refused tokens")
        try:
            if kind.lower() != "bearer":
                raise errors.AccessError("the Authorization header must be: Bearer TOKEN")
            found = await asyncio.to_thread(authenticate, self.store.db, token.strip())
        except errors.AccessError:
            failures.wait_s(1)
            self.metrics.refused_tokens.inc()
            raise
        self._known.put(token, found)
        return found

    def _slow_down(self, bucket: Bucket, what: str) -> None:
        if bucket.wait_s(1):
            self.metrics.slowed.inc()
            raise errors.RefusalError(f"too many {what}; at most {bucket.per_s:g} a second", 429)
