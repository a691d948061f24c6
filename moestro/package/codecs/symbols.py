"""Differences of ordered bit patterns as symbols of an entropy coder, with what they leave open as plain bits.

    d = -15..15 -> symbol d + 15, nothing open
    else, with e = floor(log2 |d|): symbol 31 + 4 (e - 4) + the two bits of |d| below its top bit;
          open are its e - 2 low bits and above them the sign

The specification's alphabet escaped |d| > 15 to LEB128 under zstd; these buckets code large differences within a
twentieth of a bit of their entropy, so that one codec serves small and large updates.
"""

import numpy as np

from moestro.core.errors import IntegrityError
from moestro.package.codecs.planes import ordered, unordered
from moestro.package.kernels import codecs, pointer
from moestro.package.spans import Array, as_bytes

DIRECT = 15
FAILURES = {-1: "a symbol is too large", -2: "open bits are missing", -3: "open bits are left over"}


def difference_symbols(base: memoryview, target: memoryview, width: int) -> tuple[Array, bytes]:
    """Symbols and packed open bits; element width 2 or 4 bytes, float types."""
    count = len(target) // width
    symbols, extra = np.empty(count, np.uint8), np.empty(4 * count + 8, np.uint8)
    library = codecs()
    if library is None:
        return _symbols_in_numpy(base, target, width)
    used = library.difference_symbols(
        pointer(base), pointer(target), count, width, symbols.ctypes.data, extra.ctypes.data
    )
    return symbols, extra[:used].tobytes()


def _symbols_in_numpy(base: memoryview, target: memoryview, width: int) -> tuple[Array, bytes]:
    a, b = (ordered(np.frombuffer(data, f"<u{width}")) for data in (base, target))
    d = (b - a).view(f"<i{width}").astype(np.int64)
    size = np.abs(d)
    far = size > DIRECT
    exponent = np.zeros(len(d), np.int64)
    exponent[far] = np.frexp(size[far].astype(np.float64))[1] - 1
    low = exponent - 2
    symbols = np.where(far, 31 + 4 * (exponent - 4) + (size >> np.maximum(low, 0) & 3), d + DIRECT).astype(np.uint8)
    values = size[far] & ((1 << low[far]) - 1) | (d[far] < 0).astype(np.int64) << low[far]
    return symbols, _pack_bits(values, low[far] + 1)


def _pack_bits(values: np.ndarray, widths: np.ndarray) -> bytes:
    """Values one after another, least significant bit first."""
    starts = np.cumsum(widths) - widths
    bits = np.zeros(int(widths.sum()), np.uint8)
    for place in range(int(widths.max(initial=0))):
        has = widths > place
        bits[starts[has] + place] = values[has] >> place & 1
    return np.packbits(bits, bitorder="little").tobytes()


def apply_symbols(base: memoryview, symbols: Array, extra: memoryview, width: int, where: str) -> memoryview:
    """The target, from what `difference_symbols` made of it."""
    library = codecs()
    if library is None:
        return _apply_in_numpy(base, symbols, extra, width, where)
    out = np.empty(len(symbols) * width, np.uint8)
    at = pointer(extra) if len(extra) else None
    status = library.apply_symbols(
        pointer(base), symbols.ctypes.data, len(symbols), width, at, len(extra), out.ctypes.data
    )
    if status:
        raise IntegrityError(where, f"differences are wrong ({FAILURES[status]})")
    return as_bytes(out)


def _apply_in_numpy(base: memoryview, symbols: Array, extra: memoryview, width: int, where: str) -> memoryview:
    symbol = symbols.astype(np.int64)
    far = symbol >= 31
    low = np.where(far, 2 + (symbol - 31) // 4, 0)
    if (symbol > 31 + 4 * (8 * width - 5) + 3).any():
        raise IntegrityError(where, f"differences are wrong ({FAILURES[-1]})")
    widths = low[far] + 1
    bits = np.unpackbits(np.frombuffer(extra, np.uint8), bitorder="little")
    used = int(widths.sum())
    if used > len(bits) or len(bits) - used >= 8 or bits[used:].any():
        raise IntegrityError(where, f"differences are wrong ({FAILURES[-2 if used > len(bits) else -3]})")
    value = np.zeros(len(widths), np.int64)
    starts = np.cumsum(widths) - widths
    for place in range(int(widths.max(initial=0))):
        has = widths > place
        value[has] |= bits[starts[has] + place].astype(np.int64) << place
    near = low[far]
    size = (4 | (symbol[far] - 31) & 3) << near | value & ((1 << near) - 1)
    d = symbol - DIRECT
    d[far] = np.where(value >> near, -size, size)
    a = ordered(np.frombuffer(base, f"<u{width}"))
    return as_bytes(unordered(a + d.astype(f"<i{width}").view(f"<u{width}")))
