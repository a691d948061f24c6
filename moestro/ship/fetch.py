"""Bring the files of a manifest here, chunk by chunk: what is here already is not fetched, what is wrong is not kept.

    stage = Stage(folder, manifest)         flat folder of files named by their roots, partly there
    missing = stage.look(local)             1. what a former try left, each chunk hashed again; 2. what `local` has
    fetch(server, stage, progress)          3. the rest, by ranges over several connections
    stage.place(out)                        the package folder

A chunk counts only once its leaf hash is right, so nothing has to be remembered between tries: a power cut may lose
what the disk had not written yet, and hashing finds that too. A wrong chunk alone is fetched again.
"""

import contextlib
import errno
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from moestro.core.errors import IntegrityError, RefusalError, StorageError, TransferError
from moestro.core.files import cannot_write, flush_path
from moestro.core.units import bytes_text
from moestro.package.hashing import SIZE, leaf_hashes, tree_root
from moestro.package.manifest import FileEntry, Manifest
from moestro.package.paths import open_below, open_folder
from moestro.ship.store import Blob
from moestro.ship.transport import AgainError, Connection, Server, wait_or_raise

RUN_BYTES = 16 << 20
"""Longest range asked for at once."""
CONNECTIONS = 4
CHUNK_TRIES = 5
SPARE_BYTES = 64 << 20
"""Left free on the disk."""


class Progress(Protocol):
    """Who shows how far a transfer is."""

    def begin(self, what: str, total_bytes: int) -> None: ...
    def advance(self, num_bytes: int) -> None: ...


class Silent:
    """Shows nothing."""

    def begin(self, what: str, total_bytes: int) -> None:
        """Nothing."""

    def advance(self, num_bytes: int) -> None:
        """Nothing."""


@dataclass(slots=True)
class Traffic:
    """What a transfer took, in bytes of file content."""

    fetched_bytes: int = 0
    reused_bytes: int = 0
    """Taken from packages that are here."""
    resumed_bytes: int = 0
    """Left by a former try."""
    bad_chunks: int = 0
    bad_bytes: int = 0

    def add(self, other: "Traffic") -> None:
        """Sum up."""
        for name in Traffic.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class Place:
    """One chunk of one staged file."""

    root: str
    number: int


