"""Data types of tensors and how many bytes a tensor has (specification 6.1.5).

Names are the specification's; safetensors' names stand beside them. Types narrower than the specification's list
(float8_e8m0 and below) are our additions, because safetensors files hold them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from moestro.core.errors import FormatError, LimitExceeded
from moestro.package.limits import MAX_FILE_BYTES, MAX_RANK


@dataclass(frozen=True, slots=True)
class DataType:
    """One element type."""

    name: str
    bits: int
    safetensors: str | None
    """Name in safetensors files; None where they lack the type."""
    kind: Literal["float", "other"] = "other"
    exponent_bits: int = 0
    """Of floats with a codec of their own (16 bits and more)."""

    @property
    def item_bytes(self) -> int:
        """Bytes of one element; 1 for narrower types, which codecs see as bytes."""
        return max(1, self.bits // 8)


DATA_TYPES = {
    data_type.name: data_type
    for data_type in (
        DataType("bool", 8, "BOOL"),
        DataType("uint8", 8, "U8"),
        DataType("int8", 8, "I8"),
        DataType("uint16", 16, "U16"),
        DataType("int16", 16, "I16"),
        DataType("uint32", 32, "U32"),
        DataType("int32", 32, "I32"),
        DataType("uint64", 64, "U64"),
        DataType("int64", 64, "I64"),
        DataType("uint4", 4, None),
        DataType("int4", 4, None),
        DataType("float16", 16, "F16", "float", 5),
        DataType("bfloat16", 16, "BF16", "float", 8),
        DataType("float32", 32, "F32", "float", 8),
        DataType("float64", 64, "F64", "float", 11),
        DataType("complex64", 64, "C64"),
        DataType("float8_e4m3", 8, "F8_E4M3"),
        DataType("float8_e5m2", 8, "F8_E5M2"),
        DataType("float8_e8m0", 8, "F8_E8M0"),
        DataType("float8_e4m3fnuz", 8, "F8_E4M3FNUZ"),
        DataType("float8_e5m2fnuz", 8, "F8_E5M2FNUZ"),
        DataType("float6_e2m3", 6, "F6_E2M3"),
        DataType("float6_e3m2", 6, "F6_E3M2"),
        DataType("float4_e2m1", 4, "F4"),
    )
}
BY_SAFETENSORS_NAME = {data_type.safetensors: data_type for data_type in DATA_TYPES.values() if data_type.safetensors}


def data_type(name: object) -> DataType:
    """The type of that name; raises FormatError for any other."""
    found = DATA_TYPES.get(name) if isinstance(name, str) else None
    if found is None:
        raise FormatError(f"dtype is {str(name)[:40]!r}; known are {', '.join(DATA_TYPES)}")
    return found


def checked_shape(shape: object) -> tuple[int, ...]:
    """A list of at most 8 extents, each 0 or more."""
    if type(shape) is not list or not {int}.issuperset(map(type, shape)) or min(shape, default=0) < 0:
        raise FormatError(f"shape is {str(shape)[:80]}; it must be a list of whole numbers, 0 or more")
    if len(shape) > MAX_RANK:
        raise LimitExceeded(f"a tensor has {len(shape)} dimensions; at most {MAX_RANK} are allowed")
    return tuple(shape)


def num_bytes(dtype: DataType, shape: Sequence[int]) -> int:
    """ceil(elements x bits / 8), checked against the largest file."""
    size = (prod(shape) * dtype.bits + 7) // 8
    if size > MAX_FILE_BYTES:
        raise LimitExceeded(f"a tensor of shape {list(shape)} has {size} bytes; at most 2^53 are allowed")
    return size
