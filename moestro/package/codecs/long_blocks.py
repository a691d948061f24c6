"""Blocks of 2^22 elements, each with its length before it, for the codecs that code against a base.

    [head of the codec]; u32 blocks; per block: u64 length, the block

Blocks decode alone. The lengths are checked to fill the stored bytes exactly before any block is decoded.
"""

import struct
from collections.abc import Iterable, Iterator

from moestro.core.errors import FormatError
from moestro.package.descriptor import TensorEntry
from moestro.package.spans import Span

BLOCK_ELEMENTS = 1 << 22


def block_bytes(tensor: TensorEntry) -> int:
    """Decoded bytes of a whole block."""
    return BLOCK_ELEMENTS * tensor.dtype.item_bytes


def num_blocks(tensor: TensorEntry) -> int:
    """Blocks of a tensor."""
    return -(-tensor.num_bytes // block_bytes(tensor))


def framed(tensor: TensorEntry, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The count, then each block after its length."""
    yield struct.pack("<I", num_blocks(tensor))
    for block in blocks:
        yield struct.pack("<Q", len(block))
        yield block


def ranges(tensor: TensorEntry) -> Iterator[tuple[int, int]]:
    """(start, count) in decoded bytes of each block."""
    size = block_bytes(tensor)
    for start in range(0, tensor.num_bytes, size):
        yield start, min(size, tensor.num_bytes - start)


class LongBlocks:
    """Where the blocks of a stored tensor are."""

    def __init__(self, tensor: TensorEntry, stored: Span, start: int) -> None:
        """`start` is where the codec's head ends."""
        self.tensor, self.stored = tensor, stored
        self.where = f"tensor {tensor.name}"
        self.block_bytes = block_bytes(tensor)
        self.places = self._index(start)

    def _index(self, at: int) -> list[tuple[int, int]]:
        end = self.stored.length
        if at + 4 > end or struct.unpack("<I", self.stored.read(at, 4))[0] != num_blocks(self.tensor):
            raise FormatError(f"the number of blocks is not {num_blocks(self.tensor)}", where=self.where)
        places, at = [], at + 4
        for _ in range(num_blocks(self.tensor)):
            length = int(struct.unpack("<Q", self.stored.read(at, 8))[0]) if at + 8 <= end else end
            if at + 8 + length > end:
                raise FormatError("a block runs past the end", offset=at, where=self.where)
            places.append((at + 8, length))
            at += 8 + length
        if at != end:
            raise FormatError(f"blocks end at {at} of {end} stored bytes", where=self.where)
        return places

    def stored_block(self, index: int) -> memoryview:
        """The coded bytes of one block."""
        return self.stored.read(*self.places[index])

    def span(self, index: int) -> tuple[int, int]:
        """(start, count) in decoded bytes."""
        start = index * self.block_bytes
        return start, min(self.block_bytes, self.tensor.num_bytes - start)
