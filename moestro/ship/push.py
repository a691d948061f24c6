"""Put a package into a store: only chunks that its package does not hold yet are sent, a broken push just runs again.

    push(server, folder, progress) -> Pushed

The server remembers which chunks arrived, so the client remembers nothing. Publishing comes last and is atomic.
"""

import base64
import json
import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.core.errors import AccessError, IntegrityError, RefusalError, TransferError
from moestro.package.folder import Package
from moestro.package.hashing import SIZE, leaf_hashes, tree_root
from moestro.package.paths import open_below
from moestro.package.sink import file_leaves
from moestro.ship.fetch import CONNECTIONS, Progress, Silent, blob_of
from moestro.ship.store import Blob
from moestro.ship.transport import Connection, Server, wait_or_raise


@dataclass(slots=True)
class Pushed:
    """What a push took."""

    package_id: str
    sequence: int
    package_root: str
    sent_bytes: int = 0
    known_bytes: int = 0
    """The store had them."""
    is_new: bool = True
    """False where exactly this release was published before."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A chunk to send."""

    handle: int
    path: str
    blob: Blob
    upload_id: str
    number: int
    leaf: bytes


def push(server: Server, folder: Path, progress: Progress | None = None, connections: int = CONNECTIONS) -> Pushed:
    """Upload what is missing, then publish.

    raises   RefusalError where the store does not take it, AccessError, TransferError, IntegrityError for a package
             that is damaged here
    """
    progress = progress or Silent()
    with Package.open(folder) as package, Connection(server) as connection:
        manifest = package.manifest
        done = Pushed(manifest.package_id, manifest.sequence, manifest.package_root)
        progress.begin(f"{manifest.package_id} {manifest.sequence}", manifest.size)
        seen: set[str] = set()
        for entry in manifest.files:
            if entry.root in seen:
                progress.advance(entry.size)
                continue
            seen.add(entry.root)
            handle = open_below(package.handle, entry.path)
            try:
                _push_file(server, connection, manifest.package_id, handle, entry.path, blob_of(manifest, entry),
                           (done, progress, connections))  # fmt: skip
            finally:
                os.close(handle)
        body = {"manifest": base64.b64encode(package.manifest_bytes).decode()}
        envelope = package.envelope()
        body |= {"signature": base64.b64encode(envelope).decode()} if envelope else {}
        headers = {"Content-Type": "application/json"}
        text = json.dumps(body).encode()
        answer, _ = connection.call("POST", f"/v1/packages/{manifest.package_id}", headers, text)
        done.is_new = answer.status == 201
    return done


def _push_file(
    server: Server,
    connection: Connection,
    package_id: str,
    handle: int,
    path: str,
    blob: Blob,
    how: tuple[Pushed, Progress, int],
) -> None:
    done, progress, connections = how
    leaves = file_leaves(handle, blob.hash, blob.chunk_size)
    if os.fstat(handle).st_size != blob.size or tree_root(blob.hash, leaves).hex() != blob.root:
        raise IntegrityError(path, "its bytes are not those of the manifest")
    wish = {"package_id": package_id, "root": blob.root, "size": blob.size, "hash": blob.hash}
    try:
        state = connection.json("POST", "/v1/uploads", wish | {"chunk_size": blob.chunk_size})
    except RefusalError as error:
        if error.status != 409:
            raise
        done.known_bytes += blob.size  # held already
        progress.advance(blob.size)
        return
    upload_id = str(state["id"])
    if not state["declared"]:
        _, _ = connection.call("PUT", f"/v1/uploads/{upload_id}/leaves", body=leaves)
        state = connection.json("GET", f"/v1/uploads/{upload_id}")
    present = _bits(state)
    items = queue.SimpleQueue[_Item]()
    for number in range(blob.num_chunks):
        if number in present:
            done.known_bytes += blob.chunk_bytes(number)
            progress.advance(blob.chunk_bytes(number))
        else:
            leaf = leaves[number * SIZE : (number + 1) * SIZE]
            items.put(_Item(handle, path, blob, upload_id, number, leaf))
    threads = min(connections, items.qsize())
    sending = _Sending(server, items, done, progress)
    if threads == 1:
        sending.work(connection)
    elif threads > 1:
        with ThreadPoolExecutor(threads, thread_name_prefix="push") as pool:
            for future in [pool.submit(sending.work) for _ in range(threads)]:
                future.result()
    connection.json("POST", f"/v1/uploads/{upload_id}:commit")


def _bits(state: Any) -> set[int]:
    bits = base64.b64decode(state["present"])
    return {number for number in range(len(bits) * 8) if bits[number // 8] >> number % 8 & 1}


class _Sending:
    """Threads that send chunks."""

    def __init__(self, server: Server, items: "queue.SimpleQueue[_Item]", done: Pushed, progress: Progress) -> None:
        self.server, self.items, self.done, self.progress = server, items, done, progress
        self.lock, self.failed = threading.Lock(), threading.Event()
        self.context = server.context()

    def work(self, connection: Connection | None = None) -> None:
        """Send until nothing is left."""
        own = connection or Connection(self.server, self.context)
        try:
            while not self.failed.is_set():
                try:
                    item = self.items.get_nowait()
                except queue.Empty:
                    return
                self._send(own, item)
        except BaseException:
            self.failed.set()
            raise
        finally:
            if connection is None:
                own.close()

    def _send(self, connection: Connection, item: _Item) -> None:
        size = item.blob.chunk_bytes(item.number)
        data = os.pread(item.handle, size, item.number * item.blob.chunk_size)
        if leaf_hashes(item.blob.hash, data, item.blob.chunk_size) != item.leaf:
            raise IntegrityError(item.path, "it changed while it was sent", item.number)
        for turn in range(self.server.tries):
            try:
                with connection.stream("PUT", f"/v1/uploads/{item.upload_id}/{item.number}", body=data) as answer:
                    answer.read()
                break
            except AccessError:
                raise
            except (TransferError, RefusalError) as error:
                if isinstance(error, RefusalError) and error.status == 422:  # damaged on its way
                    error = TransferError(str(error))
                wait_or_raise(error, turn, self.server.tries)
        with self.lock:
            self.done.sent_bytes += size
            self.progress.advance(size)
