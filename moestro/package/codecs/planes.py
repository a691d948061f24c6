"""Bit patterns turned so that they compress: rotated or subtracted, then cut into planes of bytes, top plane first.

    split(target, base, width, mode) -> [planes, elements]        join(planes, base, width, mode) -> bytes

A float's top byte mixes sign and exponent; rotated left by one bit it is the pure exponent, of which trained weights
use few values. Against a base, similar patterns leave small differences, whose top planes are mostly zero.
"""

import ctypes
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from moestro.package.kernels import codecs, pointer
from moestro.package.spans import Array, as_bytes


class Mode(IntEnum):
    """What is done to a bit pattern before it is cut; the numbers are those of codecs.cpp."""

    PLAIN = 0
    ROTATE = 1
    XOR = 2
    FLOAT_DIFFERENCE = 3
    INT_DIFFERENCE = 4


def split(target: memoryview, base: memoryview | None, width: int, mode: Mode) -> Array:
    """Planes [width, elements]; plane 0 holds the top bytes. Element width is 1, 2, 4 or 8 bytes."""
    planes = np.empty((width, len(target) // width), np.uint8)
    library = codecs()
    if library is None:
        patterns = _forward(_patterns(target, width), _patterns(target if base is None else base, width), mode)
        planes[:] = patterns.view(np.uint8).reshape(-1, width)[:, ::-1].T
        return planes
    at = pointer(base) if base is not None else None
    library.split_planes(pointer(target), at, planes.shape[1], width, mode, planes.ctypes.data)
    return planes


def join(planes: Sequence[memoryview], base: memoryview | None, width: int, mode: Mode) -> memoryview:
    """The inverse of `split`: element bytes, little end first."""
    count = len(planes[0])
    library = codecs()
    if library is None:
        cut = np.stack([np.frombuffer(plane, np.uint8) for plane in reversed(planes)], axis=1)
        patterns = np.ascontiguousarray(cut).view(f"<u{width}").reshape(-1)
        back = _backward(patterns, patterns if base is None else _patterns(base, width), mode)
        return as_bytes(back)
    out = np.empty(count * width, np.uint8)
    addresses = (ctypes.c_void_p * width)(*(pointer(plane) for plane in planes))
    library.join_planes(addresses, pointer(base) if base is not None else None, count, width, mode, out.ctypes.data)
    return as_bytes(out)


def _patterns(data: memoryview, width: int) -> np.ndarray:
    return np.frombuffer(data, f"<u{width}")


def ordered(patterns: np.ndarray) -> np.ndarray:
    """Float bit patterns as integers in the order of the numbers: ~u for negative ones, else u with the top bit set."""
    sign = patterns.dtype.type(1 << (8 * patterns.itemsize - 1))
    return np.where(patterns & sign, ~patterns, patterns | sign)


def unordered(numbers: np.ndarray) -> np.ndarray:
    """The inverse of `ordered`."""
    sign = numbers.dtype.type(1 << (8 * numbers.itemsize - 1))
    return np.where(numbers & sign, numbers & ~sign, ~numbers)


def _forward(b: np.ndarray, a: np.ndarray, mode: Mode) -> np.ndarray:
    bits = 8 * b.itemsize
    match mode:
        case Mode.ROTATE:
            return (b << 1) | (b >> (bits - 1))
        case Mode.XOR:
            return b ^ a
        case Mode.FLOAT_DIFFERENCE:
            return _zigzag(ordered(b) - ordered(a))
        case Mode.INT_DIFFERENCE:
            return _zigzag(b - a)
    return b


def _backward(x: np.ndarray, a: np.ndarray, mode: Mode) -> np.ndarray:
    bits = 8 * x.itemsize
    match mode:
        case Mode.ROTATE:
            return (x >> 1) | (x << (bits - 1))
        case Mode.XOR:
            return x ^ a
        case Mode.FLOAT_DIFFERENCE:
            return unordered(ordered(a) + _unzigzag(x))
        case Mode.INT_DIFFERENCE:
            return a + _unzigzag(x)
    return x


def _zigzag(d: np.ndarray) -> np.ndarray:
    """Small differences of either sign to small numbers: 0, -1, 1, -2 ... -> 0, 1, 2, 3 ..."""
    return (d << 1) ^ (d.view(d.dtype.str.replace("u", "i")) >> (8 * d.itemsize - 1)).view(d.dtype)


def _unzigzag(z: np.ndarray) -> np.ndarray:
    return (z >> 1) ^ (np.zeros_like(z) - (z & 1))
