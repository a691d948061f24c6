"""Write a file front to back and know the digest of each chunk without reading it again.

    sink = Sink(handle, path, hash, chunk, direct)      sink.write(data, leaves)      leaves = sink.finish()

Chunks are counted from where the file stands at first. Data is gathered in one buffer, hashed several chunks at once
and written; a caller that has hashed chunks already, because pieces of a tensor and chunks of the file are the same
bytes, passes their leaves along.
"""

import os
from pathlib import Path

from moestro.package.bulk import aligned, is_cached, past_cache, read_at, write_next
from moestro.package.hashing import SIZE, Buffer, leaf_hashes

STAGED_BYTES = 6 << 20
"""Twice three chunks, which SHA-256 takes at once; or one chunk, where chunks are larger."""
SPARE_BYTES = (1 << 20) + (4 << 10)
"""How much `room` may ask for."""
DIRECT_BYTES = 64 << 20
"""Files from this size on are read past the page cache, if they are not in it."""


class Sink:
    """Appends to an open file."""

    def __init__(self, handle: int, path: Path, hash_name: str, chunk: int, direct: bool = False) -> None:
        """`direct` keeps the page cache free of a file that is too large to stay there."""
        self.handle, self.path, self.hash, self.chunk, self.direct = handle, path, hash_name, chunk, direct
        self.length = 0
        """Bytes written, staged ones included."""
        self.leaves = bytearray()
        self._size = max(STAGED_BYTES // chunk, 1) * chunk
        self._stage = aligned(self._size + SPARE_BYTES)
        self._filled = 0
        self._hashed = 0
        """Bytes of the stage whose leaves are known; whole chunks."""

    def write(self, data: Buffer, leaves: bytes | None = None) -> None:
        """Append.

        leaves   leaf hashes of the chunks in `data`, if known; only where `at_chunk_start` said yes
        """
        view = memoryview(data).cast("B")
        self.length += len(view)
        if leaves is not None:
            self._hash(self._filled)
        while view:
            count = min(len(view), self._size - self._filled)
            self._stage[self._filled : self._filled + count] = view[:count]
            self._filled, view = self._filled + count, view[count:]
            if leaves is not None:
                whole = count // self.chunk
                self.leaves += leaves[: whole * SIZE]
                self._hashed, leaves = self._hashed + whole * self.chunk, leaves[whole * SIZE :]
            if self._filled == self._size:
                self._flush()

    def room(self, count: int) -> memoryview:
        """Where the caller puts the next bytes itself, before `took`; at most SPARE_BYTES."""
        return self._stage[self._filled : self._filled + count]

    def took(self, count: int) -> None:
        """So many bytes are in `room` now."""
        self.length += count
        self._filled += count
        if self._filled >= self._size:
            over = self._filled - self._size
            self._filled = self._size
            self._flush()
            self._stage[:over] = self._stage[self._size : self._size + over]
            self._filled = over

    def pad_to(self, length: int) -> None:
        """Append zero bytes up to a length."""
        assert length >= self.length
        self.write(bytes(length - self.length))

    def at_chunk_start(self) -> bool:
        """True where leaves may be passed to `write`."""
        return self._filled % self.chunk == 0

    def finish(self) -> bytes:
        """Write what is staged; returns all leaves."""
        self._flush()
        return bytes(self.leaves)

    def _hash(self, end: int) -> None:
        """Leaves of the stage up to `end`."""
        if self._hashed < end:
            self.leaves += leaf_hashes(self.hash, self._stage[self._hashed : end], self.chunk)
            self._hashed = end

    def _flush(self) -> None:
        self._hash(self._filled)
        write_next(self.handle, self._stage[: self._filled], self.path, self.direct)
        self._filled = self._hashed = 0


def file_leaves(handle: int, hash_name: str, chunk: int, start: int = 0, end: int | None = None) -> bytes:
    """Leaf hashes of the chunks of an open file between two offsets, counted from `start`; read, not mapped.

    A file that shrinks meanwhile gives fewer leaves; nothing crashes.
    """
    end = os.fstat(handle).st_size if end is None else end
    size = max(STAGED_BYTES // chunk, 1) * chunk
    large = end - start >= DIRECT_BYTES
    buffer = aligned(size) if large else memoryview(bytearray(min(size, max(end - start, 0))))
    leaves = bytearray()
    with past_cache(handle, wanted=large and not is_cached(handle)):
        while start < end:
            wanted = min(len(buffer), end - start)
            filled = read_at(handle, buffer, start)
            leaves += leaf_hashes(hash_name, buffer[: min(filled, wanted)], chunk)
            if filled < wanted:
                break
            start += wanted
    return bytes(leaves)
