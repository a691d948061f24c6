"""Search placements by small changes: exchange a replica, swap two, add, drop; keep what helps.

    state -> anneal -> the same state, better

Simulated annealing (Kirkpatrick et al. 1983) with a number of moves, not a clock, and a random generator of its own:
the same input gives the same answer on every machine. Each move changes replicas of one or two experts
and splits these anew (`state.put`); a refused move is undone from a copy.
"""

from math import exp
from typing import NamedTuple

import numpy as np

from moestro.place.compiled import compiled, inlined
from moestro.place.state import MOST_REPLICAS, Fixed, Floats, Ints, State, drop, hold, norm, potential, put


class Schedule(NamedTuple):
    """How long and how boldly to search."""

    moves: int
    hot: float
    """First temperature, as a share of the step time."""
    cold: float
    doublings: int
    """Norms with p = 2 ** doublings stand for maxima."""
    portions: int
    dropping: bool
    """Whether fewer replicas may be better: gradients, copies or shared tokens cost something."""


class Undo(NamedTuple):
    """What one move may change, before it."""

    load_N: Floats
    sync_L: Floats
    move_L: Floats
    share_2AP: Floats
    replica_2P: Ints
    count_2: Ints
    host_share_2HH: Floats


def empty_undo(fixed: Fixed) -> Undo:
    """Room for one move."""
    sources, devices, links, hosts = *fixed.route_AGR.shape[:2], len(fixed.link_cost_L), len(fixed.upper_HHR)
    most = min(devices, MOST_REPLICAS)
    return Undo(
        load_N=np.zeros(links + devices),
        sync_L=np.zeros(links),
        move_L=np.zeros(links),
        share_2AP=np.zeros((2, sources, most)),
        replica_2P=np.zeros((2, most), np.int64),
        count_2=np.zeros(2, np.int64),
        host_share_2HH=np.zeros((2, hosts, hosts)),
    )


@compiled
def drawn(seed_2: Ints, below: int) -> int:
    """A whole number in 0..below-1: two multiplicative generators combined (L'Ecuyer 1988)."""
    seed_2[0] = seed_2[0] * 40014 % 2147483563
    seed_2[1] = seed_2[1] * 40692 % 2147483399
    return (seed_2[0] - seed_2[1]) % 2147483562 * below // 2147483562


@compiled
def scale_of(state: State, doublings: int) -> tuple[float, float, int]:
    """One over both norms, for `put`."""
    return 1.0 / max(norm(state.link_L, doublings), 1e-30), 1.0 / max(norm(state.device_G, doublings), 1e-30), doublings


@inlined
def _copy(from_N: Floats, to_N: Floats, count: int) -> None:
    """The first `count`; assigning slices would compile numba's error messages too, for seconds."""
    for place in range(count):
        to_N[place] = from_N[place]


@inlined
def _copy_loads(one: State | Undo, other: State | Undo) -> None:
    _copy(one.load_N, other.load_N, len(one.load_N))
    _copy(one.sync_L, other.sync_L, len(one.sync_L))
    _copy(one.move_L, other.move_L, len(one.move_L))


@compiled
def _remember(state: State, undo: Undo, first: int, second: int, dedup: bool) -> None:
    _copy_loads(state, undo)
    for number, expert in enumerate((first, second)):
        count = state.count_E[expert]
        undo.count_2[number] = count
        _copy(state.replica_EP[expert], undo.replica_2P[number], count)
        for source in range(state.share_EAP.shape[1]):
            _copy(state.share_EAP[expert, source], undo.share_2AP[number, source], count)
        for host in range(state.host_share_EHH.shape[1] if dedup else 0):
            _copy(state.host_share_EHH[expert, host], undo.host_share_2HH[number, host], state.host_share_EHH.shape[2])


@compiled
def _restore(
    fixed: Fixed, state: State, undo: Undo, first: int, second: int, changed: tuple[int, int, int, int]
) -> None:
    """Take a move back; changed = (entered, left) of both experts."""
    for expert, entered in ((first, changed[0]), (second, changed[2])):
        if entered >= 0:
            hold(fixed, state, expert, entered, -1)
    for expert, left in ((first, changed[1]), (second, changed[3])):
        if left >= 0:
            hold(fixed, state, expert, left, 1)
    for number, expert in enumerate((first, second)):
        count = undo.count_2[number]
        _copy(undo.replica_2P[number], state.replica_EP[expert], count)
        for source in range(state.share_EAP.shape[1]):
            _copy(undo.share_2AP[number, source], state.share_EAP[expert, source], count)
        for host in range(state.host_share_EHH.shape[1] if fixed.dedup else 0):
            _copy(undo.host_share_2HH[number, host], state.host_share_EHH[expert, host], state.host_share_EHH.shape[2])
    _copy_loads(undo, state)


