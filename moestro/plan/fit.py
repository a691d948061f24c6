"""Fit the constants and the effects of software and devices to measured rows; leave groups out to see what it is worth.

    rows, PRIORS -> fit -> Fit(constants, effects)          rows -> left_out -> predictions of rows nobody fitted on

Bayes with everything Gaussian in logarithms, solved by Gauss-Newton:

    log measured_r = log predicted_r(theta) + effects of r + group of r + noise_r
    theta_p ~ N(log prior mean, spread)     effect_e ~ N(0, its kind's spread)

The group term (a report's own habits, unknown beforehand) and the noise have standard deviations by kind of model.
They make a group of 47 rows count little more than one of 5, and give the p10-p90 band. A row's noise is t-distributed
(weights by iteration), so that a broken measurement does not bend the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moestro.plan.columns import Array
from moestro.plan.constants import NAMES, from_logs, prior_means, prior_spreads
from moestro.plan.published import Row, together
from moestro.plan.step import step_time

EFFECT_SPREADS = {"software": 0.08, "device": 0.04, "pair": 0.05, "kind": 0.06}
"""Standard deviations of effects: of a software, of a device, of a software on a device, of a software's sparse models."""
GROUP_SPREAD = {"dense": 0.05, "moe": 0.12}
NOISE_SPREAD = {"dense": 0.03, "moe": 0.06}
FREEDOM = 4.0
"""Degrees of freedom of the noise."""
DIFFERENCE = 1e-4
ITERATIONS = 8
CONVERGED = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What was learned."""

    log_P: Array
    """Logarithms of the constants, in the order of NAMES."""
    effect_E: Array
    covariance: Array
    """Of constants and effects together."""
    names_E: tuple[str, ...]


def effect_names(row: Row) -> list[str]:
    """Effects that act on a row."""
    kinds = [f"software {row.software}", f"device {row.device}", f"pair {row.software} {row.device}"]
    return [*kinds, f"kind {row.software} {row.kind}"]


def fit(rows: Sequence[Row], start: Fit | None = None) -> Fit:
    """The most probable constants and effects."""
    names = tuple(sorted({name for row in rows for name in effect_names(row)}))
    num = len(NAMES)
    theta = np.concatenate([prior_means() if start is None else start.log_P, np.zeros(len(names))])
    if start is not None:
        known = dict(zip(start.names_E, start.effect_E, strict=True))
        theta[num:] = [known.get(name, 0.0) for name in names]
    center = np.concatenate([prior_means(), np.zeros(len(names))])
    spread = np.concatenate([prior_spreads(), [EFFECT_SPREADS[name.split()[0]] for name in names]])
    incidence = np.array([[float(name in effect_names(row)) for name in names] for row in rows])
    case, measured = together(rows), np.log([row.step_s for row in rows])
    weights = np.ones(len(rows))
    precision = np.eye(len(theta))
    for _ in range(ITERATIONS):
        predicted, slopes = jacobian(case, theta[:num])
        residual = measured - predicted - incidence @ theta[num:]
        design = np.concatenate([slopes, incidence], axis=1)
        inverse = _inverse_covariance(rows, weights)
        precision = design.T @ inverse @ design + np.diag(spread**-2)
        step = np.linalg.solve(precision, design.T @ inverse @ residual + (center - theta) / spread**2)
        theta = theta + np.clip(step, -0.5, 0.5)
        weights = _t_weights(rows, residual - design @ step)
        if np.abs(step).max() < CONVERGED:
            break
    return Fit(
        log_P=theta[:num], effect_E=theta[num:], covariance=np.linalg.inv(precision), names_E=names
    )


def jacobian(case, log_P: Array) -> tuple[Array, Array]:
    """(log seconds of every row, its slopes [rows, constants]) by differences, in one evaluation."""
    settings = np.repeat(log_P[:, None, None], len(log_P) + 1, axis=1)
    settings[np.arange(len(log_P)), 1 + np.arange(len(log_P)), 0] += DIFFERENCE
    seconds = np.log(step_time(case, from_logs(settings)).total_s)
    return seconds[0], ((seconds[1:] - seconds[0]) / DIFFERENCE).T


def _inverse_covariance(rows: Sequence[Row], weights: Array) -> Array:
    """Of group term and noise."""
    inverse = np.zeros((len(rows), len(rows)))
    for group in sorted({row.group for row in rows}):
        of = [place for place, row in enumerate(rows) if row.group == group]
        noise = np.diag([NOISE_SPREAD[rows[place].kind] ** 2 / weights[place] for place in of])
        inverse[np.ix_(of, of)] = np.linalg.inv(noise + GROUP_SPREAD[rows[of[0]].kind] ** 2)
    return inverse


def _t_weights(rows: Sequence[Row], residual: Array) -> Array:
    """Weights of a t-distribution on what is left beside the group's median."""
    weights = np.ones(len(rows))
    for group in {row.group for row in rows}:
        of = [place for place, row in enumerate(rows) if row.group == group]
        left = (residual[of] - np.median(residual[of])) / [NOISE_SPREAD[rows[place].kind] for place in of]
        weights[of] = (FREEDOM + 1) / (FREEDOM + left**2)
    return weights


def predict(rows: Sequence[Row], found: Fit) -> Array:
    """Logarithms of the seconds, effects included; unknown effects are 0."""
    known = dict(zip(found.names_E, found.effect_E, strict=True))
    effects = np.array([sum(known.get(name, 0.0) for name in effect_names(row)) for row in rows])
    case = replace(together(rows), effect=effects)
    return np.log(step_time(case, from_logs(found.log_P)).total_s)


def left_out(rows: Sequence[Row], whole: Fit) -> dict[str, float]:
    """Seconds of every row, by a fit that saw no row of its group."""
    seconds: dict[str, float] = {}
    for group in sorted({row.group for row in rows}):
        kept = [row for row in rows if row.group != group]
        asked = [row for row in rows if row.group == group]
        found = fit(kept, whole)
        seconds |= {row.id: float(s) for row, s in zip(asked, np.exp(predict(asked, found)), strict=True)}
    return seconds
