"""Whole steps beside the cost model, which knows exchange, experts and replicas' gradients alone.

    seconds of steps under one placement, and what the model makes of it -> Beside -> predicted_s of any placement

What no placement changes (dense compute, reduction of dense gradients, the update) is the ranks' own work and reduction
in measured steps (`dist.timeline`) less the part of them that the model knows; what else a step takes is the model's,
and how much longer that is than it says counts for other placements too. All ranks know the same seconds, so what
follows is the same on all.

Dimension key:  W ranks
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from moestro.dist.timeline import Spent
from moestro.place.cost import StepTime

ARRIVING = 1
"""Steps after new placements that do not count: experts arrive."""
CHANGED = 1.4
"""Times longer or shorter than expected from which steps count as changed."""
KEPT = 100
"""Most steps that are remembered."""
CROWDED = 1.5
"""Most times that exchanges take longer than the model says: many flows over one bottleneck take up to 1.35 times."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One step, or the median of some."""

    step_s: float
    own_s: float
    """The slowest rank's own work, and reductions, waiting left out."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What separates the model of a step from whole steps."""

    rest_s: float
    """That no placement changes."""
    scale: float
    """Of what the model says."""

    def predicted_s(self, modelled_s: float) -> float:
        """A whole step under a placement that the model gives so many seconds."""
        return self.scale * modelled_s + self.rest_s


def beside(measured: Measured, modelled: Sequence[StepTime]) -> Beside:
    """From steps under one placement; the model's share of them is told of every layer."""
    modelled_s = sum(one.total_s for one in modelled)
    dense_s = max(measured.own_s - sum(one.compute_s + one.sync_s for one in modelled), 0.0)
    scale = min((measured.step_s - dense_s) / modelled_s, CROWDED) if modelled_s else 1.0
    return Beside(measured.step_s - scale * modelled_s, scale)


class WholeSteps:
    """Seconds of the steps since placements were last new."""

    def __init__(self) -> None:
        self.steps: dict[int, Measured] = {}
        """Rising."""
        self.expected_s = 0.0
        """What was predicted for these steps; 0 where nothing was."""
        self._since = ARRIVING

    def learn(self, spent: Sequence[Spent]) -> None:
        """Take in steps, in order."""
        for one in spent:
            own_s = max(one.of("compute")) + max(one.of("reduction"))
            self.steps[one.step] = Measured(float(one.second_WP.sum(1).max()), own_s)
        for step in list(self.steps)[:-KEPT]:
            del self.steps[step]

    def begin(self, step: int, expected_s: float) -> None:
        """Steps after `step` run under new placements, for which so many seconds are predicted."""
        self._since, self.expected_s = step + ARRIVING, expected_s

    def measured(self, last: int = KEPT) -> Measured | None:
        """The median of at most so many last steps; None where no step is known."""
        known = [one for step, one in self.steps.items() if step > self._since][-last:]
        return Measured(median(one.step_s for one in known), median(one.own_s for one in known)) if known else None

    def as_expected(self, last: int) -> bool:
        """Whether the last steps are known and took about as long as was predicted."""
        measured = self.measured(last)
        if measured is None or not self.expected_s:
            return False
        return 1 / CHANGED < measured.step_s / self.expected_s < CHANGED
