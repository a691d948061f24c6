"""Codec `qres`: the quantised residual Q(B - A) of the draft's step d, the one lossy codec (R-8.2.6-3).

    scales, float32 [groups] | blocks of codes, coded in the context of the base's exponents

b >= 2 bits: q = clip(round_half_even(delta / s)) within +-(2^(b-1) - 1); b = 1: q = +-1, zero counts as +1.
B' = round(A + s q). A group is `cp.group` consecutive elements that share a scale.
Entropy coding makes bits only a bound: with a wide step most codes are zero and cost a fraction of a bit.
"""

from collections.abc import Iterator
from itertools import chain

import numpy as np

from moestro.core.errors import FormatError
from moestro.package.codecs import contextual
from moestro.package.codecs.differences import suits
from moestro.package.codecs.long_blocks import LongBlocks, framed
from moestro.package.codecs.numbers import add_scaled, per_element, to_float32
from moestro.package.descriptor import TensorEntry
from moestro.package.spans import Span

BITS = (1, 2, 3, 4, 8)
OFFSET = 128
"""Symbol of a code: code + 128."""


def groups(tensor: TensorEntry, group: int) -> int:
    """How many scales a tensor has."""
    elements = tensor.num_bytes // tensor.dtype.item_bytes
    return -(-elements // group)


def quantise(delta: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """int8 codes of float32 differences; `scale` is of the same length or one number."""
    if bits == 1:
        return np.where(delta < 0, np.int8(-1), np.int8(1))
    most = (1 << (bits - 1)) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(delta / scale)
    return np.clip(np.nan_to_num(codes), -most, most).astype(np.int8)


class Quantised:
    """The codec; encoding needs scales, which the caller chooses for a rate or an error.

    codes   int8 for every element, where the caller has chosen them too; else they come from rounding
    """

    name = "qres"

    def __init__(self, scales: np.ndarray | None = None, codes: np.ndarray | None = None) -> None:
        self.scales, self.codes = scales, codes

    def encode(self, tensor: TensorEntry, target: Span, base: Span | None) -> Iterator[bytes]:
        """The stored form, block by block; decoding gives B', not the target."""
        assert base is not None
        assert self.scales is not None
        scales, given, bits, group = self.scales, self.codes, int(tensor.cp["bits"]), int(tensor.cp["group"])

        def pack(old: memoryview, new: memoryview, start: int) -> bytes:
            first, count = start // tensor.dtype.item_bytes, len(old) // tensor.dtype.item_bytes
            if given is None:
                delta = to_float32(new, tensor.dtype) - to_float32(old, tensor.dtype)
                codes = quantise(delta, per_element(scales, group, first, count), bits)
            else:
                codes = given[first : first + count]
            symbols = (codes.astype(np.int16) + OFFSET).astype(np.uint8)
            return contextual.pack(symbols, contextual.exponents(old, tensor.dtype))

        return chain([scales.astype("<f4").tobytes()], framed(tensor, target, base, pack))

    def open(self, tensor: TensorEntry, stored: Span, base: Span | None) -> "QuantisedReader":
        """A decoder."""
        bits, group = tensor.cp.get("bits"), tensor.cp.get("group")
        if base is None or not suits(tensor.dtype) or bits not in BITS or not isinstance(group, int) or group < 1:
            raise FormatError(f"tensor {tensor.name}: qres of {tensor.dtype.name} with cp {dict(tensor.cp)}")
        return QuantisedReader(tensor, stored, base)


class QuantisedReader(LongBlocks):
    """Random access to the blocks of one tensor."""

    def __init__(self, tensor: TensorEntry, stored: Span, base: Span) -> None:
        self.bits, self.group = int(tensor.cp["bits"]), int(tensor.cp["group"])
        head = 4 * groups(tensor, self.group)
        if head > stored.length:
            raise FormatError("scales run past the end", where=f"tensor {tensor.name}")
        super().__init__(tensor, stored, base, head)

    def decode(self, base: memoryview, stored: memoryview, start: int) -> memoryview:
        """One block."""
        symbols, rest = contextual.unpack(stored, contextual.exponents(base, self.tensor.dtype), self.where)
        codes = symbols.astype(np.int16) - OFFSET
        most = max(1, (1 << (self.bits - 1)) - 1)
        if len(rest) or (np.abs(codes) > most).any():
            raise FormatError(f"codes of {self.bits} bits are out of range", where=self.where)
        scales, first = self._scales(start // self.tensor.dtype.item_bytes, len(codes))
        return add_scaled(base, codes.astype(np.int8), scales, self.group, first, self.tensor.dtype)

    def _scales(self, first: int, count: int) -> tuple[np.ndarray, int]:
        """Of some elements alone, and how many elements lie before `first` under the first of them."""
        low, high = first // self.group, (first + count - 1) // self.group + 1
        scales = np.frombuffer(self.stored.read(4 * low, 4 * (high - low)), "<f4").astype(np.float32)
        if not np.isfinite(scales).all():
            raise FormatError("a scale is not a finite number", where=self.where)
        return scales, first - low * self.group
