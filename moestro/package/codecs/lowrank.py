"""Codec `lowrank`: base plus a product of two thin matrices, as a merged LoRA leaves it, corrected to the last bit.

    P [batch x rows, rank] | Q [batch, rank, columns] | blocks of `odiff-ctx` against the prediction (cp.exact = 1)

A tensor of three or more dimensions is a batch of matrices. prediction = round(A + P Q), summed in float32 in the order
of ranks without fused operations, so that every machine predicts the same bits. `fit_lowrank` finds the factors.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from moestro.core.errors import FormatError
from moestro.package.codecs.differences import pack_block, suits, unpack_block
from moestro.package.codecs.long_blocks import LongBlocks, framed
from moestro.package.codecs.numbers import add_product
from moestro.package.descriptor import TensorEntry
from moestro.package.spans import Span

MAX_RANK = 1024
FACTOR_TYPES = {"float16": "<f2", "float32": "<f4"}


@dataclass(frozen=True, slots=True)
class Factors:
    """What is added to the base: for each matrix of the batch P[b] Q[b]. float32 here, factor_dtype on disk."""

    p_BMR: np.ndarray
    q_BRN: np.ndarray
    factor_dtype: str

    @property
    def rank(self) -> int:
        """Columns of P."""
        return int(self.p_BMR.shape[2])

    def cp(self) -> dict[str, int | str]:
        """The codec's parameters."""
        return {"rank": self.rank, "factor_dtype": self.factor_dtype, "exact": 1}

    def stored(self) -> bytes:
        """P, then Q."""
        kind = FACTOR_TYPES[self.factor_dtype]
        return self.p_BMR.astype(kind).tobytes() + self.q_BRN.astype(kind).tobytes()


def matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(batch, rows, columns) of a tensor of two or more dimensions."""
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def predict(factors: Factors, base: memoryview, start: int, tensor: TensorEntry) -> memoryview:
    """The prediction of len(base) bytes from byte `start` of the tensor on."""
    first = start // tensor.dtype.item_bytes
    return add_product(base, factors.p_BMR, factors.q_BRN, first, tensor.dtype)


class LowRank:
    """The codec; encoding needs factors, see `fit_lowrank`."""

    name = "lowrank"

    def __init__(self, factors: Factors | None = None) -> None:
        self.factors = factors

    def encode(self, tensor: TensorEntry, target: Span, base: Span | None) -> Iterator[bytes]:
        """The stored form, block by block."""
        assert base is not None
        assert self.factors is not None
        factors = self.factors

        def pack(old: memoryview, new: memoryview, start: int) -> bytes:
            return pack_block(predict(factors, old, start, tensor), new, tensor.dtype)

        return chain([factors.stored()], framed(tensor, target, base, pack))

    def open(self, tensor: TensorEntry, stored: Span, base: Span | None) -> "LowRankReader":
        """A decoder."""
        if base is None or not suits(tensor.dtype) or len(tensor.shape) < 2 or not tensor.num_bytes:
            raise FormatError(f"lowrank does not suit {tensor.dtype.name} of shape {list(tensor.shape)}")
        rank, kind = tensor.cp.get("rank"), tensor.cp.get("factor_dtype")
        if (
            not isinstance(rank, int)
            or not 1 <= rank <= MAX_RANK
            or kind not in FACTOR_TYPES
            or tensor.cp.get("exact") != 1
        ):
            raise FormatError(f"tensor {tensor.name}: cp of lowrank is {dict(tensor.cp)}")
        return LowRankReader(tensor, stored, base, rank, str(kind))


class LowRankReader(LongBlocks):
    """Random access to the blocks of one tensor."""

    def __init__(self, tensor: TensorEntry, stored: Span, base: Span, rank: int, kind: str) -> None:
        batch, rows, columns = matrices(tensor.shape)
        item = np.dtype(FACTOR_TYPES[kind])
        p_bytes, q_bytes = batch * rows * rank * item.itemsize, batch * rank * columns * item.itemsize
        if p_bytes + q_bytes > stored.length:
            raise FormatError(f"factors of rank {rank} run past the end", where=f"tensor {tensor.name}")
        super().__init__(tensor, stored, base, p_bytes + q_bytes)
        self.rank, self.kind, self.q_start = rank, kind, p_bytes

    def decode(self, base: memoryview, stored: memoryview, start: int) -> memoryview:
        """One block; of the factors, which may be larger than memory, only what it needs is read."""
        factors, start = self._factors(start, len(base))
        return unpack_block(predict(factors, base, start, self.tensor), stored, self.tensor.dtype, self.where)

    def _factors(self, start: int, count: int) -> tuple[Factors, int]:
        """Of the matrices that these bytes touch, of a single one only their rows; and where the bytes begin there."""
        _, rows, columns = matrices(self.tensor.shape)
        width, rank = self.tensor.dtype.item_bytes, self.rank
        first_row, end_row = start // width // columns, (start + count - 1) // width // columns + 1
        low, high = first_row // rows, (end_row - 1) // rows + 1
        if high - low > 1:
            first_row, end_row = low * rows, high * rows
        p = self._floats(0, first_row * rank, end_row * rank)
        q = self._floats(self.q_start, low * rank * columns, high * rank * columns)
        factors = Factors(p.reshape(high - low, -1, rank), q.reshape(high - low, rank, columns), self.kind)
        return factors, start - first_row * columns * width

    def _floats(self, at: int, first: int, end: int) -> np.ndarray:
        """Numbers of a factor that begins at byte `at`."""
        item = np.dtype(FACTOR_TYPES[self.kind])
        stored = self.stored.read(at + first * item.itemsize, (end - first) * item.itemsize)
        return np.frombuffer(stored, item).astype(np.float32)
