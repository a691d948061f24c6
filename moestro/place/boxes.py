"""A lower bound by branch and bound over two numbers: how long the slowest link and the slowest device may take.

    Fixed, known -> boxed_bound -> seconds

Any placement better than `known` (one that we have) has its two times in one of the boxes, so the least bound of all
boxes bounds all placements. The smaller a box, the sharper the rows that `tighten` may add. The box with the least
bound is halved where the programme's own times leave most room, until time is up. Within a box the programme is solved
with nothing whole, then with hosts whole and, in narrow boxes, with devices whole; HiGHS's dual bound counts.
"""

import heapq
import time

import numpy as np

from moestro.place.programme import EXACT, FOUND, IMPOSSIBLE, Programme, build, solve_programme
from moestro.place.state import Fixed
from moestro.place.tighten import Box, tighten

CLOSE = 1e-4
"""Relative difference from what is known at which a box is done with."""
SLACK = 1e-6
"""By which boxes overlap, above HiGHS's tolerances."""
NARROW = 1.04
"""Ratio of a box's limits to the programme's times from which halving it gains little."""
PART = (1.0, 0.12, 0.4)
"""Most of the time for one programme of each level."""


def boxed_bound(fixed: Fixed, known_s: float, limit_s: float) -> float:
    """Seconds of links, devices, gradients and moves that no placement beats; 0 where time was too short for any."""
    unit = max(float(fixed.token_AE.sum() / (1.0 / fixed.device_cost_G).sum()), 1e-30)
    scaled = fixed._replace(
        link_cost_L=fixed.link_cost_L / unit,
        device_cost_G=fixed.device_cost_G / unit,
        sync_cost_L=fixed.sync_cost_L / unit,
        move_cost_L=fixed.move_cost_L / unit,
    )
    return unit * _Search(scaled, known_s / unit, limit_s).run()


class _Search:
    """Boxes still open, and the time left. Times are in units of the computation when spread evenly."""

    def __init__(self, fixed: Fixed, known: float, limit_s: float) -> None:
        self.ends, self.limit_s = time.perf_counter() + limit_s, limit_s
        self.fixed, self.known = fixed, known
        self.model: Programme = build(fixed)
        shares = fixed.token_AE.shape[0] * fixed.token_AE.shape[1] * len(fixed.slot_G)
        self.t_link = shares + fixed.token_AE.shape[1] * len(fixed.slot_G)
        self.open: list[tuple[float, int, Box, tuple[float, float], bool]] = []
        self.count = 0

    @property
    def left_s(self) -> float:
        """Until the limit."""
        return self.ends - time.perf_counter()

    def run(self) -> float:
        """The bound when time is up or no box can hold anything better than what is known."""
        least = self._solve(self.model, 0, np.inf)[0]
        if not np.isfinite(self.known):
            return least
        self._open(Box(0.0, self.known, 1.0 - SLACK, self.known), least, (self.known / 2, 1.0))
        while self.open and self.left_s > 0:
            bound, _, box, (link, device), halve = heapq.heappop(self.open)
            if not halve:
                return bound
            if box.link_high / max(link, SLACK) > box.device_high / device:
                middle = (link + box.link_high) / 2
                parts = (box._replace(link_high=middle), box._replace(link_low=middle * (1 - SLACK)))
            else:
                middle = (device + box.device_high) / 2
                parts = (box._replace(device_high=middle), box._replace(device_low=middle * (1 - SLACK)))
            for part in parts:
                self._open(part, bound, (link, device))
        return self.open[0][0] if self.open else self.known

    def _open(self, box: Box, bound: float, times: tuple[float, float]) -> None:
        """Bound a box; keep it if something better than what is known may lie in it."""
        box = box._replace(
            link_high=min(box.link_high, self.known - box.device_low),
            device_high=min(box.device_high, self.known - box.link_low),
        )
        if box.link_low > box.link_high or box.device_low > box.device_high:
            return
        halve = True
        for level in range(EXACT + 1):
            if self.left_s <= 0 or not halve:
                break
            narrow = max(box.link_high / max(times[0], SLACK), box.device_high / times[1]) < NARROW
            if level == EXACT and not narrow:
                break
            found, new_times = self._solve(tighten(self.fixed, self.model, box), level, PART[level] * self.limit_s)
            bound, times = max(bound, found), new_times or times
            if bound >= self.known * (1 - CLOSE):
                return
            halve = level < EXACT
        self.count += 1
        heapq.heappush(self.open, (bound, self.count, box, times, halve))

    def _solve(self, model: Programme, level: int, most_s: float) -> tuple[float, tuple[float, float] | None]:
        """Lower bound (infinite where nothing fits), and the times of links and devices in the best answer found."""
        found = solve_programme(model, level, min(self.left_s, most_s), CLOSE)
        if found.status == IMPOSSIBLE:
            return np.inf, None
        times = None if found.x is None else (float(found.x[self.t_link]), float(found.x[self.t_link + 1]))
        if level == 0:
            return (float(found.fun) if found.x is not None and found.status == FOUND else 0.0), times
        dual = found.mip_dual_bound
        return (float(dual) if dual is not None and np.isfinite(dual) else 0.0), times
