"""Codec `odiff-ctx`: exact differences of floats, entropy-coded by the size of the base's elements.

block = contextual stream of symbols | u32 length, open bits
"""

import struct
from collections.abc import Iterator

from moestro.core.errors import FormatError
from moestro.package.codecs import contextual
from moestro.package.codecs.long_blocks import LongBlocks, framed
from moestro.package.codecs.symbols import apply_symbols, difference_symbols
from moestro.package.descriptor import TensorEntry
from moestro.package.dtypes import DataType
from moestro.package.spans import Span


def suits(dtype: DataType) -> bool:
    """Float types of 16 and 32 bits."""
    return dtype.kind == "float" and dtype.bits in (16, 32)


def pack_block(base: memoryview, target: memoryview, dtype: DataType) -> bytes:
    """One block of differences."""
    symbols, extra = difference_symbols(base, target, dtype.item_bytes)
    coded = contextual.pack(symbols, contextual.exponents(base, dtype))
    return b"".join([coded, struct.pack("<I", len(extra)), extra])


def unpack_block(base: memoryview, stored: memoryview, dtype: DataType, where: str) -> memoryview:
    """The target of one block."""
    symbols, rest = contextual.unpack(stored, contextual.exponents(base, dtype), where)
    if len(rest) < 4 or struct.unpack_from("<I", rest)[0] != len(rest) - 4:
        raise FormatError("open bits do not fill the block", where=where)
    return apply_symbols(base, symbols, rest[4:], dtype.item_bytes, where)


class Differences:
    """The codec."""

    name = "odiff-ctx"

    def encode(self, tensor: TensorEntry, target: Span, base: Span | None) -> Iterator[bytes]:
        """The stored form, block by block."""
        assert base is not None
        return framed(tensor, target, base, lambda old, new, _: pack_block(old, new, tensor.dtype))

    def open(self, tensor: TensorEntry, stored: Span, base: Span | None) -> "DifferenceReader":
        """A decoder."""
        if base is None or not suits(tensor.dtype):
            raise FormatError(f"odiff-ctx does not suit {tensor.dtype.name}", where=f"tensor {tensor.name}")
        return DifferenceReader(tensor, stored, base, 0)


class DifferenceReader(LongBlocks):
    """Random access to the blocks of one tensor."""

    def decode(self, base: memoryview, stored: memoryview, start: int) -> memoryview:
        """One block."""
        return unpack_block(base, stored, self.tensor.dtype, self.where)
