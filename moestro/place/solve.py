"""Place a layer's experts: which devices hold each, and which share of whose tokens each replica serves.

    Layer -> solve -> Answer(placement, time, bound)

A start (the placement in force, or experts spread over hosts by load) is improved by annealing (`anneal`), each change
judged by the whole cost, split included: placement and split are chosen together. Called by `moestro place` and, while
training, by `train.rebalance`. Deterministic: the search is measured in moves, not in seconds.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moestro.place.anneal import Schedule, anneal, empty_undo, sweep
from moestro.place.compiled import COMPILED
from moestro.place.cost import Layer, Placement, StepTime, step_time
from moestro.place.prepare import NO_LIMIT, SEPARATE, fixed_arrays, loaded, placement_of, spread
from moestro.place.state import MOST_REPLICAS, Fixed, State

DOUBLINGS = 4
"""Norms with p = 16 while searching."""
FINE_DOUBLINGS = 6
"""p = 64 for the last split."""
WORK = 20_000.0
"""Microseconds of search on one core of the machine in docs/placement.md."""
POLISH = 0.3
"""Share of the moves for the last search."""
LARGE = 400_000
"""Sources x experts x replicas from which one pass must do."""
ONLY_PYTHON = 0.02
"""Share of the search where numba is missing."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A placement and what it is worth."""

    placement: Placement
    time: StepTime
    moved: int
    """Replicas that devices must copy."""
    state: State
    """The search's own arrays: where a bound starts from."""
    freed: int
    """Replicas of the placement in force that are given up."""


def solve(
    layer: Layer, *, effort: float = 1.0, most_new: int = NO_LIMIT, gentle: bool = False, seed: int = 1
) -> Answer:
    """The best placement found.

    effort    1 is about 30 ms for one layer; the search grows with it
    most_new  most replicas that may be copied (the byte budget of a move over the bytes of one)
    gentle    start from the placement in force and stay near it: for a layer that was placed before
    """
    fixed = fixed_arrays(layer, most_new, serial=gentle)
    near = gentle or most_new < NO_LIMIT
    start_EG = layer.held_EG if near else spread_start(layer)
    best = _searched(fixed, start_EG, _plan(layer, fixed, _moves(fixed, effort, start_EG), gentle), seed)
    placement = placement_of(layer, best)
    moved = int((placement.held_EG & ~layer.held_EG).sum())
    freed = int((layer.held_EG & ~placement.held_EG).sum())
    return Answer(placement=placement, time=step_time(layer, placement), moved=moved, state=best, freed=freed)


def split(layer: Layer, held_EG: NDArray[np.bool_]) -> Placement:
    """Only the shares, for given holders."""
    fixed = fixed_arrays(layer)
    state = loaded(fixed, held_EG)
    _finish(fixed, state)
    return placement_of(layer, state)


def spread_start(layer: Layer) -> NDArray[np.bool_]:
    """Experts by load, replicas of one expert on different hosts; a fair start on any network."""
    token_E = layer.token_SE.sum(axis=0)
    return spread(token_E, layer.tokens_per_s_G, layer.slot_G.astype(np.int64), layer.links.host_G)


def _plan(layer: Layer, fixed: Fixed, moves: int, gentle: bool) -> tuple[Schedule, int]:
    """How to search, and from how many starts: two where there are moves enough."""
    per_slot = moves / max(int(fixed.slot_G.sum()), 1)
    hot = 0.001 if gentle else float(np.clip(0.03 * (per_slot / 150) ** 2, 0.0005, 0.03))
    portions = 4 if len(fixed.token_AE) <= SEPARATE else 1
    costly = bool(layer.gradient_bytes or layer.state_bytes or layer.sets)
    return Schedule(moves, hot, 0.0005, DOUBLINGS, portions, costly), 2 if per_slot > 40 and not gentle else 1


def _searched(fixed: Fixed, start_EG: NDArray[np.bool_], plan: tuple[Schedule, int], seed: int) -> State:
    """The better of some starts, searched once more at little heat and under sharper norms."""
    schedule, starts = plan
    undo = empty_undo(fixed)
    first = schedule._replace(moves=int(schedule.moves * (1 - POLISH)) // starts)
    found: list[tuple[float, State]] = []
    for start in range(starts):
        state = loaded(fixed, start_EG)
        sweep(fixed, state, 1, schedule.portions, DOUBLINGS)
        found.append((anneal(fixed, state, undo, first, seed * 10 + start), state))
    best = min(found, key=lambda pair: pair[0])[1]
    cooler = schedule._replace(
        moves=int(schedule.moves * POLISH), hot=0.004 if starts > 1 else 0.0007, cold=0.0003, doublings=DOUBLINGS + 1
    )
    anneal(fixed, best, undo, cooler._replace(portions=2 * schedule.portions), seed * 10 + 9)
    _finish(fixed, best)
    return best


def _finish(fixed: Fixed, state: State) -> None:
    """Split more finely under sharper norms; large layers only once, a pass takes tens of milliseconds."""
    if _large(fixed):
        sweep(fixed, state, 1, 1, DOUBLINGS)
        return
    times, portions = (4, 32) if len(fixed.token_AE) <= SEPARATE else (1, 4)
    for doublings in range(DOUBLINGS, FINE_DOUBLINGS + 1):
        sweep(fixed, state, times, portions, doublings)


def _moves(fixed: Fixed, effort: float, start_EG: NDArray[np.bool_]) -> int:
    """Moves that the effort allows, from what one costs on this layer (microseconds, measured).

    A move touches an expert in proportion to its replicas and pays for each of them again.
    """
    count_E = start_EG.sum(axis=1)
    replicas = float((count_E**2).sum() / count_E.sum())
    one = 1.5 + 0.015 * len(fixed.link_cost_L) + 0.16 * len(fixed.token_AE) * replicas**0.5
    one *= 4.0 if fixed.dedup else 1.0
    share = 0.3 if _large(fixed) else 1.0
    return max(int(effort * share * WORK / one * (1.0 if COMPILED else ONLY_PYTHON)), 50)


def _large(fixed: Fixed) -> bool:
    return fixed.token_AE.size * min(len(fixed.slot_G), MOST_REPLICAS) > LARGE
