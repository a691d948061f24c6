"""Floats of 16 and 32 bits as float32 and back, rounded to nearest even, the same on every machine.

Any NaN that a rounding meets becomes the one quiet NaN of its type, since its other bits differ between CPUs.
"""

import numpy as np

from moestro.package.dtypes import DataType
from moestro.package.kernels import codecs, pointer
from moestro.package.spans import as_bytes

KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}
"""Types with a codec of their own; the numbers are those of codecs.cpp."""


def to_float32(data: memoryview, dtype: DataType) -> np.ndarray:
    """Exact values."""
    match dtype.name:
        case "bfloat16":
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        case "float16":
            return np.frombuffer(data, "<f2").astype(np.float32)
    return np.frombuffer(data, "<f4").astype(np.float32)


def from_float32(values: np.ndarray, dtype: DataType) -> np.ndarray:
    """Bit patterns of the nearest values of the type."""
    match dtype.name:
        case "bfloat16":
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            rounded = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
            return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
        case "float16":
            with np.errstate(over="ignore"):
                return np.where(np.isnan(values), np.uint16(0x7E00), values.astype(np.float16).view(np.uint16))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(np.isnan(values), np.uint32(0x7FC00000), bits)


def add_scaled(
    base: memoryview, codes: np.ndarray, scales: np.ndarray, group: int, first: int, dtype: DataType
) -> memoryview:
    """round(base + scale x code), each step rounded.

    base     elements `first`.. of a tensor
    codes    int8, one per element
    scales   float32; `group` consecutive elements of the tensor share one
    """
    library = codecs()
    if library is None:
        scale = per_element(scales, group, first, len(codes))
        with np.errstate(over="ignore", invalid="ignore"):
            total = to_float32(base, dtype) + scale * codes.astype(np.float32)
        return as_bytes(from_float32(total, dtype))
    out = np.empty(len(codes), f"<u{dtype.item_bytes}")
    codes, kind = np.ascontiguousarray(codes), KINDS[dtype.name]
    library.dequantize(
        pointer(base), codes.ctypes.data, scales.ctypes.data, group, first, len(codes), kind, out.ctypes.data
    )
    return as_bytes(out)


def per_element(scales: np.ndarray, group: int, first: int, count: int) -> np.ndarray:
    """The scale of `count` elements from element `first` on."""
    return scales[np.arange(first, first + count) // group]


def add_product(base: memoryview, p_BMR: np.ndarray, q_BRN: np.ndarray, first: int, dtype: DataType) -> memoryview:
    """round(A + P Q), ranks added one after another, for the elements of A from `first` on that `base` holds."""
    count = len(base) // dtype.item_bytes
    _, rows, rank = p_BMR.shape
    columns = q_BRN.shape[2]
    library = codecs()
    if library is None:
        place = np.arange(first, first + count)
        row, column = place // columns, place % columns
        total = to_float32(base, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            for k in range(rank):
                total = total + p_BMR[row // rows, row % rows, k] * q_BRN[row // rows, k, column]
        return as_bytes(from_float32(total, dtype))
    out, total = np.empty(count, f"<u{dtype.item_bytes}"), np.empty(columns, np.float32)
    library.lowrank_predict(
        pointer(base),
        p_BMR.ctypes.data,
        q_BRN.ctypes.data,
        rank,
        rows,
        columns,
        first,
        count,
        KINDS[dtype.name],
        total.ctypes.data,
        out.ctypes.data,
    )
    return as_bytes(out)
