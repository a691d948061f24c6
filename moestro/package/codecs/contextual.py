"""Symbols coded in the context of the base's exponents: how far an element moves depends on how large it is.

    pack(symbols, exponents) -> bytes        unpack(bytes, exponents) -> symbols

    u32 contexts; per context: u8 context, u16 symbols, symbols x (u8 symbol, u16 frequency); u32 length, rANS stream

An update of training is about equally large for all elements of a tensor, so in units of the last place it is large
for small elements and zero for large ones. Exponents with fewer than 256 elements share context 255.
"""

import struct
from collections.abc import Iterator

import numpy as np

from moestro.core.errors import FormatError
from moestro.package.codecs import rans
from moestro.package.dtypes import DataType
from moestro.package.kernels import codecs, pointer
from moestro.package.spans import Array

RARE = 256
SHARED = 255


def exponents(base: memoryview, dtype: DataType) -> Array:
    """The exponent field of every element; only for float types of 16 or 32 bits."""
    width = dtype.item_bytes
    shift, mask = dtype.bits - 1 - dtype.exponent_bits, (1 << dtype.exponent_bits) - 1
    out = np.empty(len(base) // width, np.uint8)
    library = codecs()
    if library is None:
        out[:] = (np.frombuffer(base, f"<u{width}") >> shift) & mask
    elif len(out):
        library.exponents(pointer(base), len(out), width, shift, mask, out.ctypes.data)
    return out


def _counts(contexts: Array, symbols: Array) -> np.ndarray:
    """uint32 [256, 256]: how often each symbol stands in each context."""
    counts = np.zeros((256, 256), np.uint32)
    library = codecs()
    if library is None:
        np.add.at(counts, (contexts, symbols), 1)
    else:
        library.count_pairs(contexts.ctypes.data, symbols.ctypes.data, len(symbols), counts.ctypes.data)
    return counts


def pack(symbols: Array, contexts: Array) -> bytes:
    """Tables and stream."""
    counts = _counts(contexts, symbols)
    rare = np.flatnonzero(counts.sum(axis=1) < RARE)
    rare = rare[rare != SHARED]
    counts[SHARED] += counts[rare].sum(axis=0, dtype=np.uint32)
    counts[rare] = 0
    used = [int(context) for context in np.flatnonzero(counts.any(axis=1))]
    freq = np.stack([rans.quantised(counts[context]) for context in used]) if used else np.empty((0, 256), np.int64)
    stream = rans.encode(symbols, contexts, _shared(rans.Tables.of_freq(used, freq), used))
    return b"".join([*_pack_tables(used, freq), struct.pack("<I", len(stream)), stream])


def _shared(tables: rans.Tables, used: list[int]) -> rans.Tables:
    """Contexts without a table take the shared one."""
    if SHARED in used:
        tables.row_of[tables.row_of < 0] = tables.row_of[SHARED]
    return tables


def _pack_tables(used: list[int], freq: np.ndarray) -> Iterator[bytes]:
    yield struct.pack("<I", len(used))
    for context, row in zip(used, freq, strict=True):
        symbols = np.flatnonzero(row)
        pairs = np.empty(len(symbols), np.dtype([("symbol", "u1"), ("freq", "<u2")]))
        pairs["symbol"], pairs["freq"] = symbols, row[symbols]
        yield struct.pack("<BH", context, len(symbols)) + pairs.tobytes()


def unpack(stored: memoryview, contexts: Array, where: str) -> tuple[Array, memoryview]:
    """The symbols, one per context, and what follows the stream."""
    used, freq, at = _unpack_tables(stored, where)
    if at + 4 > len(stored):
        raise FormatError("the tables run past the end", where=where)
    (length,) = struct.unpack_from("<I", stored, at)
    stream, rest = stored[at + 4 : at + 4 + length], stored[at + 4 + length :]
    if len(stream) != length:
        raise FormatError("the entropy-coded stream runs past the end", where=where)
    tables = _shared(rans.Tables.of_freq(used, freq), used)
    return rans.decode(stream, contexts, tables, where), rest


def _unpack_tables(stored: memoryview, where: str) -> tuple[list[int], np.ndarray, int]:
    if len(stored) < 4:
        raise FormatError("a block ends before its tables", where=where)
    (count,) = struct.unpack_from("<I", stored)
    if count > 256:
        raise FormatError(f"{count} contexts; at most 256 are possible", where=where)
    used: list[int] = []
    sizes: list[int] = []
    found: list[memoryview] = []
    at = 4
    for _ in range(count):
        if at + 3 > len(stored):
            raise FormatError("the tables run past the end", where=where)
        context, num_symbols = struct.unpack_from("<BH", stored, at)
        found.append(stored[at + 3 : at + 3 + 3 * num_symbols])
        at += 3 + 3 * num_symbols
        if at > len(stored) or not 1 <= num_symbols <= 256 or (used and context <= used[-1]):
            raise FormatError("a table is cut off or out of order", where=where)
        used.append(context)
        sizes.append(num_symbols)
    return used, _frequencies(b"".join(found), sizes, where), at


def _frequencies(tables: bytes, sizes: list[int], where: str) -> np.ndarray:
    """int64 [rows, 256] of all tables at once, each `sizes` pairs long."""
    pairs = np.frombuffer(tables, np.dtype([("symbol", "u1"), ("freq", "<u2")]))
    row, number = np.repeat(np.arange(len(sizes)), sizes), pairs["freq"].astype(np.int64)
    place = 256 * row + pairs["symbol"]
    total = np.bincount(row, number, len(sizes))
    if (place[1:] <= place[:-1]).any() or (number == 0).any() or (total != rans.TOTAL).any():
        raise FormatError("frequencies of a table do not add up to 2^14", where=where)
    freq = np.zeros((len(sizes), 256), np.int64)
    freq.reshape(-1)[place] = number
    return freq
