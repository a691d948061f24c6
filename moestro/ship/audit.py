"""What was done to a store, by whom, whether it succeeded; each line carries the digest of all lines before it.

    record(db, actor, address, action, target, outcome)      lines(db, limit)      check(db) -> first bad line or None

Changing or removing a line breaks the chain from there on. Cutting off the end does not show in the chain itself:
note the newest number and digest elsewhere now and then.
"""

import hashlib
import json
import time
from typing import Any

from moestro.ship.database import Database

FIELDS = ("number", "at", "actor", "address", "action", "target", "outcome", "chain")


def record(db: Database, actor: str, address: str, action: str, target: str, outcome: str) -> None:
    """Append a line."""
    with db.alone():
        last = db.row("SELECT number, chain FROM audit ORDER BY number DESC LIMIT 1") or (0, "")
        entry = (int(last[0]) + 1, int(time.time()), actor, address, action, target[:300], outcome[:300])
        db.run(
            "INSERT INTO audit (number, at, actor, address, action, target, outcome, chain) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *entry,
            _chain(last[1], entry),
        )


def lines(db: Database, limit: int = 1000) -> list[dict[str, Any]]:
    """The newest lines, oldest of them first."""
    rows = db.rows(f"SELECT {', '.join(FIELDS)} FROM audit ORDER BY number DESC LIMIT ?", limit)
    return [dict(zip(FIELDS, row, strict=True)) for row in reversed(rows)]


def check(db: Database) -> int | None:
    """The number of the first line that is not what was written, or None."""
    chain, expected = "", 1
    for *entry, link in db.rows(f"SELECT {', '.join(FIELDS)} FROM audit ORDER BY number"):
        if entry[0] != expected or link != _chain(chain, tuple(entry)):
            return expected
        chain, expected = link, expected + 1
    return None


def _chain(before: str, entry: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps([before, *entry]).encode()).hexdigest()
