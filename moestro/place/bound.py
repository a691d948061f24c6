"""What no placement can beat, and the exact optimum of small layers.

    quick_bound       closed form: all devices' compute, and what full hosts must import
    dual_bound        prices on links, devices and slots; each expert chooses its best set of holders (up to 8 devices)
    relaxed_bound     linear programme (HiGHS), experts held in part; with a known answer raised box by box (`boxes`)
    exact             the same with whole replicas: branch and bound (HiGHS), for small layers

`dual_bound` is Lagrangian: for any prices it is a bound, and since experts choose whole sets of holders it can pass the
linear programme's (Geoffrion 1974). Prices follow the loads by multiplicative weights. In all of these a host's devices
taken together as one source, and links that only part of a group uses are left out, which only lowers the bound.

Dimension key:  A sources   E experts   G devices   L links   S sets of devices   T token types   H hosts
                R places of a route
"""

import time
from dataclasses import dataclass
from math import exp
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moestro.place.boxes import boxed_bound
from moestro.place.compiled import compiled, inlined
from moestro.place.cost import Layer
from moestro.place.prepare import fixed_arrays
from moestro.place.programme import EXACT, FOUND, build, solve_programme
from moestro.place.state import Fixed, Floats, Ints, State

FEW = 8
"""Most devices whose subsets are enumerated."""


def quick_bound(layer: Layer) -> float:
    """Seconds: compute shared evenly, plus tokens that hosts cannot serve themselves over their links."""
    compute_s = layer.passes * layer.token_SE.sum() / layer.tokens_per_s_G.sum()
    exchange_s = 0.0
    links = layer.links
    if not layer.sets:
        for host, rate in enumerate(links.leaving_bytes_per_s_H):
            mine = links.host_G == host
            token_E = np.sort(layer.token_SE[mine].sum(axis=0))[::-1]
            left = token_E[int(layer.slot_G[mine].sum()) :].sum() * layer.token_bytes
            exchange_s = max(exchange_s, layer.exchanges * left / rate)
    return float(compute_s + exchange_s + layer.latency_s)


def dual_bound(layer: Layer, state: State | None = None, rounds: int = 250) -> float:
    """Seconds; the best of `rounds` rounds of prices, started from the loads of `state`. At least `quick_bound`."""
    quick_s = quick_bound(layer)
    if layer.links.devices > FEW:
        return quick_s
    fixed = fixed_arrays(layer)
    links, devices = len(fixed.link_cost_L), len(fixed.slot_G)
    price_L, price_G = np.ones(links), np.ones(devices)
    if state is not None:
        price_L = (state.link_L / max(state.link_L.max(), 1e-30)) ** 15 + 1e-4
        price_G = (state.device_G / max(state.device_G.max(), 1e-30)) ** 15 + 1e-2
    best, part_EH = 0.0, _shared_copies(fixed)
    for pace in (0.3, 1.0):
        price = PerResource(price_L.copy(), price_G.copy(), np.ones(links), np.ones(links), np.zeros(devices))
        room = PerResource(*(np.zeros_like(price_N) for price_N in price))
        best = max(best, _ascend(fixed, part_EH, price, room, rounds, pace))
    return max(quick_s, best + layer.latency_s)


def _shared_copies(fixed: Fixed) -> Floats:
    """part_EH: what a token of host H for an expert costs above hosts when its set's experts share the copy equally."""
    experts, hosts = fixed.type_start_EH.shape
    part_EH = np.ones((experts, hosts))
    if not fixed.dedup:
        return part_EH
    size_T = (fixed.type_expert_TK >= 0).sum(axis=1)
    for expert in range(experts):
        for host in range(hosts):
            kinds = fixed.type_of_X[fixed.type_start_EH[expert, host] : fixed.type_stop_EH[expert, host]]
            token_N = fixed.type_token_T[kinds]
            part_EH[expert, host] = (token_N / size_T[kinds]).sum() / max(token_N.sum(), 1e-300)
    return part_EH


class PerResource(NamedTuple):
    """A price, or a load, of every resource."""

    link_L: Floats
    device_G: Floats
    sync_L: Floats
    move_L: Floats
    slot_G: Floats


