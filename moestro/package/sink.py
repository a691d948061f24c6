"""Write a file front to back and know the digest of each chunk without reading it again.

    sink = Sink(handle, path, hash, chunk)      sink.write(data, leaves)      leaves = sink.finish()

Chunks are counted from where the file stands at first. Whole chunks go to the disk as they come, hashed several at
once; a caller that has hashed them already, because pieces of a tensor and chunks of the file are the same bytes,
passes the leaves along.
"""

import os
from pathlib import Path

from moestro.core.files import cannot_write
from moestro.package.hashing import SIZE, Buffer, leaf_hashes

STAGED_CHUNKS = 4
"""Chunks gathered from small writes before they are hashed and written together."""
READ_BYTES = 4 << 20


class Sink:
    """Appends to an open file."""

    def __init__(self, handle: int, path: Path, hash_name: str, chunk: int) -> None:
        self.handle, self.path, self.hash, self.chunk = handle, path, hash_name, chunk
        self.length = 0
        """Bytes written, staged ones included."""
        self.leaves = bytearray()
        self._staged = bytearray()

    def write(self, data: Buffer, leaves: bytes | None = None) -> None:
        """Append.

        leaves   leaf hashes of the chunks in `data`, if known; used where `data` begins at a chunk's start
        """
        view = memoryview(data).cast("B")
        self.length += len(view)
        if self._staged or len(view) < self.chunk:
            room = STAGED_CHUNKS * self.chunk - len(self._staged)
            self._staged += view[:room]
            leaves, view = None, view[room:]
            if len(self._staged) < STAGED_CHUNKS * self.chunk:
                return
            self._flush(len(self._staged))
        whole = len(view) // self.chunk
        if whole:
            known = leaf_hashes(self.hash, view[: whole * self.chunk], self.chunk) if leaves is None else leaves
            self.leaves += known[: whole * SIZE]
            self._put(view[: whole * self.chunk])
        self._staged += view[whole * self.chunk :]

    def pad_to(self, length: int) -> None:
        """Append zero bytes up to a length."""
        assert length >= self.length
        self.write(bytes(length - self.length))

    def at_chunk_start(self) -> bool:
        """True where leaves passed to `write` would be used; flushes whole staged chunks."""
        if self._staged and len(self._staged) % self.chunk == 0:
            self._flush(len(self._staged))
        return not self._staged

    def finish(self) -> bytes:
        """Write what is staged; returns all leaves."""
        if self._staged:
            self._flush(len(self._staged))
        return bytes(self.leaves)

    def _flush(self, count: int) -> None:
        staged = memoryview(bytes(self._staged[:count]))
        self._staged.clear()
        self.leaves += leaf_hashes(self.hash, staged, self.chunk)
        self._put(staged)

    def _put(self, data: memoryview) -> None:
        write_all(self.handle, data, self.path)


def write_all(handle: int, data: Buffer, path: Path) -> None:
    """os.write until everything is out; raises StorageError when the disk is full."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(handle, view) :]
    except OSError as error:
        raise cannot_write(path, error) from error


def file_leaves(handle: int, hash_name: str, chunk: int, start: int = 0, end: int | None = None) -> bytes:
    """Leaf hashes of the chunks of an open file between two offsets, counted from `start`; read, not mapped.

    A file that shrinks meanwhile gives fewer leaves; nothing crashes.
    """
    end = os.fstat(handle).st_size if end is None else end
    buffer = memoryview(bytearray(max(READ_BYTES // chunk, 1) * chunk))
    leaves = bytearray()
    while start < end:
        filled = 0
        wanted = min(len(buffer), end - start)
        while filled < wanted:
            count = os.preadv(handle, [buffer[filled:wanted]], start + filled)
            if not count:
                return bytes(leaves + leaf_hashes(hash_name, buffer[:filled], chunk))
            filled += count
        leaves += leaf_hashes(hash_name, buffer[:filled], chunk)
        start += filled
    return bytes(leaves)
