"""Which codec makes a changed tensor smallest: each is tried on a sample (R-8.2.6-2).

    best(tensor, base, target) -> Coding        base None: the tensor is new

Update codecs of floats compete with each other and with the full form. A low-rank product is looked for only where a
corner of the tensor shows one, since finding it costs more than all the rest.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

import numpy as np

from moestro.package.codecs.differences import suits
from moestro.package.codecs.lowrank import LowRank, matrices
from moestro.package.codecs.lowrank_fit import fit, looks_lowrank
from moestro.package.codecs.registry import READERS, Codec
from moestro.package.descriptor import TensorEntry
from moestro.package.hashing import Buffer
from moestro.package.spans import Bytes, Span, same_bytes

SAMPLE_PIECES, PIECE_ELEMENTS = 8, 1 << 15
FULL = "bp-zstd"
GAIN = 0.95
"""A low-rank form must beat the best other form by this factor; it costs more to make and to apply."""


@dataclass(frozen=True, slots=True)
class Coding:
    """How a tensor will be stored."""

    codec: str
    encode: Callable[[], Iterable[Buffer]]
    cp: Mapping[str, int | str] = field(default_factory=dict)


def coding(tensor: TensorEntry, codec: Codec, target: Span, base: Span | None) -> Coding:
    """One codec, whatever it costs."""
    entry = replace(tensor, codec=codec.name)
    return Coding(codec.name, partial(codec.encode, entry, target, base), tensor.cp)


def best(tensor: TensorEntry, base: Span | None, target: Span) -> Coding:
    """The smallest exact form, judged by samples."""
    if base is None:
        return coding(tensor, READERS[FULL], target, None)
    old, new = sample(tensor, base, target)
    share = {name: _share(tensor, name, old, new) for name in _candidates(tensor, old, new)}
    codec = min(share, key=lambda name: (share[name], name))
    found = _low_rank(tensor, base, target, share[codec])
    return found or coding(tensor, READERS[codec], target, None if codec == FULL else base)


def sample(tensor: TensorEntry, base: Span, target: Span) -> tuple[bytes, bytes]:
    """Pieces of base and target, evenly spread, from where they differ if they do so anywhere sampled."""
    width = tensor.dtype.item_bytes
    size, total = PIECE_ELEMENTS * width, target.length
    starts = range(0, total, size)
    if len(starts) > SAMPLE_PIECES:
        starts = range(0, total - size + 1, (total - size) // width // (SAMPLE_PIECES - 1) * width)
    pieces = [(base.read(at, min(size, total - at)), target.read(at, min(size, total - at))) for at in starts]
    differing = [pair for pair in pieces if not same_bytes(*pair)]
    old, new = zip(*(differing or pieces), strict=True)
    return b"".join(old), b"".join(new)


def _candidates(tensor: TensorEntry, old: bytes, new: bytes) -> list[str]:
    codes = f"<u{tensor.dtype.item_bytes}"
    changed = np.count_nonzero(np.frombuffer(old, codes) != np.frombuffer(new, codes))
    names = ["odiff-ctx"] if suits(tensor.dtype) else ["xor-bp-zstd", "odiff-bp-zstd"]
    names += ["sparse"] if 20 * changed < len(new) // tensor.dtype.item_bytes else []
    return [*names, FULL]


def _share(tensor: TensorEntry, name: str, old: bytes, new: bytes) -> float:
    """Stored bytes a decoded byte of the sample."""
    entry = replace(tensor, codec=name, shape=(8 * len(new) // tensor.dtype.bits,))
    base = None if name == FULL else Bytes(old)
    return sum(len(part) for part in READERS[name].encode(entry, Bytes(new), base)) / len(new)


def _low_rank(tensor: TensorEntry, base: Span, target: Span, other: float) -> Coding | None:
    if not suits(tensor.dtype) or len(tensor.shape) < 2 or not prod(tensor.shape):
        return None
    rank = looks_lowrank(tensor, base, target)
    batch, rows, columns = matrices(tensor.shape)
    factors_bytes = 2 * batch * rank * (rows + columns)
    if not rank or factors_bytes > GAIN * other * tensor.num_bytes:
        return None
    factors = fit(tensor, base, target, rank)
    entry = replace(tensor, codec="lowrank", cp=factors.cp())
    stored = list(LowRank(factors).encode(entry, target, base))
    if sum(map(len, stored)) > GAIN * other * tensor.num_bytes:
        return None
    return Coding("lowrank", lambda: stored, factors.cp())
