"""From numbers to places and labels on a chart: limits, ticks, texts. No torch, no drawing.

    Axis(label, unit) -> fitted(values) -> share(value) 0..1, ticks(), text(value)

Called by core/charts.py. Limits given by the caller are widened where data lies beyond them, so nothing is cut off.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moestro.core.units import count_text

LOG_TICKS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))
"""Ticks of a decade, from few to many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One direction of a chart."""

    label: str = ""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    """What the axis shows at least; None takes it from the data."""
    log: bool = False
    whole: bool = False
    """Ticks at whole numbers only."""

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label} ({self.unit})" if self.label and self.unit else self.label or self.unit

    def fitted(self, values: ArrayLike, room: float = 0.0) -> "Axis":
        """The axis with both limits set.

        values  what it has to show; not-finite ones are ignored, on a log axis also those not above 0
        room    free space beyond the data where no limit was given, as a share of its range
        """
        value_N = np.asarray(values, dtype=float).ravel()
        usable_N = value_N[np.isfinite(value_N) & ((value_N > 0) | (not self.log))]
        given = [limit for limit in (self.low, self.high) if limit is not None]
        shown_N = np.concatenate([usable_N, given]) if given or len(usable_N) else np.array([1.0 if self.log else 0.0])
        low, high = self._spaced(float(shown_N.min()), float(shown_N.max()), room)
        return replace(self, low=low, high=high)

    def _spaced(self, low: float, high: float, room: float) -> tuple[float, float]:
        """Room where no limit holds, and never an axis of no length."""
        same = high - low <= 1e-9 * abs(high)
        if self.log:
            factor = 1.1 if same else (high / low) ** room
            return low if low == self.low else low / factor, high if high == self.high else high * factor
        space = (abs(high) / 2 or 0.5) if same else (high - low) * room
        bottom = low if low == self.low else low - space
        return 0.0 if low >= 0 > bottom else bottom, high if high == self.high and not same else high + space

    @property
    def limits(self) -> tuple[float, float]:
        """Low and high of a fitted axis."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def share(self, values: ArrayLike) -> NDArray[np.float64]:
        """Where values lie: 0 at the low end, 1 at the high end; NaN stays NaN."""
        low, high = self.limits
        value_N = np.asarray(values, dtype=float)
        if self.log:
            value_N = np.log(np.where(value_N > 0, value_N, np.nan))
            low, high = math.log(low), math.log(high)
        return np.asarray((value_N - low) / (high - low))

    def ticks(self, at_most: int = 6) -> list[float]:
        """Round numbers inside the limits, at least one wherever possible."""
        low, high = self.limits
        if self.log:
            found = [_log_ticks(low, high, digits) for digits in LOG_TICKS]
            fitting = [ticks for ticks in found if 2 <= len(ticks) <= at_most]
            if fitting:
                return fitting[-1]
        step = round_step((high - low) / at_most)
        if self.whole:
            step = max(step, 1.0)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def text(self, value: float, at_most: int = 6) -> str:
        """A tick's label, with as many digits as its neighbours need."""
        if self.log:
            power = 10.0 ** _power(value)
            whole = math.isclose(value / power, round(value / power))
            return number_text(value, power if whole else power / 10).replace(".00 ", " ").replace(".0 ", " ")
        ticks = self.ticks(at_most)
        gaps = np.diff(ticks)
        return number_text(value, float(gaps.min()) if len(gaps) else abs(value))

    @property
    def digits(self) -> int:
        """Decimals that tell apart a thousandth of the axis."""
        low, high = self.limits
        return 0 if self.whole else max(0, min(8, math.ceil(-math.log10((high - low) / 1000))))


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `least`; 0.3 -> 0.5."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def _log_ticks(low: float, high: float, digits: tuple[float, ...]) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit * 10.0**decade:.6g}") for decade in decades for digit in digits]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def number_text(value: float, resolution: float = 0.0) -> str:
    """A number for reading, with as many decimals as `resolution` has; 0 gives three significant digits.

    12345 -> '12,345'; 0.00005 -> '5e-5'; 2500000 -> '2.50 M'
    """
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e6:
        return count_text(value)
    size = abs(resolution) or abs(value) / 100
    if value == 0:
        return "0"
    if size < 0.999e-4:
        mantissa, _, exponent = f"{value:.{max(0, _power(value) - _power(size))}e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.{max(0, -_power(size))}f}"


def _power(value: float) -> int:
    """The power of ten of the first digit; 0.02 -> -2."""
    return math.floor(math.log10(abs(value)) + 1e-9)
