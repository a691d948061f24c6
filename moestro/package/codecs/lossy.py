"""Quantised updates: one step for all tensors of a model, chosen so that codes have a wanted entropy (R-8.2.6-3).

    lossy = Lossy.for_rate(bits, pairs)        lossy.coding(tensor, base, target, loss) -> Coding or None

With entropy coding an even quantiser is within 1.53 dB of the rate-distortion bound at high rates (Gish and Pierce
1968), and one step for everything makes the total error least for the total rate. Around zero the threshold is moved
outwards (a dead zone), since zeros are what the coder gets almost for nothing, and each row's scale is then fitted to
its codes by least squares.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moestro.core.errors import ConfigError
from moestro.package.codecs.choose import Coding, coding
from moestro.package.codecs.differences import suits
from moestro.package.codecs.numbers import to_float32
from moestro.package.codecs.quantised import Quantised, dead_zone
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
        return {"scheme": "qres", "bits": self.bits, "granularity": "row", "lost_energy": round(self.relative, 6)}


SAMPLE_ELEMENTS = 1 << 16
MIN_BITS, MAX_BITS = 0.05, 7.0
CODE_BITS = 8
"""Width of codes in the file; what a code costs is its entropy."""


@dataclass(frozen=True, slots=True)
class Lossy:
    """An even quantiser; its step is `step` times the root mean square of a tensor's change."""

    bits: float
    """Wanted mean bits a weight, over the tensors that are quantised."""
    step: float

    @classmethod
    def for_rate(cls, bits: float, changes: Iterable[np.ndarray]) -> "Lossy":
        """Find the step.

        changes   sampled differences of each tensor
        raises    ConfigError for bits outside 0.05..7
        """
        if not MIN_BITS <= bits <= MAX_BITS:
            raise ConfigError(
                f"quantize is {bits} bits a weight; it must be in {MIN_BITS}..{MAX_BITS}, for example 2.5"
            )
        samples = [change / rms for change in changes if (rms := _rms(change)) > 0]
        low, high = 2.0**-6, 2.0**6
        for _ in range(24):
            step = (low * high) ** 0.5
            low, high = (step, high) if _entropy(samples, step) > bits else (low, step)
        return cls(bits, high)

    def coding(self, tensor: TensorEntry, base: Span, target: Span, loss: Loss) -> Coding | None:
        """The quantised form; None where the tensor must stay exact: integers, and numbers that are not finite."""
        if not suits(tensor.dtype) or not tensor.num_bytes:
            return None
        a, b = (to_float32(span.read(0, span.length), tensor.dtype) for span in (base, target))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return None
        delta = b - a
        scale = np.float32(self.step * _rms(delta))
        if not scale:
            return None
        codes = dead_zone(delta, scale)
        energy = float(codes.astype(np.float64) @ codes)
        fitted = np.float32(float(delta.astype(np.float64) @ codes) / energy) if energy else scale
        loss.energy += float(np.sum(np.square(delta, dtype=np.float64)))
        loss.error += float(np.sum(np.square(delta - fitted * codes, dtype=np.float64)))
        loss.bits = self.bits
        cp: dict[str, int | str] = {"bits": CODE_BITS, "group": len(delta)}
        codec = Quantised(np.array([fitted]), scale)
        return coding(replace(tensor, cp=cp), codec, target, base)


def _rms(change: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(change, dtype=np.float64)))) if change.size else 0.0


def _entropy(samples: list[np.ndarray], step: float) -> float:
    """Mean bits a weight."""
    bits = count = 0.0
    for sample in samples:
        codes = dead_zone(sample, np.float32(step)).astype(np.int16) + 128
        share = np.bincount(codes, minlength=256) / codes.size
        share = share[share > 0]
        bits -= codes.size * float((share * np.log2(share)).sum())
        count += codes.size
    return bits / max(count, 1)