@compiled
def _ascend(fixed: Fixed, part_EH: Floats, price: PerResource, load: PerResource, rounds: int, pace: float) -> float:
    """Follow the loads that cheapest answers to the prices make; returns the best dual value.

    Prices of each kind but slots sum to 1: that makes their loads' sum a bound of the busiest. `load` is room to work.
    """
    best, slots = 0.0, max(fixed.slot_G.sum(), 1)
    kinds = (
        (price.link_L, load.link_L),
        (price.device_G, load.device_G),
        (price.sync_L, load.sync_L),
        (price.move_L, load.move_L),
    )
    for turn in range(rounds):
        for price_N, load_N in kinds:
            _begin(price_N, load_N)
        value = 0.0
        for device in range(len(fixed.slot_G)):
            value -= price.slot_G[device] * fixed.slot_G[device]
            load.slot_G[device] = 0.0
        value += _answers(fixed, part_EH, price, load)
        best = max(best, value)
        step = pace / (1.0 + 0.03 * turn)
        for price_N, load_N in kinds:
            _raise(price_N, load_N, step)
        for device in range(len(fixed.slot_G)):
            over = load.slot_G[device] - fixed.slot_G[device]
            price.slot_G[device] = max(price.slot_G[device] + 0.15 * step * value / slots * over, 0.0)
    return best


@inlined
def _begin(price_N: Floats, load_N: Floats) -> None:
    """Prices sum to one, nothing is loaded."""
    total = 0.0
    for price in price_N:
        total += price
    for place in range(len(price_N)):
        price_N[place] /= total
        load_N[place] = 0.0


@inlined
def _raise(price_N: Floats, load_N: Floats, step: float) -> None:
    """Multiply by how loaded each is beside the busiest."""
    top = 0.0
    for load in load_N:
        top = max(top, load)
    for place in range(len(price_N) if top > 0.0 else 0):
        price_N[place] = price_N[place] * exp(step * (load_N[place] / top - 1.0)) + 1e-9


@compiled
def _answers(fixed: Fixed, part_EH: Floats, price: PerResource, load: PerResource) -> float:
    """Add every expert's cheapest answer to `load`; returns what all of them cost."""
    total = 0.0
    for expert in range(fixed.token_AE.shape[1]):
        cost_AG = _serve_cost(fixed, part_EH, expert, price)
        chosen, cost = _best_set(fixed.token_AE[:, expert], cost_AG, _hold_cost(fixed, expert, price))
        total += cost
        _hold(fixed, expert, chosen, load)
        _serve(fixed, part_EH, expert, chosen, cost_AG, load)
    return total


@inlined
def _price(price_L: Floats, cost_L: Floats, route_R: Ints, part_R: Floats) -> float:
    """Of one token on a route; links that only part of the source uses are left out."""
    total = 0.0
    for place in range(len(route_R)):
        link = route_R[place]
        if link >= 0 and part_R[place] == 1.0:
            total += price_L[link] * cost_L[link]
    return total


@inlined
def _load(load_L: Floats, cost_L: Floats, route_R: Ints, part_R: Floats, tokens: float) -> None:
    """Add tokens to the links that `_price` counts."""
    for place in range(len(route_R)):
        link = route_R[place]
        if link >= 0 and part_R[place] == 1.0:
            load_L[link] += tokens * cost_L[link]


@compiled
def _hold_cost(fixed: Fixed, expert: int, price: PerResource) -> Floats:
    cost_G = price.slot_G.copy()
    home = fixed.home_E[expert]
    for device in range(len(cost_G)):
        nearest = fixed.nearest_EG[expert, device]
        for place in range(fixed.pair_route_GGR.shape[2]):
            for link in (fixed.pair_route_GGR[device, home, place], fixed.pair_route_GGR[home, device, place]):
                if link >= 0:
                    cost_G[device] += price.sync_L[link] * fixed.sync_cost_L[link]
            link = fixed.pair_route_GGR[nearest, device, place]
            if nearest >= 0 and link >= 0:
                cost_G[device] += price.move_L[link] * fixed.move_cost_L[link]
    return cost_G


@compiled
def _serve_cost(fixed: Fixed, part_EH: Floats, expert: int, price: PerResource) -> Floats:
    """Price of one token from A served at G."""
    sources, devices, _ = fixed.route_AGR.shape
    price_L, cost_L, route_AGR, part_AGR = price.link_L, fixed.link_cost_L, fixed.route_AGR, fixed.part_AGR
    upper_HHR, whole_R = fixed.upper_HHR, np.ones(fixed.upper_HHR.shape[2])
    cost_AG = np.zeros((sources, devices))
    for source in range(sources):
        at = fixed.host_A[source]
        for device in range(devices):
            to = fixed.host_G[device]
            cost = price.device_G[device] * fixed.device_cost_G[device]
            cost += _price(price_L, cost_L, route_AGR[source, device], part_AGR[source, device])
            if fixed.dedup and at != to:
                cost += part_EH[expert, at] * _price(price_L, cost_L, upper_HHR[at, to], whole_R)
            cost_AG[source, device] = cost
    return cost_AG


