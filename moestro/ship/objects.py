"""Where the bytes lie: files by default, S3-compatible object storage by URL. Keys are made of digests by the store.

    open_objects("/srv/store/objects")    open_objects("s3://bucket/prefix?endpoint=https://minio.example:9000")

An object is whole or absent and survives a power cut once `put` has returned; it is never changed, so readers need no
lock. Only `chunks/<digest>` and `leaves/<root>` are used.
"""

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from moestro.core.errors import ConfigError, StorageError
from moestro.core.files import cannot_write, flush_path, flush_to_disk


class Objects(Protocol):
    """Storage of immutable objects."""

    def put(self, key: str, data: bytes) -> None:
        """Store, durably; an existing object is left as it is."""
        ...

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop); raises StorageError where the object is missing or shorter."""
        ...

    def opened(self, key: str, start: int, stop: int) -> "Opened":
        """An object to be read piece by piece within [start, stop)."""
        ...

    def exists(self, key: str) -> bool: ...
    def delete(self, key: str) -> None: ...
    def keys(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """(key, bytes, time of last change in seconds) of each object."""
        ...


class Opened(Protocol):
    """One object being read; close it."""

    @property
    def handle(self) -> int | None:
        """An open file with the object's bytes, or None."""
        ...

    def here(self, start: int, stop: int) -> bool:
        """True where bytes [start, stop) can be read without waiting for a disk or network."""
        ...

    def now(self, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) without waiting for a disk or network; None where that is not possible."""
        ...

    def read(self, start: int, stop: int) -> bytes:
        """The same, however long it takes; raises StorageError where the object is missing or shorter."""
        ...

    def close(self) -> None: ...


class OpenedFile:
    """A file of `FileObjects`."""

    def __init__(self, path: str) -> None:
        try:
            self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"object {path} is missing: {error.strerror}") from error
        self._probe = bytearray(1)

    def here(self, start: int, stop: int) -> bool:
        """Where the last byte lies in the page cache, so do, as a rule, those before it."""
        if NO_WAIT is None:
            return False
        try:
            return os.preadv(self.handle, (self._probe,), stop - 1, NO_WAIT) == 1
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
                return False
            raise

    def now(self, start: int, stop: int) -> bytes | None:
        """From the page cache."""
        return self.read(start, stop) if self.here(start, stop) else None

    def read(self, start: int, stop: int) -> bytes:
        """All of it, or StorageError."""
        data = os.pread(self.handle, stop - start, start)
        if len(data) != stop - start:
            raise StorageError("an object of the store is shorter than it was; run moestro collect-garbage --scrub")
        return data

    def close(self) -> None:
        """Let go."""
        os.close(self.handle)


NO_WAIT: int | None = getattr(os, "RWF_NOWAIT", None)


class FileObjects:
    """One file per object, `ab/abcdef...` below its kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*/.new-*"):  # cut off by a crash
            left.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        kind, name = key.split("/")
        return self.folder / kind / name[:2] / name

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        if path.exists():
            os.utime(path)  # so that garbage collection sees it is wanted again
            return
        aside = self.folder / key.split("/", maxsplit=1)[0] / f".new-{secrets.token_hex(8)}"
        try:
            self._make(path.parent)
            with aside.open("xb") as file:
                file.write(data)
                file.flush()
                flush_to_disk(file.fileno())
            aside.rename(path)
            flush_path(path.parent)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise cannot_write(path, error) from error

    def _make(self, folder: Path) -> None:
        if folder not in self._made:
            folder.mkdir(parents=True, exist_ok=True)
            flush_path(folder.parent)
            self._made.add(folder)

    def read(self, key: str, start: int, stop: int) -> bytes:
        opened = self.opened(key, start, stop)
        try:
            return opened.read(start, stop)
        finally:
            opened.close()

    def opened(self, key: str, start: int, stop: int) -> OpenedFile:
        kind, _, name = key.partition("/")
        return OpenedFile(f"{self.folder}/{kind}/{name[:2]}/{name}")

    def exists(self, key: str) -> bool:
        return self._path(key).exists()

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def keys(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        for path in (self.folder / prefix).glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield f"{prefix}/{path.name}", status.st_size, status.st_mtime


class Fetched:
    """An object of a bucket, asked for once."""

    def __init__(self, objects: "S3Objects", key: str, start: int, stop: int) -> None:
        self._objects, self._key, self._start, self._stop = objects, key, start, stop
        self._data: bytes | None = None

    handle = None

    def here(self, start: int, stop: int) -> bool:
        """Once it is here."""
        return self._data is not None

    def now(self, start: int, stop: int) -> bytes | None:
        """Once it is here."""
        return None if self._data is None else self._data[start - self._start : stop - self._start]

    def read(self, start: int, stop: int) -> bytes:
        """Fetch all of it first."""
        if self._data is None:
            self._data = self._objects.read(self._key, self._start, self._stop)
        return self._data[start - self._start : stop - self._start]

    def close(self) -> None:
        """Nothing to do."""


class S3Objects:
    """A bucket of any S3-compatible service; the service's own rules make objects whole and durable."""

    def __init__(self, bucket: str, prefix: str, endpoint: str | None) -> None:
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise ConfigError("an s3:// store needs: pip install 'moestro[s3]'") from error
        self.bucket, self.prefix = bucket, prefix.strip("/") + "/" if prefix.strip("/") else ""
        retries: Any = {"max_attempts": 5, "mode": "standard"}
        self._make: Callable[[], Any] = lambda: boto3.session.Session().client(
            "s3", endpoint_url=endpoint, config=Config(retries=retries, connect_timeout=10, read_timeout=60)
        )
        self._local = threading.local()
        self._call("head_bucket")

    def _call(self, operation: str, missing_ok: bool = False, **values: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        if not hasattr(self._local, "client"):
            self._local.client = self._make()
        try:
            return getattr(self._local.client, operation)(Bucket=self.bucket, **values)
        except ClientError as error:
            if missing_ok and error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise StorageError(f"object storage {self.bucket}: {operation} failed: {error}") from error
        except BotoCoreError as error:
            raise StorageError(f"object storage {self.bucket} cannot be reached: {error}") from error

    def put(self, key: str, data: bytes) -> None:
        self._call("put_object", Key=self.prefix + key, Body=data)

    def read(self, key: str, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        answer = self._call("get_object", Key=self.prefix + key, Range=f"bytes={start}-{stop - 1}")
        data = bytes(answer["Body"].read())
        if len(data) != stop - start:
            raise StorageError(f"object {key} in {self.bucket} is shorter than it was")
        return data

    def opened(self, key: str, start: int, stop: int) -> Fetched:
        return Fetched(self, key, start, stop)

    def exists(self, key: str) -> bool:
        return self._call("head_object", missing_ok=True, Key=self.prefix + key) is not None

    def delete(self, key: str) -> None:
        self._call("delete_object", Key=self.prefix + key)

    def keys(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        more: dict[str, Any] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=f"{self.prefix}{prefix}/", **more)
            for item in page.get("Contents", []):
                yield item["Key"].removeprefix(self.prefix), item["Size"], item["LastModified"].timestamp()
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}


def open_objects(url: str) -> Objects:
    """By a folder's path or an s3:// URL."""
    if not url.startswith("s3://"):
        return FileObjects(Path(url))
    parts = urlsplit(url)
    endpoint = parse_qs(parts.query).get("endpoint", [None])[0]
    return S3Objects(parts.netloc, parts.path, endpoint)
