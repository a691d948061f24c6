"""Quantised updates, entropy-coded so that codes have a wanted rate (R-8.2.6-3).

    lossy = Lossy.for_rate(bits, rate, changes)        lossy.coding(tensor, base, target, loss) -> Coding or None

From 1.5 bits a weight on: an even quantiser with one scale a row, its step the same multiple of every row's root mean
square. With entropy coding that is within 1.53 dB of the rate-distortion bound (Gish and Pierce 1968); around zero the
threshold lies further out (a dead zone), and each row's scale is then fitted to its codes by least squares. At 1 bit:
the sign of every change times their mean size in the tensor (as BitDelta, Liu 2024): it errs more by squares, yet keeps
more of what a fine-tune learnt, because no direction is dropped. Vectors and small tensors stay exact. `bits` is for
all of it; what exact tensors and descriptions take must be saved elsewhere: by a wider step, or, since a sign cannot
cost less than a bit, by leaving some matrices that changed least as they were.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from moestro.core.errors import ConfigError
from moestro.package.codecs.choose import Coding, coding
from moestro.package.codecs.differences import suits
from moestro.package.codecs.numbers import to_float32
from moestro.package.codecs.quantised import Quantised
from moestro.package.descriptor import TensorEntry
from moestro.package.spans import Span


@dataclass(slots=True)
class Loss:
    """What was lost, as energy: the sum of squares of differences."""

    energy: float = 0.0
    """Of the change from base to target."""
    error: float = 0.0
    """Of what comes out against the target."""
    bits: float = 0.0

    @property
    def relative(self) -> float:
        """Share of the change's energy that is not carried."""
        return self.error / self.energy if self.energy else 0.0

    def table(self) -> dict[str, Any]:
        """For technicalinfo.json."""
        return {
            "scheme": "qres",
            "bits": self.bits,
            "granularity": "row" if self.bits > SIGN_BITS else "tensor",
            "lost_energy": round(self.relative, 6),
        }


DEAD_ZONE = 0.6
"""Differences below this many steps become zero; 0.5 would be plain rounding. The encoder's choice alone."""
SIGN_BITS = 1.0
SIGN_ALLOWANCE = 1.07
"""Bits a weight in all that an update by signs may take: 6.7 % of bfloat16."""
LEAST_RATE = 0.5
"""Where less is left for what is quantised, the model is too small for the wanted rate."""
MOST_LEFT = 0.1
"""Share of elements that may stay as they were; where more had to, signs do not fit and nothing is left out."""
ZEROS_PAY = 0.77
"""From this share of unchanged elements on, three codes cost less than two: entropy of z below z."""
MIN_BITS, MAX_BITS = 1.5, 7.0
CODE_BITS = 8
"""Width of codes in the file; what a code costs is its entropy."""
SMALL_ELEMENTS = 4096
"""Tensors below this size are not worth a loss."""