@compiled
def _best_set(token_A: Floats, cost_AG: Floats, hold_G: Floats) -> tuple[int, float]:
    """The cheapest set of holders as a bit mask, and its cost: serving and holding."""
    sources, devices = cost_AG.shape
    least_SA = np.full((1 << devices, sources), np.inf)
    held_S = np.zeros(1 << devices)
    chosen, best = 0, np.inf
    for subset in range(1, 1 << devices):
        device = 0
        while not (subset >> device) & 1:
            device += 1
        rest = subset & (subset - 1)
        held_S[subset] = held_S[rest] + hold_G[device]
        cost = held_S[subset]
        for source in range(sources):
            least = min(least_SA[rest, source], cost_AG[source, device])
            least_SA[subset, source] = least
            cost += token_A[source] * least
        if cost < best:
            chosen, best = subset, cost
    return chosen, best


@compiled
def _hold(fixed: Fixed, expert: int, chosen: int, load: PerResource) -> None:
    """Add slots, gradients and copying of an expert's chosen holders."""
    home = fixed.home_E[expert]
    for device in range(len(fixed.slot_G)):
        if not (chosen >> device) & 1:
            continue
        load.slot_G[device] += 1
        nearest = fixed.nearest_EG[expert, device]
        for place in range(fixed.pair_route_GGR.shape[2]):
            for link in (fixed.pair_route_GGR[device, home, place], fixed.pair_route_GGR[home, device, place]):
                if link >= 0:
                    load.sync_L[link] += fixed.sync_cost_L[link]
            link = fixed.pair_route_GGR[nearest, device, place]
            if nearest >= 0 and link >= 0:
                load.move_L[link] += fixed.move_cost_L[link]


@compiled
def _serve(fixed: Fixed, part_EH: Floats, expert: int, chosen: int, cost_AG: Floats, load: PerResource) -> None:
    """Add the flows of an expert's tokens, each source to its cheapest chosen holder."""
    sources, devices, _ = fixed.route_AGR.shape
    load_L, cost_L, route_AGR, part_AGR = load.link_L, fixed.link_cost_L, fixed.route_AGR, fixed.part_AGR
    upper_HHR, whole_R = fixed.upper_HHR, np.ones(fixed.upper_HHR.shape[2])
    for source in range(sources):
        best = -1
        for device in range(devices):
            if (chosen >> device) & 1 and (best < 0 or cost_AG[source, device] < cost_AG[source, best]):
                best = device
        tokens, at, to = fixed.token_AE[source, expert], fixed.host_A[source], fixed.host_G[best]
        load.device_G[best] += tokens * fixed.device_cost_G[best]
        _load(load_L, cost_L, route_AGR[source, best], part_AGR[source, best], tokens)
        if fixed.dedup and at != to:
            _load(load_L, cost_L, upper_HHR[at, to], whole_R, tokens * part_EH[expert, at])


@dataclass(frozen=True, kw_only=True)
class Exact:
    """What HiGHS found."""

    held_EG: NDArray[np.bool_] | None
    """None where the time was up before any placement."""
    step_s: float
    bound_s: float
    seconds: float
    proven: bool


def relaxed_bound(layer: Layer, limit_s: float = 60.0, known_s: float = np.inf) -> float:
    """Seconds; the linear programme's optimum, raised towards `known_s` (of a placement that we have) in the time left.

    `quick_bound` where not even the programme ends in time, `known_s` where nothing can be better.
    """
    found_s = boxed_bound(fixed_arrays(layer), known_s - layer.latency_s, limit_s) + layer.latency_s
    return max(quick_bound(layer), found_s)


def exact(layer: Layer, limit_s: float = 60.0) -> Exact:
    """The best placement of a small layer, proven or with the bound reached in `limit_s`."""
    experts, devices = layer.held_EG.shape
    began = time.perf_counter()
    found = solve_programme(build(fixed_arrays(layer)), EXACT, limit_s)
    solved, dual = found.x is not None, found.mip_dual_bound
    bound_s = float(dual) if dual is not None else 0.0
    held_EG = np.rint(found.x[: experts * devices]).reshape(experts, devices) > 0 if solved else None
    return Exact(
        held_EG=held_EG,
        step_s=(float(found.fun) if solved else np.inf) + layer.latency_s,
        bound_s=bound_s + layer.latency_s,
        seconds=time.perf_counter() - began,
        proven=found.status == FOUND,
    )
