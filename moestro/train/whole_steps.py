"""Whole steps beside the cost model, which knows exchange, experts and replicas' gradients alone.

    seconds of steps under one placement, and what the model makes of it -> Beside -> predicted_s of any placement

What no placement changes (dense compute, reduction of dense gradients, the update) is whatever measured steps take
beyond the modelled part. All ranks know the same seconds (`dist.timeline`), so what follows is the same on all.

Dimension key:  W ranks
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from moestro.dist.timeline import Spent

ARRIVING = 1
"""Steps after new placements that do not count: experts arrive."""
CHANGED = 1.4
"""Times longer or shorter than expected from which steps count as changed."""
KEPT = 100
"""Most steps that are remembered."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What separates the model of a step from whole steps."""

    rest_s: float
    """That no placement changes."""
    scale: float
    """Of what the model says; below 1 where whole steps are shorter than that."""

    def predicted_s(self, modelled_s: float) -> float:
        """A whole step under a placement that the model gives so many seconds."""
        return self.scale * modelled_s + self.rest_s


def beside(measured_s: float, modelled_s: float) -> Beside:
    """From one placement, measured and modelled."""
    return Beside(max(measured_s - modelled_s, 0.0), min(measured_s / modelled_s, 1.0) if modelled_s else 1.0)


class WholeSteps:
    """Seconds of the steps since placements were last new."""

    def __init__(self) -> None:
        self.second_s: dict[int, float] = {}
        """By step, rising."""
        self.expected_s = 0.0
        """What was predicted for these steps; 0 where nothing was."""
        self._since = ARRIVING

    def learn(self, spent: Sequence[Spent]) -> None:
        """Take in steps, in order."""
        self.second_s |= {one.step: float(one.second_WP.sum(1).max()) for one in spent}
        for step in list(self.second_s)[:-KEPT]:
            del self.second_s[step]

    def begin(self, step: int, expected_s: float) -> None:
        """Steps after `step` run under new placements, for which so many seconds are predicted."""
        self.second_s = {one: seconds for one, seconds in self.second_s.items() if one > step + ARRIVING}
        self._since, self.expected_s = step + ARRIVING, expected_s

    def measured_s(self, last: int = KEPT) -> float:
        """The median of at most so many last steps; 0 where none is known."""
        seconds = [seconds for step, seconds in self.second_s.items() if step > self._since][-last:]
        return median(seconds) if seconds else 0.0

    def as_expected(self, last: int) -> bool:
        """Whether the last steps are known and took about as long as was predicted."""
        measured_s = self.measured_s(last)
        return bool(measured_s and self.expected_s) and 1 / CHANGED < measured_s / self.expected_s < CHANGED