@compiled
def _hot_expert(fixed: Fixed, state: State, load_E: Floats, seed_2: Ints) -> int:
    """One of two drawn experts, the one with more tokens per replica."""
    one, two = drawn(seed_2, len(load_E)), drawn(seed_2, len(load_E))
    return one if load_E[one] * state.count_E[two] >= load_E[two] * state.count_E[one] else two


@compiled
def _propose(
    fixed: Fixed, state: State, load_E: Floats, seed_2: Ints, dropping: bool
) -> tuple[int, int, int, int, int, int]:
    """(first, leaves, enters, second, leaves, enters): two experts and devices they leave and enter, or -1."""
    devices = len(fixed.slot_G)
    kind = drawn(seed_2, 100)
    here = drawn(seed_2, devices)
    if kind < 8 or state.used_G[here] == 0:
        return drawn(seed_2, len(load_E)), -1, -1, -1, -1, -1
    mine = state.resident_GC[here, drawn(seed_2, state.used_G[here])]
    if dropping and kind < 16:
        return (mine, here, -1, -1, -1, -1) if state.count_E[mine] > 1 else (-1, -1, -1, -1, -1, -1)
    if kind < 60:
        entering = _hot_expert(fixed, state, load_E, seed_2)
        if state.held_EG[entering, here] or state.count_E[entering] == state.replica_EP.shape[1]:
            return -1, -1, -1, -1, -1, -1
        if state.used_G[here] < fixed.slot_G[here]:
            return entering, -1, here, -1, -1, -1
        if state.count_E[mine] > 1:
            return mine, here, -1, entering, -1, here
    there = drawn(seed_2, devices)
    if there == here or state.held_EG[mine, there]:
        return -1, -1, -1, -1, -1, -1
    if state.used_G[there] < fixed.slot_G[there]:
        return mine, here, there, -1, -1, -1
    theirs = state.resident_GC[there, drawn(seed_2, state.used_G[there])]
    if state.held_EG[theirs, here]:
        return -1, -1, -1, -1, -1, -1
    return mine, here, there, theirs, there, here


def anneal(fixed: Fixed, state: State, undo: Undo, schedule: Schedule, seed: int) -> float:
    """Improve `state` in place; returns its potential in seconds."""
    seed_2 = np.array([seed * 7919 + 1, seed * 104729 + 1]) % 2147483399
    return float(_anneal(fixed, state, undo, schedule, fixed.token_AE.sum(axis=0), seed_2))


@compiled
def _anneal(fixed: Fixed, state: State, undo: Undo, schedule: Schedule, load_E: Floats, seed_2: Ints) -> float:
    for _ in range(8):
        drawn(seed_2, 2)
    current = potential(fixed, state, schedule.doublings)
    scale = scale_of(state, schedule.doublings)
    for move in range(schedule.moves):
        heat = current * schedule.hot * (schedule.cold / schedule.hot) ** (move / schedule.moves)
        first, leaves, enters, second, leaves2, enters2 = _propose(fixed, state, load_E, seed_2, schedule.dropping)
        if first < 0:
            continue
        other = first if second < 0 else second
        _remember(state, undo, first, other, fixed.dedup)
        new_before = state.new_1[0]
        for expert, out in ((first, leaves), (second, leaves2)):
            if out >= 0:
                drop(fixed, state, expert, out)
        for expert, into in ((first, enters), (second, enters2)):
            if into >= 0:
                hold(fixed, state, expert, into, 1)
        few, many = (other, first) if state.count_E[other] < state.count_E[first] else (first, other)
        put(fixed, state, few, schedule.portions, scale)
        if many != few:
            put(fixed, state, many, schedule.portions, scale)
        found = potential(fixed, state, schedule.doublings)
        allowed = state.new_1[0] <= max(fixed.most_new, new_before)
        if allowed and (found <= current or drawn(seed_2, 1000000) < 1e6 * exp((current - found) / heat)):
            current = found
            scale = scale_of(state, schedule.doublings)
        else:
            _restore(fixed, state, undo, first, other, (enters, leaves, enters2, leaves2))
    return current


def sweep(fixed: Fixed, state: State, times: int, portions: int, doublings: int) -> None:
    """Split every expert anew against all others, the hottest first."""
    _sweep(fixed, state, np.argsort(-fixed.token_AE.sum(axis=0), kind="stable"), times, portions, doublings)


@compiled
def _sweep(fixed: Fixed, state: State, order_E: Ints, times: int, portions: int, doublings: int) -> None:
    for _ in range(times):
        for expert in order_E:
            scale = scale_of(state, doublings)
            put(fixed, state, expert, portions, scale)
