"""The store's tables, in SQLite by default or PostgreSQL by URL; one SQL for both.

    Database("sqlite:///srv/store.db") or Database("postgresql://user@host/name")
    db.row(sql, ...)   db.rows(sql, ...)   db.run(sql, ...)   with db.alone(): ...

Statements use `?` for values. `alone()` is a transaction that no other process of the store runs beside, so that
publishing, opening an upload and garbage collection never interleave. Connections are pooled; each thread inside
`alone()` keeps its own.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError, StorageError

BUSY_S = 30
"""How long a writer waits for another one."""
LOCK_ID = 0x6D6F6573
"""Number of the advisory lock in PostgreSQL."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS token (
  id TEXT PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL, scopes TEXT NOT NULL,
  created BIGINT NOT NULL, expires BIGINT, revoked BIGINT);
CREATE TABLE IF NOT EXISTS blob (
  root TEXT PRIMARY KEY, size BIGINT NOT NULL, hash TEXT NOT NULL, chunk_size BIGINT NOT NULL, touched BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS holding (
  package_id TEXT NOT NULL, root TEXT NOT NULL, touched BIGINT NOT NULL, PRIMARY KEY (package_id, root));
CREATE INDEX IF NOT EXISTS holding_root ON holding (root);
CREATE TABLE IF NOT EXISTS upload (
  id TEXT PRIMARY KEY, package_id TEXT NOT NULL, root TEXT NOT NULL, size BIGINT NOT NULL, hash TEXT NOT NULL,
  chunk_size BIGINT NOT NULL, owner TEXT NOT NULL, declared BIGINT NOT NULL, touched BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS received (
  upload_id TEXT NOT NULL, number BIGINT NOT NULL, PRIMARY KEY (upload_id, number));
CREATE TABLE IF NOT EXISTS release (
  package_id TEXT NOT NULL, sequence BIGINT NOT NULL, package_root TEXT NOT NULL, kind TEXT NOT NULL,
  size BIGINT NOT NULL, manifest {bytes} NOT NULL, signature {bytes}, created_at TEXT NOT NULL, expires_at TEXT,
  published BIGINT NOT NULL, publisher TEXT NOT NULL, revoked BIGINT, PRIMARY KEY (package_id, sequence, package_root));
CREATE TABLE IF NOT EXISTS release_file (
  package_id TEXT NOT NULL, package_root TEXT NOT NULL, path TEXT NOT NULL, root TEXT NOT NULL, size BIGINT NOT NULL,
  PRIMARY KEY (package_id, package_root, path));
CREATE INDEX IF NOT EXISTS release_file_root ON release_file (root);
CREATE TABLE IF NOT EXISTS model (
  package_id TEXT NOT NULL, package_root TEXT NOT NULL, model_id TEXT NOT NULL, weights_root TEXT,
  base TEXT, chain BIGINT, mode TEXT, info TEXT NOT NULL, PRIMARY KEY (package_id, package_root, model_id));
CREATE TABLE IF NOT EXISTS report (
  device_id TEXT NOT NULL, package_id TEXT NOT NULL, sequence BIGINT NOT NULL, state TEXT NOT NULL,
  weights_root TEXT, at BIGINT NOT NULL, PRIMARY KEY (device_id, package_id));
CREATE TABLE IF NOT EXISTS audit (
  number BIGINT PRIMARY KEY, at BIGINT NOT NULL, actor TEXT NOT NULL, address TEXT NOT NULL, action TEXT NOT NULL,
  target TEXT NOT NULL, outcome TEXT NOT NULL, chain TEXT NOT NULL);
"""


class Database:
    """A pool of connections and the few verbs the store needs."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._free: list[Any] = []
        self._lock = threading.Lock()
        self._own = threading.local()
        kind, _, rest = url.partition("://")
        if kind == "sqlite":
            self._postgres, self._path = False, Path(rest)
            self._path.parent.mkdir(parents=True, exist_ok=True)
        elif kind in ("postgresql", "postgres"):
            self._postgres = True
        else:
            raise ConfigError(f"database is {kind}://...; it must be sqlite:///PATH or postgresql://USER@HOST/NAME")
        self._make_tables()

    def _make_tables(self) -> None:
        script = SCHEMA.replace("{bytes}", "BYTEA" if self._postgres else "BLOB")
        with self.alone():
            for statement in filter(str.strip, script.split(";")):
                self.run(statement)

    def _connect(self) -> Any:
        return self._connect_postgres() if self._postgres else self._connect_sqlite()

    def _connect_sqlite(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
        except sqlite3.Error as error:
            raise StorageError(f"{self._path} cannot be opened as a SQLite database: {error}") from error
        return connection

    def _connect_postgres(self) -> Any:
        try:
            import psycopg
        except ImportError as error:
            raise ConfigError("a postgresql:// database needs: pip install 'moestro[postgres]'") from error
        try:
            return psycopg.connect(self.url, autocommit=True, connect_timeout=10)
        except psycopg.Error as error:
            raise StorageError(f"the PostgreSQL database cannot be reached: {str(error).splitlines()[0]}") from error

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Any]:
        own = getattr(self._own, "connection", None)
        if own is not None:
            yield own
            return
        with self._lock:
            connection = self._free.pop() if self._free else None
        connection = connection or self._connect()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._free.append(connection)

    def _cursor(self, connection: Any, sql: str, values: tuple[Any, ...]) -> Any:
        try:
            return connection.execute(sql.replace("?", "%s") if self._postgres else sql, values)
        except sqlite3.OperationalError as error:
            raise StorageError(f"the store's database refuses: {error}; free some space or try again later") from error

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self._connection() as connection:
            return [tuple(row) for row in self._cursor(connection, sql, values).fetchall()]

    def row(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        """The first row, or None."""
        found = self.rows(sql, *values)
        return found[0] if found else None

    def value(self, sql: str, *values: Any) -> Any:
        """The first value of the first row, or None."""
        found = self.row(sql, *values)
        return found[0] if found else None

    def run(self, sql: str, *values: Any) -> int:
        """Execute; returns the number of rows changed."""
        with self._connection() as connection:
            return int(self._cursor(connection, sql, values).rowcount)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A transaction beside which no other `alone` runs; nested ones join the outer one."""
        if getattr(self._own, "connection", None) is not None:
            yield
            return
        with self._connection() as connection:
            self._cursor(connection, "BEGIN" if self._postgres else "BEGIN IMMEDIATE", ())
            self._own.connection = connection
            try:
                if self._postgres:
                    connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK_ID,))
                yield
                connection.execute("COMMIT")
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            finally:
                self._own.connection = None

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            while self._free:
                self._free.pop().close()
