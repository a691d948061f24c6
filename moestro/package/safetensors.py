"""The outside of safetensors files: their headers, read and checked by ourselves, and whole files put together again.

    read_header(view, name) -> Header        Header.parse(text, data_bytes, name) -> tensors in order of their data

8 bytes of header length, JSON of types, shapes and offsets, the numbers (huggingface/safetensors, README). The header
is kept as the bytes it is, so that a file comes back bit for bit whatever its order, spacing or metadata.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from moestro.core.errors import ConversionError, FormatError, PackageError
from moestro.core.tensors import header_text
from moestro.package import canonical
from moestro.package.dtypes import BY_SAFETENSORS_NAME, DataType, checked_shape, num_bytes

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """One tensor of a file."""

    name: str
    dtype: DataType
    shape: tuple[int, ...]
    start: int
    """From the end of the header."""
    length: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header."""

    text: bytes
    """JSON as in the file, padding included."""
    tensors: tuple[HeaderTensor, ...]
    """In order of their data."""

    @property
    def data_start(self) -> int:
        """Where the numbers begin in the file."""
        return 8 + len(self.text)

    @classmethod
    def parse(cls, text: bytes, data_bytes: int, name: str) -> "Header":
        """Check the JSON against the size of the data; raises ConversionError."""
        try:
            table = canonical.loads_loosely(text, MAX_HEADER_BYTES, name)
            if not isinstance(table, dict):
                raise FormatError("the header is not a JSON object")
            tensors = [_tensor(key, entry) for key, entry in table.items() if key != "__metadata__"]
        except PackageError as error:
            raise ConversionError(f"{name} is not a safetensors file: {error}") from error
        tensors.sort(key=lambda tensor: (tensor.start, tensor.length))
        end = 0
        for tensor in tensors:
            if tensor.start != end:
                raise ConversionError(f"{name}: tensor {tensor.name!r} begins at {tensor.start}, not at {end}")
            end += tensor.length
        if end != data_bytes:
            raise ConversionError(f"{name}: tensors end at {end}, the file at {data_bytes}; it is cut off or longer")
        return cls(text, tuple(tensors))


def _tensor(name: str, entry: object) -> HeaderTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{name[:40]!r} must have dtype, shape and data_offsets")
    dtype = BY_SAFETENSORS_NAME.get(str(entry["dtype"]))
    if dtype is None:
        raise FormatError(f"{name[:40]!r} has the unknown type {str(entry['dtype'])[:20]!r}")
    shape, offsets = checked_shape(entry["shape"]), entry["data_offsets"]
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(place) is not int or place < 0 for place in offsets)
    ):
        raise FormatError(f"{name[:40]!r} has data_offsets {str(offsets)[:40]}")
    length = num_bytes(dtype, shape)
    if offsets[1] - offsets[0] != length:
        raise FormatError(f"{name[:40]!r} has {offsets[1] - offsets[0]} bytes; its shape has {length}")
    return HeaderTensor(name, dtype, shape, offsets[0], length)


def read_header(view: memoryview, name: str) -> Header:
    """The header of a whole file."""
    if len(view) < 8:
        raise ConversionError(f"{name} is not a safetensors file: it has {len(view)} bytes")
    (length,) = struct.unpack_from("<Q", view)
    if length > min(MAX_HEADER_BYTES, len(view) - 8):
        raise ConversionError(f"{name} is not a safetensors file: its header of {length} bytes runs past the end")
    return Header.parse(bytes(view[8 : 8 + length]), len(view) - 8 - length, name)


def plain_header(tensors: Sequence[tuple[str, DataType, tuple[int, ...]]]) -> Header:
    """A header for tensors that never had one: widest types first, then by name, as the library writes."""
    ordered = sorted(tensors, key=lambda tensor: (-tensor[1].bits, tensor[0]))
    rows = []
    for name, dtype, shape in ordered:
        if dtype.safetensors is None:
            raise ConversionError(f"tensor {name} has type {dtype.name}, which safetensors files cannot hold")
        rows.append((name, dtype.safetensors, shape, num_bytes(dtype, shape)))
    return Header.parse(header_text(rows), sum(row[3] for row in rows), "model.safetensors")
