"""What measurements taught: constants, effects of software and devices, and how wide a prediction's band must be.

    profiles/published.json -> load -> Profile -> predict(rows) -> Prediction(step_s, p10_s, p90_s, memory, fits)

A profile is data with a date; `moestro plan calibrate` writes one for a machine of one's own on top of this one. A
band's spread is what the report, the software and the device may do that the profile does not know:

    sd^2 = widen_kind^2 x (group^2 + noise^2 + sum over unknown effects of their spread^2)

`widen` is set so that p10-p90 covers 80 % of rows in groups that were left out (group-balanced), by kind of model.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from moestro.core.errors import PlanError
from moestro.core.files import write_text
from moestro.plan.case import Case
from moestro.plan.columns import Array
from moestro.plan.constants import NAMES, Constants
from moestro.plan.memory import GIB, MemoryConstants, memory
from moestro.plan.published import Row, together
from moestro.plan.step import FACTORS, StepTime, step_time

EFFECT_SPREADS = {"software": 0.08, "kind": 0.06}
"""Standard deviations of effects: of a software, and of a software's dense or sparse models. Devices have none of their
own: with them, groups that were left out were predicted worse."""
GROUP_SPREAD = {"dense": 0.05, "moe": 0.12}
"""Of what a report's habits do to all its rows."""
NOISE_SPREAD = {"dense": 0.03, "moe": 0.08}
PART_SPREAD = 0.3
"""Of every part of a step in one report, beside the formulas: a measured row teaches rows that are alike more."""
TAILS = 2.0
"""Variance of a row's noise, which is t-distributed with 4 degrees of freedom, beside a normal one of its scale."""
TENTH = 1.2816
"""Standard deviations from the median to the tenth part of a normal distribution."""
MEMORY_SPREAD = 0.04
"""Of the logarithm of peak memory, on rows with a measured peak."""


def band(median: float, spread: float) -> tuple[float, float]:
    """p10 and p90 of a lognormal figure; `spread` is the standard deviation of its logarithm."""
    edge = math.exp(TENTH * spread)
    return median / edge, median * edge


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Everything fitted."""

    name: str
    constants: Constants
    effects: dict[str, float]
    """Logarithms by name, see `effect_names`."""
    widen: dict[str, float]
    memory: MemoryConstants = field(default_factory=MemoryConstants)
    source: str = ""
    fitted: str = ""
    """Date."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Of rows, in their order."""

    step_s: Array
    p10_s: Array
    p90_s: Array
    memory_gib: Array
    fits: Array
    """True where the peak and the runtime fit the device, allowing for the spread of predicted peaks."""


def effect_names(software: str, kind: str) -> list[str]:
    """Effects that act on a prediction."""
    return [f"software {software}", f"kind {software} {kind}"]


def effect_and_spread(profile: Profile, software: str, kind: str) -> tuple[float, float]:
    """(logarithm of the factor on seconds, standard deviation of a prediction's logarithm)."""
    names = effect_names(software, kind)
    effect = sum(profile.effects.get(name, 0.0) for name in names)
    unknown = sum(EFFECT_SPREADS[name.split()[0]] ** 2 for name in names if name not in profile.effects)
    spread = (GROUP_SPREAD[kind] ** 2 + NOISE_SPREAD[kind] ** 2 + unknown) ** 0.5
    return effect, spread * profile.widen.get(kind, 1.0)


def predict(rows: Sequence[Row], profile: Profile, anchors: Mapping[str, float] | None = None) -> Prediction:
    """Step time with its band, and memory.

    anchors  measured seconds by row id: rows of the same group are shifted by what the anchored ones taught, those made
             of the same parts most, and their band narrows
    raises   PlanError for an anchor that is not among the rows
    """
    learned = [effect_and_spread(profile, row.software, row.kind) for row in rows]
    case = replace(together(rows), effect=np.array([effect for effect, _ in learned]))
    step = step_time(case, profile.constants)
    log_s = np.log(np.broadcast_to(step.total_s, len(rows)))
    spread = np.array([sd for _, sd in learned])
    log_s, spread = anchored(rows, log_s, spread, part_shares(step, len(rows)), anchors or {})
    peak = _least_recompute(rows, together(rows), profile)
    roomy = peak * np.exp(-2 * MEMORY_SPREAD) + profile.memory.runtime_gib
    return Prediction(
        step_s=np.exp(log_s),
        p10_s=np.exp(log_s - TENTH * spread),
        p90_s=np.exp(log_s + TENTH * spread),
        memory_gib=peak,
        fits=roomy <= np.array([float(row.case.machine.memory_bytes) / GIB for row in rows]),
    )


