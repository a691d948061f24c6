"""From measured bandwidth between every two ranks to the levels of a network.

    rate_RR, latency_RR -> fit_levels -> levels and exceptions of a Cluster

A unit's link out is at least as fast as its best pair, so out_u = max over v of rate(u, v), and in_v likewise. Where
rate(u, v) is clearly below min(out_u, in_v), something further up is the bottleneck: units that reach each other at
full rate form one unit of the next level, and the same is asked between those. What a unit has less (or more) than
the median becomes an exception.

Dimension key:  R ranks   U units of a level
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moestro.cluster.topology import ExceptionSpec, LevelSpec
from moestro.core.errors import ClusterError

Floats = NDArray[np.float64]
NEAR = 0.75
"""A pair at this share of what its ends can do is not held back by anything between them."""
SAME = 0.15
"""Links within this of the median count as equal."""
LEVEL_NAMES = ("host", "leaf", "spine", "core")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Levels from inside out, and the ranks of every unit of each level."""

    levels: tuple[LevelSpec, ...]
    exceptions: tuple[ExceptionSpec, ...]
    groups: tuple[tuple[tuple[int, ...], ...], ...]


def fit_levels(rate_RR: Floats, latency_RR: Floats, names: Sequence[str] = LEVEL_NAMES) -> Fitted:
    """Levels of a measured network.

    rate_RR     GB/s from rank to rank, one pair at a time; the diagonal is ignored
    latency_RR  microseconds of a small message
    raises      ClusterError for missing, not finite or not positive rates
    """
    off = ~np.eye(len(rate_RR), dtype=bool)
    bad = np.argwhere(off & ~(np.isfinite(rate_RR) & (rate_RR > 0)))
    if bad.size:
        source, to = bad[0]
        raise ClusterError(
            f"the probe measured {rate_RR[source, to]:g} GB/s from rank {source} to {to}; check this link"
        )
    units: list[tuple[int, ...]] = [(rank,) for rank in range(len(rate_RR))]
    levels: list[LevelSpec] = []
    exceptions: list[ExceptionSpec] = []
    found: list[tuple[tuple[int, ...], ...]] = []
    while len(units) > 1:
        rate_UU = _between(rate_RR, units)
        grouped = _grouped(rate_UU)
        name = names[len(levels)] if len(levels) < len(names) else f"level{len(levels)}"
        inside = [[units[unit] for unit in group] for group in grouped]
        pairs = [latency_RR[a, b] for group in inside for u in group for v in group if u != v for a in u for b in v]
        out_U, in_U = _ends(rate_UU, grouped)
        usual = float(np.median(np.concatenate([out_U, in_U])))
        sizes = [len(group) for group in grouped]
        level = LevelSpec(
            name=name, fan_out=max(sizes), gb_per_s=round(usual, 4), latency_us=round(float(np.median(pairs)), 2)
        )
        levels.append(level)
        exceptions += _uneven_links(name, usual, out_U, in_U)
        units = [tuple(rank for unit in group for rank in unit) for group in inside]
        if len(units) > 1 and min(sizes) < max(sizes):
            above = names[len(levels)] if len(levels) < len(names) else f"level{len(levels)}"
            for size in sorted(set(sizes) - {max(sizes)}):
                small = tuple(unit for unit, here in enumerate(sizes) if here == size)
                exceptions.append(ExceptionSpec(level=above, units=small, fan_out=size))
        found.append(tuple(units))
    return Fitted(levels=tuple(levels), exceptions=tuple(exceptions), groups=tuple(found))


def _between(rate_RR: Floats, units: Sequence[tuple[int, ...]]) -> Floats:
    """Median rate from unit to unit; 0 on the diagonal."""
    rate_UU = np.zeros((len(units), len(units)))
    for a, mine in enumerate(units):
        for b, theirs in enumerate(units):
            if a != b:
                rate_UU[a, b] = np.median(rate_RR[np.ix_(mine, theirs)])
    return rate_UU


def _grouped(rate_UU: Floats) -> list[list[int]]:
    """Units that reach each other at what their own links can do, in order; one group of all if none do."""
    count = len(rate_UU)
    out_U, in_U = rate_UU.max(axis=1), rate_UU.max(axis=0)
    full_UU = rate_UU >= NEAR * np.minimum(out_U[:, None], in_U[None, :])
    full_UU &= full_UU.T
    np.fill_diagonal(full_UU, True)
    groups: list[list[int]] = []
    left = list(range(count))
    while left:
        group = [left[0]]
        group += [unit for unit in left[1:] if all(full_UU[unit, member] for member in group)]
        groups.append(group)
        left = [unit for unit in left if unit not in group]
    return groups if len(groups) < count else [list(range(count))]


def _ends(rate_UU: Floats, grouped: Sequence[Sequence[int]]) -> tuple[Floats, Floats]:
    """Rates of every unit's link out and in, from the pairs inside its group (from all where it is alone)."""
    inside_UU = np.zeros(rate_UU.shape, bool)
    for group in grouped:
        inside_UU[np.ix_(group, group)] = True
    kept_UU = np.where(inside_UU, rate_UU, 0.0)
    out_U, in_U = kept_UU.max(axis=1), kept_UU.max(axis=0)
    alone_U = out_U == 0
    out_U[alone_U], in_U[alone_U] = rate_UU.max(axis=1)[alone_U], rate_UU.max(axis=0)[alone_U]
    return out_U, in_U


def _uneven_links(level: str, usual: float, out_U: Floats, in_U: Floats) -> list[ExceptionSpec]:
    found = []
    for unit, (out, into) in enumerate(zip(out_U, in_U, strict=True)):
        if abs(out / usual - 1) > SAME or abs(into / usual - 1) > SAME:
            same = abs(out / into - 1) <= SAME
            values = {"gb_per_s": round(float(out), 4)} | ({} if same else {"gb_per_s_in": round(float(into), 4)})
            found.append(
                ExceptionSpec(
                    level=level, units=(unit,), gb_per_s=values["gb_per_s"], gb_per_s_in=values.get("gb_per_s_in")
                )
            )
    return found
