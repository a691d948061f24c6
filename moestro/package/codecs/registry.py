"""The codecs by name, and how a stored tensor becomes a span of decoded bytes."""

from collections.abc import Iterator
from typing import Protocol

from moestro.core.errors import FormatError
from moestro.package.codecs.blocks import Blocked
from moestro.package.codecs.differences import Differences
from moestro.package.codecs.lowrank import LowRank
from moestro.package.codecs.quantised import Quantised
from moestro.package.codecs.sparse import Sparse
from moestro.package.descriptor import TensorEntry
from moestro.package.spans import Blocks, Decoded, Span, pieces

RAW_PIECE = 4 << 20


class Codec(Protocol):
    """Bytes of a tensor to what is stored, and back."""

    @property
    def name(self) -> str: ...

    def encode(self, tensor: TensorEntry, target: Span, base: Span | None) -> Iterator[bytes | memoryview]:
        """The stored form in parts."""
        ...

    def open(self, tensor: TensorEntry, stored: Span, base: Span | None) -> Blocks:
        """A decoder that has checked the stored form's outline."""
        ...


class Raw:
    """Little-endian bytes as they are."""

    name = "raw"

    def encode(self, tensor: TensorEntry, target: Span, base: Span | None) -> Iterator[memoryview]:
        """The bytes themselves."""
        return pieces(target, RAW_PIECE)


BLOCKED = {name: Blocked(name) for name in ("zstd", "bp-zstd", "xor-bp-zstd", "odiff-bp-zstd")}
READERS: dict[str, Codec] = {
    **BLOCKED,
    "odiff-ctx": Differences(),
    "sparse": Sparse(),
    "lowrank": LowRank(),
    "qres": Quantised(),
}


def decoded(tensor: TensorEntry, stored: Span, base: Span | None) -> Span:
    """The decoded bytes of a tensor, read on demand.

    stored   its stored bytes
    base     the decoded bytes of the base's tensor, for codecs that need one
    """
    if tensor.codec == "raw":
        return stored
    if tensor.codec not in ("zstd", "bp-zstd"):
        if base is None:
            raise FormatError(f"tensor {tensor.name} is coded against a base; give the base package")
        if base.length != tensor.num_bytes:
            raise FormatError(f"tensor {tensor.name} has {tensor.num_bytes} bytes, its base {base.length}")
        if tensor.codec == "copy":
            return base
    else:
        base = None
    return Decoded(READERS[tensor.codec].open(tensor, stored, base), tensor.num_bytes)
