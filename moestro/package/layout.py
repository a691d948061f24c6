"""The two fixed headers of a packaged model file (specification 8.2.2, Tables 59 and 60).

    | file header 16 | pad | model header 20 | descriptor | digest 32 | pad | model data | pad | model header 20 | ...

All integers are unsigned, 32 bits, little end first. Padding is zero; model headers begin at multiples of 64, model
data at multiples of 2^align_log2.
"""

import struct
from dataclasses import dataclass

from moestro.core.errors import FormatError, LimitExceeded, UnsupportedVersion
from moestro.package.limits import (
    ALIGNMENT,
    MAX_ALIGN_LOG2,
    MAX_DESCRIPTOR_BYTES,
    MAX_FILE_BYTES,
    MAX_MODELS,
    MIN_ALIGN_LOG2,
)

MAGIC = b"PTMF"
FORMAT_VERSION = 2 << 16
"""Major 2: digests of tensors are trees, see docs/package.md. Major 1 is the unpublished draft before it."""
FILE_HEADER = struct.Struct("<4sIII")
MODEL_HEADER = struct.Struct("<IIIII")
DIGEST_BYTES = 32
COMPACT, RESIDUAL, ENCRYPTED = 1, 2, 4
"""Model flags; the same three stand in bits 8 to 10 of the file's flags."""
SUFFIX = ".ptm"


@dataclass(frozen=True, slots=True)
class FileHeader:
    """Table 59."""

    model_count: int
    align_log2: int
    any_flags: int
    """OR of the flags of all models."""

    def pack(self) -> bytes:
        """16 bytes."""
        return FILE_HEADER.pack(MAGIC, FORMAT_VERSION, self.model_count, self.align_log2 | self.any_flags << 8)


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """Table 60."""

    index: int
    flags: int
    descriptor_bytes: int
    data_bytes: int

    def pack(self) -> bytes:
        """20 bytes."""
        low, high = self.data_bytes & 0xFFFFFFFF, self.data_bytes >> 32
        return MODEL_HEADER.pack(self.index, self.flags, self.descriptor_bytes, low, high)


def parse_file_header(data: bytes) -> FileHeader:
    """Check and read the first 16 bytes."""
    if len(data) < FILE_HEADER.size:
        raise FormatError(f"the file has {len(data)} bytes; a header has {FILE_HEADER.size}", offset=0)
    magic, version, model_count, flags = FILE_HEADER.unpack_from(data)
    if magic != MAGIC:
        raise FormatError(f"begins with {magic.hex()}, not with PTMF: no packaged model file", offset=0)
    if version >> 16 != FORMAT_VERSION >> 16:
        raise UnsupportedVersion(
            f"format version is {version >> 16}.{version & 0xFFFF}; this moestro reads {FORMAT_VERSION >> 16}.x"
        )
    if not 1 <= model_count <= MAX_MODELS:
        raise LimitExceeded(f"model_count is {model_count}; 1 to {MAX_MODELS} are allowed")
    align_log2, any_flags = flags & 0xFF, flags >> 8
    if not MIN_ALIGN_LOG2 <= align_log2 <= MAX_ALIGN_LOG2:
        raise FormatError(f"align_log2 is {align_log2}; {MIN_ALIGN_LOG2} to {MAX_ALIGN_LOG2} are allowed", offset=12)
    if any_flags > COMPACT | RESIDUAL | ENCRYPTED:
        raise FormatError(f"reserved bits of the flags are set ({flags:#x})", offset=12)
    return FileHeader(model_count, align_log2, any_flags)


def parse_model_header(data: bytes, index: int, offset: int, file_bytes: int) -> ModelHeader:
    """Check and read 20 bytes; `offset` is where they stand, for messages and bounds."""
    if len(data) < MODEL_HEADER.size:
        raise FormatError("the file ends inside a model header", offset=offset)
    found, flags, descriptor_bytes, low, high = MODEL_HEADER.unpack_from(data)
    if found != index:
        raise FormatError(f"model_index is {found}, not {index}", offset=offset)
    if flags > COMPACT | RESIDUAL | ENCRYPTED:
        raise FormatError(f"reserved bits of model_flags are set ({flags:#x})", offset=offset + 4)
    if not 2 <= descriptor_bytes <= MAX_DESCRIPTOR_BYTES:
        raise LimitExceeded(f"descriptor_length is {descriptor_bytes}; 2 to {MAX_DESCRIPTOR_BYTES} are allowed")
    data_bytes = low | high << 32
    if data_bytes > MAX_FILE_BYTES or offset + MODEL_HEADER.size + descriptor_bytes + data_bytes > file_bytes:
        raise FormatError(f"descriptor and data ({data_bytes} bytes) run past the end of the file", offset=offset + 8)
    return ModelHeader(index, flags, descriptor_bytes, data_bytes)


def round_up(number: int, multiple: int) -> int:
    """The next multiple, or the number itself."""
    return -(-number // multiple) * multiple


def model_start(end_before: int) -> int:
    """Where a model header stands, after the file header or the data before it."""
    return round_up(end_before, ALIGNMENT)


def data_start(header_offset: int, descriptor_bytes: int, align_log2: int) -> int:
    """Where the data of a model begins."""
    return round_up(header_offset + MODEL_HEADER.size + descriptor_bytes + DIGEST_BYTES, 1 << align_log2)
