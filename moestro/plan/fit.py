"""Fit the constants and the effects of software and devices to measured rows; leave groups out to see what it is worth.

    rows, PRIORS -> fit -> Fit(constants, effects)          rows -> left_out -> predictions of rows nobody fitted on

Bayes with everything Gaussian in logarithms, solved by Gauss-Newton:

    log measured_r = log predicted_r(theta) + effects of r + group of r + noise_r
    theta_p ~ N(log prior mean, spread)     effect_e ~ N(0, its kind's spread)

The group term (a report's own habits, unknown beforehand) and the noise have standard deviations by kind of model.
They make a group of 47 rows count little more than one of 5, and give the p10-p90 band. A row's noise is t-distributed
(weights by iteration), so that a broken measurement does not bend the rest.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moestro.plan.case import Case
from moestro.plan.columns import Array
from moestro.plan.constants import NAMES, Constants, from_logs, prior_means, prior_spreads
from moestro.plan.profile import (
    EFFECT_SPREADS,
    GROUP_SPREAD,
    NOISE_SPREAD,
    TENTH,
    Profile,
    effect_and_spread,
    effect_names,
    part_shares,
    predict,
)
from moestro.plan.published import Row, together
from moestro.plan.step import step_time

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What is known before fitting, where it is not PRIORS."""

    center_P: Array
    """Logarithms."""
    spread_P: Array
    effect_spread: float
    """Of every effect."""
    noise: float
    """Of every row; rows of a group share nothing else."""


def _names(row: Row) -> list[str]:
    return effect_names(row.software, row.kind)


def fit(rows: Sequence[Row], start: Fit | None = None, known: Known | None = None) -> Fit:
    """The most probable constants and effects.

    start  where to begin, for speed: the fit of nearly the same rows
    """
    names = tuple(sorted({name for row in rows for name in _names(row)}))
    num = len(NAMES)
    center_P, spread_P = (prior_means(), prior_spreads()) if known is None else (known.center_P, known.spread_P)
    spread_E = [EFFECT_SPREADS[name.split()[0]] if known is None else known.effect_spread for name in names]
    center, spread = np.concatenate([center_P, np.zeros(len(names))]), np.concatenate([spread_P, spread_E])
    theta = center.copy()
    if start is not None:
        learned = dict(zip(start.names_E, start.effect_E, strict=True))
        theta = np.concatenate([start.log_P, [learned.get(name, 0.0) for name in names]])
    incidence = np.array([[float(name in _names(row)) for name in names] for row in rows])
    case, measured = together(rows), np.log([row.step_s for row in rows])
    weights = np.ones(len(rows))
    precision = np.eye(len(theta))
    for _ in range(ITERATIONS):
        predicted, slopes = jacobian(case, theta[:num])
        residual = measured - predicted - incidence @ theta[num:]
        design = np.concatenate([slopes, incidence], axis=1)
        inverse = _inverse_covariance(rows, weights) if known is None else np.diag(weights / known.noise**2)
        precision = design.T @ inverse @ design + np.diag(spread**-2)
        step = np.linalg.solve(precision, design.T @ inverse @ residual + (center - theta) / spread**2)
        theta = theta + np.clip(step, -0.5, 0.5)
        weights = _t_weights(rows, residual - design @ step)
        if np.abs(step).max() < CONVERGED:
            break
    return Fit(
        log_P=theta[:num],
        effect_E=theta[num:],
        covariance=np.asarray(np.linalg.inv(precision), dtype=np.float64),
        names_E=names,
    )


def jacobian(case: Case, log_P: Array) -> tuple[Array, Array]:
    """(log seconds of every row, its slopes [rows, constants]) by differences, in one evaluation."""
    settings = np.repeat(log_P[:, None, None], len(log_P) + 1, axis=1)
    settings[np.arange(len(log_P)), 1 + np.arange(len(log_P)), 0] += DIFFERENCE
    seconds = np.asarray(np.log(step_time(case, from_logs(settings)).total_s))
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


def profile_of(found: Fit, name: str, widen: dict[str, float] | None = None, source: str = "") -> Profile:
    """The fit as a profile."""
    effects = {name: float(value) for name, value in zip(found.names_E, found.effect_E, strict=True)}
    fitted = datetime.date.today().isoformat()
    constants = Constants(**{name: float(value) for name, value in zip(NAMES, np.exp(found.log_P), strict=True)})
    return Profile(name=name, constants=constants, effects=effects, widen=widen or {}, source=source, fitted=fitted)


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Predictions of rows by fits that saw no row of their group."""

    step_s: dict[str, float]
    spread: dict[str, float]
    """Standard deviation of the logarithm, before widening."""
    shares: dict[str, Array]
    """Of the parts of a step, see `profile.part_shares`."""


def left_out(rows: Sequence[Row], whole: Fit) -> LeftOut:
    """Predict every group by a fit to all others."""
    found = LeftOut(step_s={}, spread={}, shares={})
    for group in sorted({row.group for row in rows}):
        kept = [row for row in rows if row.group != group]
        asked = [row for row in rows if row.group == group]
        profile = profile_of(fit(kept, whole), "without " + group)
        predicted = predict(asked, profile)
        share_RP = part_shares(step_time(together(asked), profile.constants), len(asked))
        for place, row in enumerate(asked):
            found.step_s[row.id] = float(predicted.step_s[place])
            found.shares[row.id] = share_RP[place]
            found.spread[row.id] = effect_and_spread(profile, row.software, row.kind)[1]
    return found


def widening(rows: Sequence[Row], found: LeftOut, share: float = 0.8) -> dict[str, float]:
    """By kind: the factor on spreads with which p10-p90 covers `share` of left-out rows, groups weighing the same."""
    widen = {}
    for kind in GROUP_SPREAD:
        of = [row for row in rows if row.kind == kind]
        sizes = {row.group: sum(other.group == row.group for other in of) for row in of}
        z = np.array([abs(np.log(found.step_s[row.id] / row.step_s)) / found.spread[row.id] for row in of])
        order = np.argsort(z, kind="stable")
        weight = np.cumsum(np.array([1 / sizes[row.group] for row in of])[order]) / len(sizes)
        widen[kind] = float(z[order][min(int(np.searchsorted(weight, share)), len(of) - 1)] / TENTH)
    return widen
