"""From a step to a run: failures, checkpoints, hours, energy and price; in closed form and by simulation.

    failures per device-day, checkpoint cost, restart time -> best interval, goodput -> hours, MWh, price of a budget

Exact model of a memoryless machine (Daly 2006, eq. 20): work in pieces of tau seconds, each followed by a checkpoint of
delta seconds, failures with mean time M between them, R seconds until work goes on:

    wall per piece = M e^(R / M) (e^((tau + delta) / M) - 1)          goodput = tau / wall

Young's sqrt(2 delta M) is where the search for the best tau starts. `simulate` draws failures, many runs at once; its
mean agrees with the formula, its spread says what one run may get.
"""

from dataclasses import dataclass

import numpy as np

from moestro.core.config import STRICT
from moestro.core.errors import PlanError
from moestro.plan.columns import Array, Number

DAY_S = 86400.0
HOUR_S = 3600.0
LLAMA3_FAILURES = 419 / (54 * 16384)
"""Unexpected interruptions per device-day on H100: 419 in 54 days on 16,384 devices (2407.21783, section 3.3.4)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability:
    """How often a device fails and what that costs."""

    __pydantic_config__ = STRICT
    failures_per_device_day: float = LLAMA3_FAILURES
    checkpoint_s: float = 5.0
    """Time that training stands still for one checkpoint; small where it is written in the background."""
    restart_s: float = 600.0
    """From a failure until work goes on: notice, replace, start, load."""
    planned_share: float = 0.0
    """Of wall time spent on maintenance that is planned."""

    def __post_init__(self) -> None:
        for name in ("failures_per_device_day", "checkpoint_s", "restart_s"):
            if not getattr(self, name) > 0:
                raise PlanError(f"reliability.{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.planned_share < 1:
            raise PlanError(f"reliability.planned_share is {self.planned_share}; it must be in 0..1, 1 excluded")

    def mean_between_failures_s(self, devices: Number) -> Number:
        """Of a job on so many devices, each of which stops the job."""
        return DAY_S / (self.failures_per_device_day * devices)


def wall_s(work_s: Number, between_s: Number, reliability: Reliability) -> Number:
    """Mean wall seconds of one piece of work and its checkpoint (Daly's exact form)."""
    again = np.exp(np.minimum(reliability.restart_s / between_s, 700.0))
    piece = np.expm1(np.minimum((work_s + reliability.checkpoint_s) / between_s, 700.0))
    return between_s * again * piece


def best_interval_s(between_s: float, reliability: Reliability) -> float:
    """Work between checkpoints that loses least, by golden section around Young's first-order value."""
    young = (2 * reliability.checkpoint_s * between_s) ** 0.5
    low, high = np.log(young / 30), np.log(young * 30)
    ratio = (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        lost = [wall_s(np.exp(log), between_s, reliability) / np.exp(log) for log in (left, right)]
        low, high = (low, right) if lost[0] < lost[1] else (left, high)
    return float(np.exp((low + high) / 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """What remains of wall time."""

    mean_between_failures_s: float
    interval_s: float
    share: float
    """Of wall time that becomes training that is kept."""


def goodput(devices: int, reliability: Reliability) -> Goodput:
    """Best interval and goodput of a job on so many devices."""
    between = float(reliability.mean_between_failures_s(devices))
    interval = best_interval_s(between, reliability)
    share = interval / float(wall_s(interval, between, reliability)) * (1 - reliability.planned_share)
    return Goodput(mean_between_failures_s=between, interval_s=interval, share=share)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCost:
    """A whole run."""

    steps: float
    hours: float
    energy_mwh: float
    price_usd: float


def run_cost(
    *,
    tokens: float,
    tokens_per_step: float,
    step_s: float,
    share: float,
    devices: int,
    power_w: float,
    usd_per_hour: float,
) -> RunCost:
    """Hours, energy and price of a token budget at a goodput."""
    steps = tokens / tokens_per_step
    hours = steps * step_s / share / HOUR_S
    return RunCost(
        steps=steps,
        hours=hours,
        energy_mwh=hours * devices * power_w / 1e6,
        price_usd=hours * devices * usd_per_hour,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """Many runs with random failures."""

    wall_hours_R: Array
    failures_R: Array
    lost_hours_R: Array
    """Work done again, waiting for restarts."""

    def percentile(self, share: float) -> float:
        """Wall hours that this share of runs stays below."""
        return float(np.quantile(self.wall_hours_R, share))


def simulate(
    work_s: float, devices: int, reliability: Reliability, *, runs: int = 1000, seed: int = 0, step_spread: float = 0.0
) -> Simulated:
    """Follow `runs` runs of `work_s` useful seconds, checkpoint by checkpoint.

    step_spread  standard deviation of the logarithm of step time between runs (what the prediction does not know)

    For one piece of a + b seconds the number of failures before it succeeds is geometric with chance e^-(a+b)/M, every
    failed try lasts a truncated exponential time, and restarts may fail too: sums over all pieces of a run are drawn as
    one negative binomial and normal sums, so that 10,240 devices and months of work take milliseconds.
    """
    draw = np.random.default_rng(seed)
    between = float(reliability.mean_between_failures_s(devices))
    interval = best_interval_s(between, reliability)
    work_R = work_s * np.exp(draw.normal(0.0, step_spread, runs)) if step_spread else np.full(runs, work_s)
    pieces_R = np.maximum(np.ceil(work_R / interval), 1.0)
    whole_s = interval + reliability.checkpoint_s
    failed_R, lost_s_R = _failures(draw, pieces_R, whole_s, between)
    again_R, waited_s_R = _failures(draw, failed_R, reliability.restart_s, between)
    restart_R = failed_R * reliability.restart_s + waited_s_R
    lost_R = lost_s_R + restart_R
    wall_R = work_R + pieces_R * reliability.checkpoint_s + lost_R
    planned = 1 - reliability.planned_share
    return Simulated(
        wall_hours_R=wall_R / planned / HOUR_S, failures_R=failed_R + again_R, lost_hours_R=lost_R / HOUR_S
    )


def _failures(draw: np.random.Generator, tries_R: Array, needed_s: float, between_s: float) -> tuple[Array, Array]:
    """(failed tries, seconds they lasted) before `tries_R` spans of `needed_s` seconds without a failure."""
    chance = np.exp(-needed_s / between_s)
    there = np.maximum(tries_R, 1)
    failed_R = np.where(tries_R > 0, draw.negative_binomial(there, chance), 0).astype(np.float64)
    x = needed_s / between_s
    mean = between_s * (1 - x / np.expm1(x))
    variance = between_s**2 * (1 - x * x * np.exp(x) / np.expm1(x) ** 2)
    few = failed_R < EXACT_SUMS
    sums = np.maximum(mean * failed_R + draw.normal(size=len(failed_R)) * np.sqrt(variance * failed_R), 0.0)
    for place in np.flatnonzero(few & (failed_R > 0)):
        uniform = draw.random(int(failed_R[place]))
        sums[place] = float((-between_s * np.log1p(-uniform * (1 - chance))).sum())
    return failed_R, sums


EXACT_SUMS = 200
"""Failures of a run up to which every one is drawn; more are a normal sum."""
