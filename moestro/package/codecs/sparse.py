"""Codec `sparse`: where elements changed, and their new values; for tables of which few rows are touched.

    block = u32 changed, u32 gap bytes, u32 stored gaps, u32 stored values | gaps (LEB128, zstd) | values (zstd)

A gap is the number of unchanged elements before a changed one. Any element width.
"""

import struct
from collections.abc import Iterator

import numpy as np

from moestro.core.errors import FormatError
from moestro.package.codecs.compressor import compress, decompress
from moestro.package.codecs.long_blocks import LongBlocks, framed
from moestro.package.descriptor import TensorEntry
from moestro.package.spans import Span, as_bytes

HEAD = struct.Struct("<IIII")
GAP_BYTES = 4
"""Longest LEB128 gap: blocks have 2^22 elements."""


class Sparse:
    """The codec."""

    name = "sparse"

    def encode(self, tensor: TensorEntry, target: Span, base: Span | None) -> Iterator[bytes]:
        """The stored form, block by block."""
        assert base is not None
        width = tensor.dtype.item_bytes
        return framed(tensor, target, base, lambda old, new, _: _pack(old, new, width))

    def open(self, tensor: TensorEntry, stored: Span, base: Span | None) -> "SparseReader":
        """A decoder."""
        assert base is not None
        return SparseReader(tensor, stored, base, 0)


def _pack(base: memoryview, target: memoryview, width: int) -> bytes:
    old, new = (np.frombuffer(data, f"<u{width}") for data in (base, target))
    changed = np.flatnonzero(old != new)
    gaps = leb128(np.diff(changed, prepend=-1) - 1)
    stored_gaps, stored_values = compress(gaps), compress(new[changed].tobytes())
    head = HEAD.pack(len(changed), len(gaps), len(stored_gaps), len(stored_values))
    return head + stored_gaps + stored_values


class SparseReader(LongBlocks):
    """Random access to the blocks of one tensor."""

    def decode(self, base: memoryview, stored: memoryview, start: int) -> memoryview:
        """One block."""
        width = self.tensor.dtype.item_bytes
        out = np.frombuffer(base, f"<u{width}").copy()
        if len(stored) < HEAD.size:
            raise FormatError("a block ends inside its head", where=self.where)
        changed, gap_bytes, stored_gaps, stored_values = HEAD.unpack_from(stored)
        if (
            changed > len(out)
            or gap_bytes > GAP_BYTES * changed
            or HEAD.size + stored_gaps + stored_values != len(stored)
        ):
            raise FormatError(f"{changed} changes in {len(out)} elements, in {len(stored)} bytes", where=self.where)
        middle = HEAD.size + stored_gaps
        gaps = from_leb128(decompress(stored[HEAD.size : middle], gap_bytes, self.where), changed, self.where)
        places = np.cumsum(gaps + 1) - 1
        if changed and places[-1] >= len(out):
            raise FormatError(f"a change lies at element {places[-1]} of {len(out)}", where=self.where)
        out[places] = np.frombuffer(decompress(stored[middle:], changed * width, self.where), f"<u{width}")
        return as_bytes(out)


def leb128(numbers: np.ndarray) -> bytes:
    """Seven bits a byte, low ones first; the top bit says that more follow."""
    numbers = numbers.astype(np.int64)
    sizes = 1 + (numbers > 0x7F) + (numbers > 0x3FFF) + (numbers > 0x1FFFFF)
    starts = np.cumsum(sizes) - sizes
    out = np.zeros(int(sizes.sum()), np.uint8)
    for place in range(GAP_BYTES):
        has = sizes > place
        more = (sizes[has] > place + 1).astype(np.uint8) << 7
        out[starts[has] + place] = (numbers[has] >> 7 * place & 0x7F).astype(np.uint8) | more
    return out.tobytes()


def from_leb128(data: bytes, count: int, where: str) -> np.ndarray:
    """`count` numbers of at most four bytes each, filling the data exactly."""
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 0x80)
    if len(ends) != count or (count and ends[-1] != len(raw) - 1) or (not count and len(raw)):
        raise FormatError("gaps are cut off or too many", where=where)
    starts = np.concatenate([[0], ends[:-1] + 1]) if count else ends
    sizes = ends - starts + 1
    if (sizes > GAP_BYTES).any():
        raise FormatError("a gap is too long", where=where)
    numbers = np.zeros(count, np.int64)
    for place in range(GAP_BYTES):
        has = sizes > place
        numbers[has] |= (raw[starts[has] + place].astype(np.int64) & 0x7F) << 7 * place
    return numbers
