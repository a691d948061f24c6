"""Bytes one can read anywhere: stored, decrypted or decoded, without holding all of them.

Bytes(view)     in memory                    Mapped(map, start, length)  in a mapped file
Decoded(blocks, length)     one block decoded at a time
OnDemand(open, length)      a span that is there only while it is being read
Part(span)      a range of another span      Watched(span, progress)     tells how much was read
"""

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

FETCH_BYTES = 1 << 20
Array = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class Span(Protocol):
    """`length` bytes."""

    @property
    def length(self) -> int: ...

    def read(self, start: int, count: int) -> memoryview:
        """Exactly these bytes; the caller asks only for what is there."""
        ...


class Blocks(Protocol):
    """A decoder: equal blocks, the last one shorter, each on its own."""

    @property
    def block_bytes(self) -> int: ...

    def block(self, index: int) -> memoryview:
        """One decoded block."""
        ...


class Bytes:
    """A span over memory or a mapped file; reading copies nothing."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.view = memoryview(data).cast("B")

    @property
    def length(self) -> int:
        return len(self.view)

    def read(self, start: int, count: int) -> memoryview:
        return self.view[start : start + count]


class Mapped(Bytes):
    """A span over a mapped file; a large range is asked of the disk at once instead of by page faults."""

    def __init__(self, mapped: mmap.mmap, start: int, length: int) -> None:
        super().__init__(memoryview(mapped)[start : start + length])
        self.mapped, self.start = mapped, start

    def read(self, start: int, count: int) -> memoryview:
        if count >= FETCH_BYTES:
            first = (self.start + start) // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):  # advice only: without it pages come as usual
                self.mapped.madvise(mmap.MADV_WILLNEED, first, self.start + start + count - first)
        return super().read(start, count)


Progress = Callable[[int], object]
"""Called with the number of bytes just done."""


def ignore(count: int) -> None:
    """A Progress that nobody watches."""


class Watched:
    """A span that tells how much was read."""

    def __init__(self, span: Span, progress: Progress) -> None:
        self.span, self.progress = span, progress

    @property
    def length(self) -> int:
        return self.span.length

    def read(self, start: int, count: int) -> memoryview:
        self.progress(count)
        return self.span.read(start, count)


class Part:
    """`length` bytes of another span from `start` on."""

    def __init__(self, whole: Span, start: int, length: int) -> None:
        assert 0 <= start <= start + length <= whole.length
        self.whole, self.start, self._length = whole, start, length

    @property
    def length(self) -> int:
        return self._length

    def read(self, start: int, count: int) -> memoryview:
        return self.whole.read(self.start + start, count)


class Decoded:
    """A span over a decoder; keeps a block until its last byte has been read, so that one who reads on holds none.

    Spans over a chain of updates lie in one another: each may hold a block only while it is in the middle of it.
    """

    def __init__(self, blocks: Blocks, length: int) -> None:
        self.blocks, self._length = blocks, length
        self._index, self._block = -1, memoryview(b"")

    @property
    def length(self) -> int:
        return self._length

    def _piece(self, index: int, skip: int, count: int) -> memoryview:
        """At most `count` bytes of one block."""
        if index != self._index:
            self._keep(-1, memoryview(b""))  # before the next one is decoded
            self._keep(index, self.blocks.block(index))
        piece = self._block[skip : skip + count]
        if skip + len(piece) == len(self._block):
            self._keep(-1, memoryview(b""))
        return piece

    def _keep(self, index: int, block: memoryview) -> None:
        self._index, self._block = index, block

    def read(self, start: int, count: int) -> memoryview:
        size = self.blocks.block_bytes
        first, last = start // size, (start + max(count, 1) - 1) // size
        piece = self._piece(first, start - first * size, count) if count else memoryview(b"")
        if first == last:
            return piece
        out = bytearray(count)  # only now: what lies below has let go of its own by then
        out[: len(piece)] = piece
        done = len(piece)
        for index in range(first + 1, last + 1):
            piece = self._piece(index, 0, count - done)
            out[done : done + len(piece)] = piece
            done += len(piece)
        return memoryview(out)


class OnDemand:
    """A span that is opened when it is first read and given up with its last byte.

    Many may be planned and few are open at a time, however much each of them holds meanwhile.
    """

    def __init__(self, opened: Callable[[], Span], length: int) -> None:
        self._opened, self._length = opened, length
        self._span: Span | None = None

    @property
    def length(self) -> int:
        return self._length

    def read(self, start: int, count: int) -> memoryview:
        span = self._span = self._span or self._opened()
        if start + count == self._length:
            self._span = None
        return span.read(start, count)


def pieces(span: Span, size: int) -> Iterator[memoryview]:
    """Consecutive pieces of `size` bytes, the last one shorter."""
    for start in range(0, span.length, size):
        yield span.read(start, min(size, span.length - start))


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array, without copying where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def same_bytes(left: memoryview, right: memoryview) -> bool:
    """True where both hold the same; memoryview's own comparison takes the elements one by one."""
    return np.array_equal(np.frombuffer(left, np.uint8), np.frombuffer(right, np.uint8))