class LocalChunks:
    """Chunks of packages that are here, by leaf; read again and hashed before they are used."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._at: dict[tuple[str, bytes], tuple[Path, str, int, int]] = {}
        for folder in folders:
            with contextlib.suppress(OSError, IntegrityError):
                self._add(folder)

    def _add(self, folder: Path) -> None:
        from moestro.package.folder import Package

        with Package(folder) as package:
            manifest = package.manifest
            for entry in manifest.files:
                blob = blob_of(manifest, entry)
                if blob.num_chunks == 1:
                    leaves = bytes.fromhex(entry.root)
                elif entry.chunks is not None and (folder / entry.chunks).is_file():
                    leaves = package.read(entry.chunks, blob.num_chunks * SIZE)
                else:
                    continue
                for number in range(len(leaves) // SIZE):
                    leaf = leaves[number * SIZE : (number + 1) * SIZE]
                    self._at[manifest.hash, leaf] = folder, entry.path, number * blob.chunk_size, blob.chunk_size

    def knows(self, hash_name: str, leaf: bytes) -> bool:
        """True where some package here lists that chunk."""
        return (hash_name, leaf) in self._at

    def read(self, hash_name: str, leaf: bytes) -> bytes | None:
        """The chunk, or None where it is unknown or no longer what it was."""
        found = self._at.get((hash_name, leaf))
        if found is None:
            return None
        folder, path, start, length = found
        base = open_folder(folder)
        try:
            handle = open_below(base, path)
            try:
                data = os.pread(handle, length, start)
            finally:
                os.close(handle)
        finally:
            os.close(base)
        return data if leaf_hashes(hash_name, data, max(len(data), 1)) == leaf else None


def blob_of(manifest: Manifest, entry: FileEntry) -> Blob:
    """A listed file as the store knows it."""
    return Blob(entry.root, entry.size, manifest.hash, manifest.chunk_size)


@dataclass(slots=True)
class Stage:
    """Files on their way, below `folder`, named by their roots."""

    folder: Path
    manifest: Manifest
    leaves: dict[str, bytes] = field(default_factory=dict)
    """By root; filled by `learn`."""
    wanted: dict[bytes, list[Place]] = field(default_factory=dict)
    """Places of each leaf that is not here yet."""

    def blobs(self) -> dict[str, Blob]:
        """The distinct files."""
        return {entry.root: blob_of(self.manifest, entry) for entry in self.manifest.files}

    def learn(self, connection: Connection) -> None:
        """Get the leaves of all files; they prove themselves by the root."""
        for root, blob in self.blobs().items():
            if blob.num_chunks <= 1:
                self.leaves[root] = bytes.fromhex(root) if blob.num_chunks else b""
                continue
            _, data = connection.call("GET", f"/v1/blobs/{root}/chunks")
            if len(data) != blob.num_chunks * SIZE or tree_root(blob.hash, data).hex() != root:
                raise IntegrityError(root, "the server's chunk digests do not make this root")
            self.leaves[root] = data

    def look(self, local: LocalChunks, progress: Progress) -> Traffic:
        """Find out which chunks are here, copy those other packages have, note the others in `wanted`.

        raises   StorageError where the disk cannot hold what is missing
        """
        traffic, hash_name = Traffic(), self.manifest.hash
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_space()
            for root, blob in self.blobs().items():
                with self.opened(root) as handle:
                    os.truncate(handle, blob.size)
                    for number in range(blob.num_chunks):
                        self._look_at(handle, blob, number, local, traffic, hash_name)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        progress.advance(traffic.reused_bytes + traffic.resumed_bytes)
        return traffic

    def _look_at(
        self, handle: int, blob: Blob, number: int, local: LocalChunks, traffic: Traffic, hash_name: str
    ) -> None:
        leaf = self.leaf(blob.root, number)
        start, size = number * blob.chunk_size, blob.chunk_bytes(number)
        if _has_data(handle, start, size):
            there = os.pread(handle, size, start)
            if leaf_hashes(hash_name, there, blob.chunk_size) == leaf:
                traffic.resumed_bytes += size
                return
        data = local.read(hash_name, leaf)
        if data is not None and len(data) == size:
            write_at(handle, data, start)
            traffic.reused_bytes += size
            return
        self.wanted.setdefault(leaf, []).append(Place(blob.root, number))

    def leaf(self, root: str, number: int) -> bytes:
        """One leaf hash."""
        return self.leaves[root][number * SIZE : (number + 1) * SIZE]

    def _check_space(self) -> None:
        there = sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())
        missing = sum(blob.size for blob in self.blobs().values()) - there
        status = os.statvfs(self.folder)
        free = status.f_bavail * status.f_frsize
        if missing + SPARE_BYTES > free:
            raise StorageError(
                f"{self.folder} needs {bytes_text(missing)} more, but the disk has {bytes_text(free)} free; "
                "free some space; what is there stays and is used"
            )

    @contextlib.contextmanager
    def opened(self, root: str) -> Iterator[int]:
        """A handle on a staged file."""
        handle = os.open(self.folder / root, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            yield handle
        finally:
            os.close(handle)

    def runs(self) -> list[list[Place]]:
        """The wanted chunks, first places only, consecutive ones together."""
        blobs, found = self.blobs(), list[list[Place]]()
        for place in sorted((places[0] for places in self.wanted.values()), key=lambda p: (p.root, p.number)):
            run = found[-1] if found else []
            fits = len(run) * blobs[place.root].chunk_size < RUN_BYTES
            if run and fits and (run[-1].root, run[-1].number + 1) == (place.root, place.number):
                run.append(place)
            else:
                found.append([place])
        return found

    def place(self, out: Path) -> None:
        """Link the complete files into a new folder `out`, flushed; the stage keeps its own until it is dropped.

        The manifest's paths were checked when it was parsed, and nothing but folders and plain files is ever made
        here, so no path leads out.
        """
        try:
            out.mkdir(parents=True)
            for name in ("Model", "Program", "Meta-info"):
                (out / name).mkdir()
            for entry in self.manifest.files:
                target = out / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(self.folder / entry.root, target)
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                        raise
                    shutil.copyfile(self.folder / entry.root, target)  # a disk without hard links
        except OSError as error:
            raise cannot_write(out, error) from error

    def drop(self) -> None:
        """Remove what was staged."""
        shutil.rmtree(self.folder, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    """Make a folder and all below it survive a power cut."""
    for path in folder.rglob("*"):
        flush_path(path)
    flush_path(folder)
    flush_path(folder.parent)


def write_at(handle: int, data: bytes | memoryview, start: int) -> None:
    """pwrite until everything is out."""
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, start)
        view, start = view[count:], start + count


def _has_data(handle: int, start: int, size: int) -> bool:
    """False for a hole, so that an empty file of 100 GB is not hashed."""
    try:
        return os.lseek(handle, start, os.SEEK_DATA) < start + size
    except OSError:
        return False


class _Fetching:
    """The shared state of the fetching threads."""

    def __init__(self, server: Server, stage: Stage, progress: Progress, limit: Callable[[], bool]) -> None:
        self.server, self.stage, self.progress = server, stage, progress
        self.context = server.context()
        self.runs: queue.SimpleQueue[list[Place]] = queue.SimpleQueue()
        for run in stage.runs():
            self.runs.put(run)
        self.traffic, self.lock = Traffic(), threading.Lock()
        self.failed = threading.Event()
        self.stopped = limit
        self.tries: dict[Place, int] = {}
        self.blobs = stage.blobs()

    def work(self) -> None:
        """Take runs until none is left."""
        try:
            with Connection(self.server, self.context) as connection:
                while not self.failed.is_set() and not self.stopped():
                    try:
                        run = self.runs.get_nowait()
                    except queue.Empty:
                        return
                    self._take(connection, run)
        except BaseException:
            self.failed.set()
            raise

    def _take(self, connection: Connection, run: list[Place]) -> None:
        """Fetch a run; after a break go on where it stopped, as long as something comes."""
        turn = 0
        while run and not self.failed.is_set():
            before = len(run)
            try:
                self._request(connection, run)
                return
            except (TransferError, AgainError) as error:
                turn = 0 if len(run) < before else turn + 1
                wait_or_raise(error, turn, self.server.tries)
            except RefusalError as error:
                if error.status == 404:
                    raise RefusalError(f"the server no longer has {run[0].root[:16]}; try again", 404) from error
                raise

    def _request(self, connection: Connection, run: list[Place]) -> None:
        """One range request; chunks that arrived leave `run`."""
        blob = self.blobs[run[0].root]
        start = run[0].number * blob.chunk_size
        stop = run[-1].number * blob.chunk_size + blob.chunk_bytes(run[-1].number)
        headers = {"Range": f"bytes={start}-{stop - 1}", "If-Range": f'"{blob.root}"'}
        buffer = memoryview(bytearray(min(blob.chunk_size, blob.size)))
        with connection.stream("GET", f"/v1/blobs/{blob.root}", headers) as answer:
            expected = f"bytes {start}-{stop - 1}/{blob.size}"
            if answer.status != 206 or answer.header("Content-Range") != expected:
                raise TransferError(f"the server answered {answer.status} to a range")
            with self.stage.opened(blob.root) as handle:
                while run:
                    data = buffer[: blob.chunk_bytes(run[0].number)]
                    answer.fill(data)
                    self._keep(blob, run.pop(0), data, handle)

    def _keep(self, blob: Blob, place: Place, data: memoryview, handle: int) -> None:
        """Write a chunk to all its places, or ask for it again."""
        leaf = self.stage.leaf(place.root, place.number)
        if leaf_hashes(blob.hash, data, blob.chunk_size) != leaf:
            with self.lock:
                self.traffic.bad_chunks += 1
                self.traffic.bad_bytes += len(data)
                self.tries[place] = self.tries.get(place, 0) + 1
            if self.tries[place] >= CHUNK_TRIES:
                raise IntegrityError(place.root, f"came wrong {CHUNK_TRIES} times from {self.server.url}", place.number)
            self.runs.put([place])
            return
        try:
            write_at(handle, data, place.number * blob.chunk_size)
            for other in self.stage.wanted[leaf][1:]:
                with self.stage.opened(other.root) as elsewhere:
                    write_at(elsewhere, data, other.number * self.blobs[other.root].chunk_size)
        except OSError as error:
            raise cannot_write(self.stage.folder, error) from error
        with self.lock:
            self.traffic.fetched_bytes += len(data)
            self.progress.advance(len(data) * len(self.stage.wanted[leaf]))


def fetch(
    server: Server,
    stage: Stage,
    progress: Progress,
    connections: int = CONNECTIONS,
    stopped: Callable[[], bool] = lambda: False,
) -> Traffic:
    """Fetch all that `stage` wants; several threads, each with its own connection.

    raises   TransferError, IntegrityError, StorageError, AccessError; what arrived stays for the next try
    """
    shared = _Fetching(server, stage, progress, stopped)
    with ThreadPoolExecutor(connections, thread_name_prefix="fetch") as threads:
        done = [threads.submit(shared.work) for _ in range(connections)]
        for future in done:
            future.result()
    while not stopped() and not shared.runs.empty():  # chunks that came wrong after the other threads had left
        shared.work()
    return shared.traffic
