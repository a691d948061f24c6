"""A run's event log as arrays: what the report draws.

    events.jsonl -> read_history -> History

A field that a run does not log (experts of a dense model, thresholds of a fixed rule) is an empty array.

Dimension key:  N logged steps   L sparse layers
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moestro.core.events import Event, read_events
from moestro.train.run_folder import RunFolder

Numbers = NDArray[np.float64]
BEGINNINGS = ("started", "resume")


@dataclass(frozen=True, slots=True)
class History:
    """Everything that counts of what a run logged, in order."""

    events: list[Event]

    def of_kind(self, *kinds: str) -> list[Event]:
        """Events of these kinds."""
        return [event for event in self.events if event["event"] in kinds]

    def steps(self, kind: str = "step") -> Numbers:
        """When events of a kind happened."""
        return np.array([event["step"] for event in self.of_kind(kind)], dtype=float)

    def column(self, name: str, kind: str = "step") -> Numbers:
        """value_N or value_NL of a logged field; empty unless every event of the kind has it."""
        values: list[Any] = [event.get(name) for event in self.of_kind(kind)]
        if any(value is None for value in values) or len({np.shape(value) for value in values}) > 1:
            return np.empty(0)
        return np.array(values, dtype=float)

    @property
    def last_step(self) -> int:
        """The newest step that was logged in any way; 0 before the first."""
        return max((event["step"] for event in self.events), default=0)

    @property
    def finished(self) -> Event | None:
        """The event after the last step, where the run got there."""
        return next(iter(self.of_kind("finished")), None)

    @property
    def beginning(self) -> Event:
        """What the newest session said about itself; empty where nothing has begun."""
        return next(reversed(self.of_kind(*BEGINNINGS)), {})

    @property
    def evaluation(self) -> Event | None:
        """The newest evaluation."""
        return next(reversed(self.of_kind("evaluation")), None)

    @property
    def seconds(self) -> float:
        """Wall-clock of all sessions, from each one's beginning to the last of its events that counts."""
        return sum(session[-1]["time_s"] - session[0]["time_s"] for session in _sessions(self.events))

    @property
    def phase_s(self) -> dict[str, Numbers]:
        """Seconds of every logged step by what they went to: data, forward, backward, update."""
        columns = {name: self.column(f"{name}_s") for name in ("data", "forward", "backward", "update")}
        return columns if all(len(column) for column in columns.values()) else {}


def _sessions(events: Iterable[Event]) -> list[list[Event]]:
    sessions: list[list[Event]] = []
    for event in events:
        if event["event"] in BEGINNINGS or not sessions:
            sessions.append([])
        sessions[-1].append(event)
    return sessions


def read_history(folder: RunFolder) -> History:
    """The log of a run; empty where nothing was logged yet."""
    return History(read_events(folder.events))


def bin_means(step_N: Numbers, value_NX: NDArray[Any], last_step: int, most: int) -> tuple[Numbers, Numbers]:
    """Average values over at most `most` equal stretches of the steps 1..last_step.

    returns  end_B, the last step of each stretch, and value_BX; a stretch without a step is NaN
    """
    bins = min(most, last_step)
    end_B = np.linspace(0, last_step, bins + 1)[1:]
    bin_N = np.searchsorted(np.floor(end_B + 1e-9), step_N)
    sum_BX = np.zeros((bins, *value_NX.shape[1:]))
    np.add.at(sum_BX, bin_N, value_NX)
    count_B = np.bincount(bin_N, minlength=bins).astype(float)
    count_B[count_B == 0] = np.nan
    return end_B, sum_BX / count_B.reshape(-1, *[1] * (value_NX.ndim - 1))


def smoothed(value_N: Numbers, window: int) -> Numbers:
    """Moving mean over `window` steps around each, fewer at the ends; NaN is left out.

    At the beginning, where curves fall fast, as many steps before as after, so that the mean does not run ahead.
    """
    known_N, place_N, half = np.isfinite(value_N), np.arange(len(value_N)), window // 2
    sums_N, counts_N = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known_N, value_N, 0), known_N))
    start_N = np.maximum(place_N - half, 0)
    stop_N = np.minimum(place_N + np.minimum(half, place_N) + 1, len(value_N))
    with np.errstate(invalid="ignore"):
        return np.asarray((sums_N[stop_N] - sums_N[start_N]) / (counts_N[stop_N] - counts_N[start_N]))
