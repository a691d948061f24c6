"""The blocked container: 1 MiB of decoded bytes a block, each block cut into planes, each plane compressed or not.

    u32 blocks; per block:  u32 planes, planes x u32 length, the planes      (bit 31: stored raw, bit 30: constant)

Every block decodes alone, so one tensor, or a part of one, costs what it weighs. Codecs `zstd`, `bp-zstd`,
`xor-bp-zstd` and `odiff-bp-zstd` differ in what is done before the cut (`planes.Mode`) and in the effort on top planes.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from moestro.core.errors import FormatError
from moestro.package.codecs.compressor import compress, decompress, looks_random
from moestro.package.codecs.planes import Mode, join, split
from moestro.package.descriptor import TensorEntry
from moestro.package.dtypes import DataType
from moestro.package.spans import Array, Span

BLOCK_BYTES = 1 << 20
RAW, CONSTANT = 1 << 31, 1 << 30
U32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Blocked:
    """One of the four codecs."""

    name: str

    def _cut(self, dtype: DataType) -> tuple[int, Mode]:
        """Element width in bytes and what is done to patterns; `zstd` sees plain bytes."""
        is_float = dtype.kind == "float" and dtype.bits >= 16
        modes = {
            "zstd": Mode.PLAIN,
            "bp-zstd": Mode.ROTATE if is_float else Mode.PLAIN,
            "xor-bp-zstd": Mode.XOR,
            "odiff-bp-zstd": Mode.FLOAT_DIFFERENCE if is_float else Mode.INT_DIFFERENCE,
        }
        return (1 if self.name == "zstd" else dtype.item_bytes), modes[self.name]

    def encode(self, tensor: TensorEntry, target: Span, base: Span | None) -> Iterator[bytes]:
        """The stored form, block by block."""
        width, mode = self._cut(tensor.dtype)
        yield U32.pack(num_blocks(target.length))
        for start in range(0, target.length, BLOCK_BYTES):
            count = min(BLOCK_BYTES, target.length - start)
            planes = split(
                target.read(start, count), base.read(start, count) if base is not None else None, width, mode
            )
            yield b"".join(_pack(planes, exponents_first=mode is Mode.ROTATE))

    def open(self, tensor: TensorEntry, stored: Span, base: Span | None) -> "BlockReader":
        """A decoder; checks all lengths before anything is decoded."""
        width, mode = self._cut(tensor.dtype)
        return BlockReader(tensor, stored, base, width, mode)


def num_blocks(length: int) -> int:
    """Blocks for so many decoded bytes."""
    return -(-length // BLOCK_BYTES)


def _pack(planes: Array, exponents_first: bool) -> Iterator[bytes]:
    lengths, payloads = [], []
    for number, plane in enumerate(planes):
        length, payload = _pack_plane(plane, "exponents" if exponents_first and number == 0 else "3")
        lengths.append(length)
        payloads.append(payload)
    yield struct.pack(f"<{1 + len(lengths)}I", len(lengths), *lengths)
    yield from payloads


def _pack_plane(plane: Array, kind: str) -> tuple[int, bytes]:
    if plane[0] == plane[-1] and not (plane != plane[0]).any():
        return CONSTANT | 1, plane[:1].tobytes()
    if not looks_random(plane):
        frame = compress(plane.data, kind)
        if len(frame) < len(plane) - len(plane) // 64:
            return len(frame), frame
    return RAW | len(plane), plane.tobytes()


class BlockReader:
    """Random access to the blocks of one tensor."""

    block_bytes = BLOCK_BYTES

    def __init__(self, tensor: TensorEntry, stored: Span, base: Span | None, width: int, mode: Mode) -> None:
        self.tensor, self.stored, self.base, self.width, self.mode = tensor, stored, base, width, mode
        self.size = tensor.num_bytes
        self.starts = self._index()

    def _refuse(self, problem: str, offset: int) -> FormatError:
        return FormatError(problem, offset=offset, where=f"tensor {self.tensor.name}")

    def _index(self) -> list[int]:
        """Where each block begins, from the lengths alone."""
        if self.stored.length < 4 or self._word(0) != num_blocks(self.size):
            raise self._refuse(f"the number of blocks is not {num_blocks(self.size)}", 0)
        starts, at = [], 4
        for index in range(num_blocks(self.size)):
            starts.append(at)
            at += sum(length for length, _ in self._lengths(index, at)) + 4 + 4 * self.width
        if at != self.stored.length:
            raise self._refuse(f"blocks end at {at} of {self.stored.length} stored bytes", at)
        return starts

    def _word(self, at: int) -> int:
        return int(U32.unpack(self.stored.read(at, 4))[0])

    def _lengths(self, index: int, at: int) -> list[tuple[int, int]]:
        """(stored bytes, flags) of each plane of a block."""
        head = 4 + 4 * self.width
        if at + head > self.stored.length:
            raise self._refuse("a block runs past the end", at)
        count, *words = struct.unpack(f"<{1 + self.width}I", self.stored.read(at, head))
        if count != self.width:
            raise self._refuse(f"a block has {count} planes instead of {self.width}", at)
        elements = self._decoded_bytes(index) // self.width
        found = [(word & (CONSTANT - 1), word & (RAW | CONSTANT)) for word in words]
        for length, flags in found:
            expected = {RAW: elements, CONSTANT: 1, RAW | CONSTANT: -1}.get(flags, length)
            if length != expected or length > elements + 64:
                raise self._refuse(f"a plane of {elements} bytes is stored in {length}", at)
        return found

    def _decoded_bytes(self, index: int) -> int:
        return min(BLOCK_BYTES, self.size - index * BLOCK_BYTES)

    def block(self, index: int) -> memoryview:
        """One decoded block; that of the base first, as long as nothing is held for this one."""
        at, count = self.starts[index], self._decoded_bytes(index)
        base = self.base.read(index * BLOCK_BYTES, count) if self.base is not None else None
        elements = count // self.width
        planes = []
        place = at + 4 + 4 * self.width
        for length, flags in self._lengths(index, at):
            payload = self.stored.read(place, length)
            if flags == RAW:
                planes.append(payload)
            elif flags == CONSTANT:
                planes.append(memoryview(bytes(payload) * elements))
            else:
                planes.append(memoryview(decompress(payload, elements, f"tensor {self.tensor.name}")))
            place += length
        if self.mode is Mode.PLAIN and self.width == 1:
            return planes[0]
        return join(planes, base, self.width, self.mode)
