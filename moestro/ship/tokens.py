"""Who may do what: bearer tokens with scopes per package and action.

    scope    read:demo-*     publish:demo-llm     admin:*
    actions  admin includes publish includes read; the pattern is a package_id or begins one, with `*` at its end

The store keeps only the SHA-256 of a token: its secret has 256 random bits, so nothing slower is needed. A token is
shown once, when it is made.
"""

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from moestro.core.errors import AccessError, ConfigError
from moestro.ship.database import Database

ACTIONS = ("read", "publish", "admin")
"""Each includes those before it."""
PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\*?|\*")
TOKEN = re.compile(r"moe_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class Scope:
    """One action on the packages a pattern names."""

    action: str
    pattern: str

    @classmethod
    def parse(cls, text: str) -> "Scope":
        """From `action:pattern`."""
        action, _, pattern = text.partition(":")
        if action not in ACTIONS or not PATTERN.fullmatch(pattern):
            raise ConfigError(
                f"scope is {text[:80]!r}; write ACTION:PACKAGE with an action of {', '.join(ACTIONS)} and a package_id "
                "or its beginning followed by *, for example read:demo-*"
            )
        return cls(action, pattern)

    def allows(self, action: str, package_id: str) -> bool:
        """True where this scope covers the action on that package."""
        if ACTIONS.index(self.action) < ACTIONS.index(action):
            return False
        if self.pattern.endswith("*"):
            return package_id.startswith(self.pattern[:-1])
        return package_id == self.pattern


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever sends a request."""

    name: str
    scopes: tuple[Scope, ...]

    def allows(self, action: str, package_id: str) -> bool:
        """True where some scope does."""
        return any(scope.allows(action, package_id) for scope in self.scopes)

    @property
    def is_admin(self) -> bool:
        """May manage the whole store."""
        return Scope("admin", "*") in self.scopes


def new_token(
    db: Database, name: str, scopes: Sequence[str], lifetime_s: int | None = None, now: int | None = None
) -> str:
    """Make and record a token; the text returned is the only copy."""
    parsed = [Scope.parse(scope) for scope in scopes]
    if not parsed or not name or len(name) > 100 or not name.isprintable():
        raise ConfigError("a token needs a name of up to 100 printable characters and at least one scope")
    now = int(time.time()) if now is None else now
    token_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    db.run(
        "INSERT INTO token (id, name, digest, scopes, created, expires) VALUES (?, ?, ?, ?, ?, ?)",
        token_id,
        name,
        _digest(secret),
        json.dumps([f"{scope.action}:{scope.pattern}" for scope in parsed]),
        now,
        None if lifetime_s is None else now + lifetime_s,
    )
    return f"moe_{token_id}_{secret}"


def revoke_token(db: Database, token_id: str) -> None:
    """From now on it is refused; by its id, the part between the underscores."""
    changed = db.run("UPDATE token SET revoked = ? WHERE id = ? AND revoked IS NULL", int(time.time()), token_id[:100])
    if not changed:
        raise ConfigError(f"no valid token has the id {token_id[:40]!r}; see moestro token list")


def authenticate(db: Database, text: str) -> Principal:
    """The owner of a token; raises AccessError, deliberately in the same words for unknown and wrong."""
    match = TOKEN.fullmatch(text)
    found = match and db.row("SELECT name, digest, scopes, expires, revoked FROM token WHERE id = ?", match[1])
    if not match or not found or not hmac.compare_digest(_digest(match[2]), found[1]):
        raise AccessError("the token is not one of this store; ask its owner for one")
    name, _, scopes, expires, revoked = found
    if revoked is not None or (expires is not None and expires <= time.time()):
        raise AccessError("the token has expired or was revoked; ask the store's owner for a new one")
    return Principal(name, tuple(map(Scope.parse, json.loads(scopes))))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