def part_shares(step: StepTime, rows: int) -> Array:
    """[rows, parts]: of a step, what each part takes; factors on the whole are no part."""
    parts = [value for name, value in step.parts.items() if name not in FACTORS]
    return np.stack([np.broadcast_to(part / step.total_s, rows) for part in parts], axis=1)


def anchored(
    rows: Sequence[Row], log_s: Array, spread: Array, share_RP: Array, anchors: Mapping[str, float]
) -> tuple[Array, Array]:
    """Condition every group on its anchored rows: what its rows share is normal beforehand, so it stays so.

    They share the group's own term, and for every part of a step how far it is off, as much as it takes of each row.
    """
    place = {row.id: index for index, row in enumerate(rows)}
    if unknown := [name for name in anchors if name not in place]:
        raise PlanError(f"--anchor names {unknown[0]}, which is not a row; give ID=STEP_S with an id from the file")
    log_s, spread = log_s.copy(), spread.copy()
    for group in {rows[place[name]].group for name in anchors}:
        here = [place[name] for name in anchors if rows[place[name]].group == group]
        told = np.array([np.log(anchors[rows[index].id]) - log_s[index] for index in here])
        of = [index for index, row in enumerate(rows) if row.group == group]
        noise = np.array([NOISE_SPREAD[row.kind] for row in rows])
        shared = np.sqrt(np.maximum(spread**2 - noise**2, 1e-6))
        common = np.outer(shared[of], shared[here]) + PART_SPREAD**2 * share_RP[of] @ share_RP[here].T
        among = common[[of.index(index) for index in here]] + np.diag(noise[here] ** 2)
        gain = np.linalg.solve(among, common.T).T
        before = shared[of] ** 2 + PART_SPREAD**2 * (share_RP[of] ** 2).sum(axis=1)
        log_s[of] = log_s[of] + gain @ told
        after = np.sqrt(before - (gain * common).sum(axis=1) + TAILS * noise[of] ** 2)
        spread[of] = np.minimum(after, spread[of])
    return log_s, spread


def _least_recompute(rows: Sequence[Row], case: Case, profile: Profile) -> Array:
    """Peak memory; where recomputation is not said and the layout would not fit without, with full recomputation.

    A source that leaves that out may leave out sharded weights too: they are assumed where nothing else would fit.
    """
    ones = np.ones(len(rows))
    plain = np.broadcast_to(memory(case, profile.memory).total_gib, len(rows))
    full = replace(case, layout=replace(case.layout, full=ones))
    again = np.broadcast_to(memory(full, profile.memory).total_gib, len(rows))
    sharded = replace(full, layout=replace(full.layout, zero=3 * ones))
    least = np.broadcast_to(memory(sharded, profile.memory).total_gib, len(rows))
    room = np.array([float(row.case.machine.memory_bytes) / GIB for row in rows]) - profile.memory.runtime_gib
    unsaid = np.array([not row.recompute_known for row in rows])
    return np.where(unsaid & (plain > room), np.where(again > room, np.minimum(again, least), again), plain)


def load_profile(path: Path | None = None) -> Profile:
    """A profile file, or the one that comes with the package; raises PlanError where it is not one."""
    source = path or files("moestro.plan").joinpath("profiles", "published.json")
    try:
        table: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        constants = Constants(**{name: float(table["constants"][name]) for name in NAMES})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"profile {source} cannot be read: {error}; make one with moestro plan calibrate") from error
    return Profile(
        name=table.get("name", "profile"),
        constants=constants,
        effects=table.get("effects", {}),
        widen=table.get("widen", {}),
        memory=MemoryConstants(**table.get("memory", {})),
        source=table.get("source", ""),
        fitted=table.get("fitted", ""),
    )


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile, whole or not at all."""
    table = asdict(profile)
    table["constants"] = {name: _short(value) for name, value in table["constants"].items()}
    table["effects"] = {name: round(value, 4) for name, value in sorted(table["effects"].items())}
    write_text(path, json.dumps(table, indent=1) + "\n")


def _short(value: float) -> float:
    return float(f"{value:.5g}")