@dataclass(frozen=True, slots=True)
class Lossy:
    """How changes are rounded."""

    bits: float
    """Wanted mean bits a weight, over all tensors that changed."""
    step: float
    """In root mean squares of a row's change; 0 for signs."""
    left: frozenset[str] = frozenset()
    """Matrices that stay as they were in the base, so that signs fit."""

    @classmethod
    def for_rate(cls, bits: float, rate: float, changes: Iterable[tuple[TensorEntry, np.ndarray]]) -> "Lossy":
        """Find the step, or what is left out.

        rate      mean bits a weight that the quantised tensors may take
        changes   each tensor that may be quantised, and some rows [rows, columns] of its differences
        """
        rate = max(rate, LEAST_RATE)
        if bits == SIGN_BITS:
            return cls(bits, 0.0, least_changed(changes, 1 - rate, MOST_LEFT))
        samples = [change / np.maximum(_rms(change), 1e-30) for _, change in changes]
        low, high = 2.0**-7, 2.0**4
        for _ in range(24):
            step = (low * high) ** 0.5
            low, high = (step, high) if _rate(samples, step) > rate else (low, step)
        return cls(bits, high)

    def coding(self, tensor: TensorEntry, base: Span, target: Span, loss: Loss) -> Coding | None:
        """The quantised form; None where the tensor must stay exact: small, whole numbers, or not finite."""
        if not quantisable(tensor):
            return None
        a, b = (to_float32(span.read(0, span.length), tensor.dtype) for span in (base, target))
        delta = (b - a).reshape(-1, tensor.shape[-1])
        if not (np.isfinite(a).all() and np.isfinite(delta).all()):
            return None
        codes, scales = self._codes(delta)
        loss.energy += float(np.sum(np.square(delta, dtype=np.float64)))
        loss.error += float(np.sum(np.square(delta - scales[:, None] * codes, dtype=np.float64)))
        loss.bits = self.bits
        group = tensor.shape[-1] if self.step else delta.size
        cp: dict[str, int | str] = {"bits": CODE_BITS, "group": group}
        codec = Quantised(scales if self.step else scales[:1], codes.reshape(-1))
        return coding(replace(tensor, cp=cp), codec, target, base)

    def leave(self, tensor: TensorEntry, base: Span, target: Span, loss: Loss) -> bool:
        """True where a tensor is to stay as it was, which is counted; a change that is not finite is always carried."""
        if tensor.name not in self.left:
            return False
        a, b = (to_float32(span.read(0, span.length), tensor.dtype) for span in (base, target))
        energy = float(np.sum(np.square(b - a, dtype=np.float64)))
        if not np.isfinite(energy):
            return False
        loss.energy, loss.error, loss.bits = loss.energy + energy, loss.error + energy, self.bits
        return True

    def _codes(self, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int8 [rows, columns], and a float32 scale for each row."""
        if not self.step:
            mostly_zero = np.count_nonzero(delta) < (1 - ZEROS_PAY) * delta.size
            codes = np.sign(delta).astype(np.int8) if mostly_zero else np.where(delta < 0, np.int8(-1), np.int8(1))
            size = np.abs(delta).sum(dtype=np.float64) / max(np.count_nonzero(codes), 1)
            return codes, np.full(len(delta), size, np.float32)
        codes = dead_zone(delta, np.float32(self.step) * _rms(delta))
        energy = np.square(codes, dtype=np.float32).sum(axis=1)
        fitted = (delta * codes).sum(axis=1) / np.maximum(energy, 1)
        return codes, fitted.astype(np.float32)


def allowed_bits(bits: float) -> float:
    """Bits a weight that an update may take in all; raises ConfigError for bits other than 1 and 1.5..7."""
    if bits != SIGN_BITS and not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"quantize is {bits} bits a weight; it must be 1 or in {MIN_BITS}..{MAX_BITS}")
    return SIGN_ALLOWANCE if bits == SIGN_BITS else bits


def least_changed(changes: Iterable[tuple[TensorEntry, np.ndarray]], share: float, most: float) -> frozenset[str]:
    """Tensors that changed least, with this share of all elements or a little more; none where it were above `most`."""
    size, energy = {}, {}
    for tensor, change in changes:
        size[tensor.name] = prod(tensor.shape)
        energy[tensor.name] = size[tensor.name] * float(np.mean(np.square(change, dtype=np.float64)))
    total, found = sum(size.values()), set[str]()
    missing = share * total
    while missing > 0 and size.keys() - found:
        rest = sorted(size.keys() - found)
        enough = [name for name in rest if size[name] >= missing]
        name = min(enough, key=lambda n: energy[n]) if enough else min(rest, key=lambda n: energy[n] / size[n])
        found.add(name)
        missing -= size[name]
    return frozenset(found) if sum(size[name] for name in found) <= most * total else frozenset()


def quantisable(tensor: TensorEntry) -> bool:
    """Matrices and stacks of floats, from 4096 elements on."""
    return suits(tensor.dtype) and len(tensor.shape) > 1 and prod(tensor.shape) >= SMALL_ELEMENTS


def dead_zone(delta: np.ndarray, step: np.ndarray) -> np.ndarray:
    """int8 codes by an even quantiser with a wider zero.

    step   [rows, 1]; a row whose step is 0 has the code 0
    """
    size = np.abs(delta) / np.where(step > 0, step, np.inf)
    return np.copysign(np.minimum(np.floor(size + np.float32(1 - DEAD_ZONE)), 127), delta).astype(np.int8)


def _rms(change: np.ndarray) -> np.ndarray:
    """[rows, 1]"""
    return np.sqrt(np.mean(np.square(change), axis=1, keepdims=True, dtype=np.float32))


def _rate(samples: list[np.ndarray], step: float) -> float:
    """Mean bits a weight, scales included."""
    bits = count = 0.0
    for sample in samples:
        codes = dead_zone(sample, np.full((len(sample), 1), step, np.float32)).reshape(-1).astype(np.int16) + 128
        share = np.bincount(codes, minlength=256) / codes.size
        share = share[share > 0]
        bits += 32 * len(sample) - codes.size * float((share * np.log2(share)).sum())
        count += codes.size
    return bits / max(count, 1)
