"""Blocks of up to 2^22 elements, each with its length before it, for the codecs that code against a base.

    [head of the codec]; u32 blocks; per block: u64 length, the block        length 0: the block is that of the base

Blocks decode alone. The lengths are checked to fill the stored bytes exactly before any block is decoded. A stack of
matrices, as experts often are, is cut between matrices, so that those that did not change cost eight bytes a block.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from math import prod

from moestro.core.errors import FormatError
from moestro.package.descriptor import TensorEntry
from moestro.package.spans import Span, same_bytes

BLOCK_ELEMENTS = 1 << 22
STACK_ELEMENTS = 1 << 18
"""Smaller blocks would pay more for their tables than whole experts save."""


def block_bytes(tensor: TensorEntry) -> int:
    """Decoded bytes of a whole block: 2^22 elements; of a stack, as many matrices as reach 2^18, at most 2^22."""
    elements = BLOCK_ELEMENTS
    if len(tensor.shape) > 2 and 0 < (matrix := prod(tensor.shape[-2:])) <= BLOCK_ELEMENTS:
        elements = -(-STACK_ELEMENTS // matrix) * matrix
    return min(elements, BLOCK_ELEMENTS) * tensor.dtype.item_bytes


def num_blocks(tensor: TensorEntry) -> int:
    """Blocks of a tensor."""
    return -(-tensor.num_bytes // block_bytes(tensor))


def framed(
    tensor: TensorEntry, target: Span, base: Span, pack: Callable[[memoryview, memoryview, int], bytes]
) -> Iterator[bytes]:
    """The count, then each block after its length.

    pack   makes a block of base and target from the byte where they begin
    """
    yield struct.pack("<I", num_blocks(tensor))
    for start, count in ranges(tensor):
        old, new = base.read(start, count), target.read(start, count)
        block = b"" if same_bytes(old, new) else pack(old, new, start)
        yield struct.pack("<Q", len(block))
        yield block


def ranges(tensor: TensorEntry) -> Iterator[tuple[int, int]]:
    """(start, count) in decoded bytes of each block."""
    size = block_bytes(tensor)
    for start in range(0, tensor.num_bytes, size):
        yield start, min(size, tensor.num_bytes - start)


class LongBlocks(ABC):
    """Random access to the blocks of a stored tensor."""

    def __init__(self, tensor: TensorEntry, stored: Span, base: Span, start: int) -> None:
        """`start` is where the codec's head ends."""
        self.tensor, self.stored, self.base = tensor, stored, base
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

    def block(self, index: int) -> memoryview:
        """One decoded block."""
        place, length = self.places[index]
        start, count = self.span(index)
        base = self.base.read(start, count)
        return self.decode(base, self.stored.read(place, length), start) if length else base

    @abstractmethod
    def decode(self, base: memoryview, stored: memoryview, start: int) -> memoryview:
        """A block that differs from the base's, which begins at byte `start` of the tensor."""

    def span(self, index: int) -> tuple[int, int]:
        """(start, count) in decoded bytes."""
        start = index * self.block_bytes
        return start, min(self.block_bytes, self.tensor.num_bytes - start)
