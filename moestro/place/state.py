"""The arrays that the search works on, and how expert by expert they change: take its flows out, put them back better.

    Fixed   the layer: tokens, routes, costs      State   a placement, its split, and what every resource carries

All loads are seconds of the step: bytes over bandwidth times exchanges, tokens over speed times passes. The exchange
takes as long as its busiest link and compute as long as the slowest device; a p-norm stands for each maximum, so that
relieving the second-busiest counts too. `put` splits an expert's tokens by water-filling: portion by portion to the
replica where the norms grow least, with everything else where it is.

Dimension key:  A sources (devices, or hosts taken together)   E experts   G devices   L links   R places of a route
                N links and devices   W places of a way: a device and a route
                P replicas of an expert   C experts on a device   H hosts   T token types (a host and a set of experts)
                K experts of a type
"""

from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moestro.place.compiled import compiled, inlined

MOST_REPLICAS = 64
"""Of one expert, where there are more devices."""
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Fixed(NamedTuple):
    """What a search does not change. Routes end with -1."""

    token_AE: Floats
    even_tokens: float
    """Mean of token_AE: what is much below it need not be split finely."""
    route_AGR: Ints
    part_AGR: Floats
    """Share of the tokens from A to G that uses the link: below 1 where A is a group and G one of it."""
    way_AGW: Ints
    """All that tokens from A to G load, as numbers in `State.load_N`: the device, then the links of the route."""
    weight_AGW: Floats
    """Seconds of a step per token on each of them."""
    link_cost_L: Floats
    """Seconds of a step per token through the link."""
    device_cost_G: Floats
    """Seconds of a step per token computed."""
    slot_G: Ints
    pair_route_GGR: Ints
    sync_cost_L: Floats
    move_cost_L: Floats
    home_E: Ints
    nearest_EG: Ints
    """Device that a new replica is copied from; -1 where G holds the expert already."""
    host_A: Ints
    host_G: Ints
    upper_HHR: Ints
    """Links above the hosts between two hosts; used where tokens travel once per host."""
    type_start_EH: Ints
    type_stop_EH: Ints
    type_of_X: Ints
    """Types of expert E at host H are type_of_X[start:stop]."""
    type_expert_TK: Ints
    type_token_T: Floats
    dedup: bool
    most_new: int
    """Replicas that may be copied to devices that do not hold them."""
    new_cost: float
    """Seconds of a step for each of them beside its bytes on links: what keeps a replan from idle changes."""


class State(NamedTuple):
    """A placement, its split, and loads."""

    replica_EP: Ints
    """Holders of an expert in any order; the first count_E are valid."""
    count_E: Ints
    held_EG: NDArray[np.uint8]
    resident_GC: Ints
    """Experts on a device in any order; the first used_G are valid."""
    share_EAP: Floats
    """By place in replica_EP."""
    used_G: Ints
    load_N: Floats
    """Links, then devices; the next two are parts of it."""
    link_L: Floats
    device_G: Floats
    sync_L: Floats
    move_L: Floats
    new_1: Ints
    """Replicas beyond the placement in force."""
    host_share_EHH: Floats
    """Share of host A's tokens for an expert that is served at host B."""


def empty_state(fixed: Fixed) -> State:
    """No expert placed, nothing loaded."""
    sources, experts = fixed.token_AE.shape
    devices, links, hosts = len(fixed.slot_G), len(fixed.link_cost_L), len(fixed.upper_HHR)
    most, load_N = min(devices, MOST_REPLICAS), np.zeros(links + devices)
    return State(
        replica_EP=np.full((experts, most), -1, np.int64),
        count_E=np.zeros(experts, np.int64),
        held_EG=np.zeros((experts, devices), np.uint8),
        resident_GC=np.full((devices, max(int(fixed.slot_G.max()), 1)), -1, np.int64),
        share_EAP=np.zeros((experts, sources, most)),
        used_G=np.zeros(devices, np.int64),
        load_N=load_N,
        link_L=load_N[:links],
        device_G=load_N[links:],
        sync_L=np.zeros(links),
        move_L=np.zeros(links),
        new_1=np.zeros(1, np.int64),
        host_share_EHH=np.zeros((experts if fixed.dedup else 0, hosts, hosts)),
    )


@inlined
def power(value: float, doublings: int) -> float:
    """value ** (2 ** doublings), doublings at least 4."""
    value *= value
    value *= value
    value *= value
    value *= value
    for _ in range(doublings - 4):
        value *= value
    return value


@inlined
def norm(load_N: Floats, doublings: int) -> float:
    """The p-norm for p = 2 ** doublings, scaled so that nothing overflows."""
    top = 0.0
    for load in load_N:
        top = max(top, load)
    if top == 0.0:
        return 0.0
    total, part = 0.0, 1.0 / top
    for load in load_N:
        total += power(load * part, doublings)
    for _ in range(doublings):
        total = sqrt(total)
    return top * total


@compiled
def potential(fixed: Fixed, state: State, doublings: int) -> float:
    """Step time with p-norms for maxima, latency left out."""
    time_s = norm(state.link_L, doublings) + norm(state.device_G, doublings)
    time_s += state.new_1[0] * fixed.new_cost
    return time_s + norm(state.sync_L, doublings) + norm(state.move_L, doublings)


@inlined
def flow(load_N: Floats, way_AGW: Ints, weight_AGW: Floats, source: int, device: int, tokens: float) -> None:
    """Add tokens (or take them away) on the device and on the links to it."""
    for place in range(way_AGW.shape[2]):
        carrier = way_AGW[source, device, place]
        if carrier < 0:
            break
        load_N[carrier] += tokens * weight_AGW[source, device, place]


@inlined
def other_share(fixed: Fixed, state: State, kind: int, expert: int, at: int, to: int) -> float:
    """Largest share of the type's other experts that host `at` sends to host `to`: those tokens go there anyway."""
    largest = 0.0
    for place in range(fixed.type_expert_TK.shape[1]):
        other = fixed.type_expert_TK[kind, place]
        if other >= 0 and other != expert:
            largest = max(largest, state.host_share_EHH[other, at, to])
    return largest


@compiled
def merge(fixed: Fixed, state: State, expert: int) -> None:
    """Add the expert's part of the traffic above hosts, one copy per token and host."""
    hosts = fixed.upper_HHR.shape[0]
    for at in range(hosts):
        for to in range(hosts):
            share = state.host_share_EHH[expert, at, to]
            if at == to or share <= 0.0:
                continue
            tokens = 0.0
            for place in range(fixed.type_start_EH[expert, at], fixed.type_stop_EH[expert, at]):
                kind = fixed.type_of_X[place]
                more = share - other_share(fixed, state, kind, expert, at, to)
                if more > 0.0:
                    tokens += fixed.type_token_T[kind] * more
            for place in range(fixed.upper_HHR.shape[2]):
                link = fixed.upper_HHR[at, to, place]
                if link < 0:
                    break
                state.link_L[link] += tokens * fixed.link_cost_L[link]


@inlined
def crossing(fixed: Fixed, state: State, expert: int, at: int, to: int) -> float:
    """Share of the expert's tokens at host `at` for which one more at host `to` means a copy more."""
    share = state.host_share_EHH[expert, at, to]
    new, every = 0.0, 1e-300
    for place in range(fixed.type_start_EH[expert, at], fixed.type_stop_EH[expert, at]):
        kind = fixed.type_of_X[place]
        every += fixed.type_token_T[kind]
        if other_share(fixed, state, kind, expert, at, to) <= share:
            new += fixed.type_token_T[kind]
    return new / every


@inlined
def growth(
    load_N: Floats,
    way_AGW: Ints,
    weight_AGW: Floats,
    source: int,
    device: int,
    tokens: float,
    scale: tuple[float, float, int],
) -> float:
    """How much the norms grow when these tokens go there, by their slope halfway.

    scale  1 / the links' norm, 1 / the devices' norm, doublings
    """
    per_norm, found = scale[1], 0.0
    for place in range(way_AGW.shape[2]):
        carrier = way_AGW[source, device, place]
        if carrier < 0:
            break
        more = tokens * weight_AGW[source, device, place]
        found += power((load_N[carrier] + 0.5 * more) * per_norm, scale[2]) * more
        per_norm = scale[0]
    return found


@compiled
def copies_growth(
    fixed: Fixed, state: State, expert: int, source: int, device: int, tokens: float, scale: tuple[float, float, int]
) -> float:
    """The same for links above hosts, where tokens travel once per host."""
    at, to = fixed.host_A[source], fixed.host_G[device]
    if at == to:
        return 0.0
    per_link, _, doublings = scale
    copies, found = tokens * crossing(fixed, state, expert, at, to), 0.0
    for place in range(fixed.upper_HHR.shape[2]):
        link = fixed.upper_HHR[at, to, place]
        if link < 0:
            break
        more = copies * fixed.link_cost_L[link]
        found += power((state.link_L[link] + 0.5 * more) * per_link, doublings) * more
    return found


@compiled
def put(fixed: Fixed, state: State, expert: int, portions: int, scale: tuple[float, float, int]) -> None:
    """Split an expert's tokens anew over its replicas, source by source and portion by portion.

    One source's flows are taken out at a time, with those of all others where they are: each makes room for the rest.

    Costs only grow while tokens are added, so an older one is a lower bound: a replica is weighed again only when it
    is the cheapest by what is known of it.

    portions  most for one source; few tokens go in fewer
    """
    load_N, share_EAP, replica_EP, replicas = state.load_N, state.share_EAP, state.replica_EP, state.count_E[expert]
    token_AE, way_AGW, weight_AGW, dedup = fixed.token_AE, fixed.way_AGW, fixed.weight_AGW, fixed.dedup
    host_token_H = _host_tokens(fixed, expert)
    least_P, when_P = np.empty(replicas), np.empty(replicas, np.int64)
    for source in range(token_AE.shape[0]):
        tokens = token_AE[source, expert]
        if tokens <= 0.0 or (replicas == 1 and share_EAP[expert, source, 0] == 1.0):
            continue
        steps = 1 if replicas == 1 else min(portions, 1 + int(0.5 * portions * tokens / fixed.even_tokens))
        portion, part = tokens / steps, 1.0 / steps
        for place in range(replicas):
            share, device = share_EAP[expert, source, place], replica_EP[expert, place]
            if share > 0.0:
                share_EAP[expert, source, place] = 0.0
                flow(load_N, way_AGW, weight_AGW, source, device, -tokens * share)
                if dedup:
                    _serve(fixed, state, expert, source, device, -tokens * share / host_token_H[fixed.host_A[source]])
        least_P[:] = 0.0
        when_P[:] = -1
        for step in range(steps):
            chosen = 0
            while replicas > 1:
                chosen = _least_place(least_P)
                if when_P[chosen] == step:
                    break
                device = replica_EP[expert, chosen]
                least_P[chosen] = growth(load_N, way_AGW, weight_AGW, source, device, portion, scale)
                if dedup:
                    least_P[chosen] += copies_growth(fixed, state, expert, source, device, portion, scale)
                when_P[chosen] = step
            share_EAP[expert, source, chosen] += part
            best = replica_EP[expert, chosen]
            flow(load_N, way_AGW, weight_AGW, source, best, portion)
            if dedup:
                _serve(fixed, state, expert, source, best, portion / host_token_H[fixed.host_A[source]])


@compiled
def drop(fixed: Fixed, state: State, expert: int, device: int) -> None:
    """Give a replica up with its flows; what it served is nobody's until `put`."""
    host_token_H, last, place = _host_tokens(fixed, expert), state.count_E[expert] - 1, 0
    load_N, share_EAP, token_AE = state.load_N, state.share_EAP, fixed.token_AE
    way_AGW, weight_AGW = fixed.way_AGW, fixed.weight_AGW
    while state.replica_EP[expert, place] != device:
        place += 1
    for source in range(token_AE.shape[0]):
        tokens = token_AE[source, expert] * share_EAP[expert, source, place]
        if tokens > 0.0:
            flow(load_N, way_AGW, weight_AGW, source, device, -tokens)
            if fixed.dedup:
                _serve(fixed, state, expert, source, device, -tokens / host_token_H[fixed.host_A[source]])
        share_EAP[expert, source, place] = share_EAP[expert, source, last]
        share_EAP[expert, source, last] = 0.0
    hold(fixed, state, expert, device, -1)


@compiled
def _host_tokens(fixed: Fixed, expert: int) -> Floats:
    """Tokens of every host for the expert; empty where copies are not merged."""
    host_token_H = np.zeros(fixed.upper_HHR.shape[0] if fixed.dedup else 0)
    for source in range(fixed.token_AE.shape[0] if fixed.dedup else 0):
        host_token_H[fixed.host_A[source]] += fixed.token_AE[source, expert]
    return host_token_H


@inlined
def _least_place(least_P: Floats) -> int:
    chosen = 0
    for place in range(1, len(least_P)):
        if least_P[place] < least_P[chosen]:
            chosen = place
    return chosen


@compiled
def put_near(fixed: Fixed, state: State, expert: int) -> None:
    """Split an expert's tokens evenly over the replicas on the source's host, or over all where it has none."""
    replicas = state.count_E[expert]
    for source in range(fixed.token_AE.shape[0]):
        near = 0
        for place in range(replicas):
            near += fixed.host_G[state.replica_EP[expert, place]] == fixed.host_A[source]
        for place in range(replicas):
            device = state.replica_EP[expert, place]
            share = 1.0 / replicas
            if near:
                share = 1.0 / near if fixed.host_G[device] == fixed.host_A[source] else 0.0
            state.share_EAP[expert, source, place] = share
            if share > 0.0:
                tokens = fixed.token_AE[source, expert] * share
                flow(state.load_N, fixed.way_AGW, fixed.weight_AGW, source, device, tokens)
    if fixed.dedup:
        _near_host_share(fixed, state, expert)
        merge(fixed, state, expert)


@compiled
def _near_host_share(fixed: Fixed, state: State, expert: int) -> None:
    """Shares of hosts from the shares of sources."""
    state.host_share_EHH[expert] = 0.0
    host_token_H = _host_tokens(fixed, expert)
    for source in range(fixed.token_AE.shape[0]):
        at = fixed.host_A[source]
        for place in range(state.count_E[expert]):
            to = fixed.host_G[state.replica_EP[expert, place]]
            if to != at and host_token_H[at] > 0.0:
                part = fixed.token_AE[source, expert] / host_token_H[at]
                state.host_share_EHH[expert, at, to] += part * state.share_EAP[expert, source, place]


@compiled
def _serve(fixed: Fixed, state: State, expert: int, source: int, device: int, more: float) -> None:
    """Serve more of the source's host's tokens at the device's host: copies that this makes above the hosts."""
    at, to = fixed.host_A[source], fixed.host_G[device]
    if at == to:
        return
    before = state.host_share_EHH[expert, at, to]
    after = before + more
    tokens = 0.0
    for place in range(fixed.type_start_EH[expert, at], fixed.type_stop_EH[expert, at]):
        kind = fixed.type_of_X[place]
        other = other_share(fixed, state, kind, expert, at, to)
        tokens += fixed.type_token_T[kind] * (max(after, other) - max(before, other))
    state.host_share_EHH[expert, at, to] = after
    for place in range(fixed.upper_HHR.shape[2]):
        link = fixed.upper_HHR[at, to, place]
        if link < 0:
            break
        state.link_L[link] += tokens * fixed.link_cost_L[link]


@compiled
def sync_with_first(fixed: Fixed, state: State, expert: int, sign: int) -> None:
    """Add (or drop) the gradients' ways between all replicas and the first device that holds one: its home is there."""
    count, home = state.count_E[expert], len(fixed.slot_G)
    for replica in range(count):
        home = min(home, state.replica_EP[expert, replica])
    for replica in range(count):
        _both_ways(fixed.pair_route_GGR, fixed.sync_cost_L, state.sync_L, home, state.replica_EP[expert, replica], sign)


@inlined
def _both_ways(route_GGR: Ints, cost_L: Floats, load_L: Floats, home: int, device: int, sign: int) -> None:
    for place in range(route_GGR.shape[2] if device != home else 0):
        for link in (route_GGR[home, device, place], route_GGR[device, home, place]):
            if link >= 0:
                load_L[link] += sign * cost_L[link]


@inlined
def _leave(member_N: Ints, end: int, member: int) -> None:
    """Fill the place of what leaves with the last one."""
    for place in range(end + 1):
        if member_N[place] == member:
            member_N[place] = member_N[end]
            break


@compiled
def hold(fixed: Fixed, state: State, expert: int, device: int, sign: int) -> None:
    """Add (or drop) a replica: its slot, its gradients' way home, its copying. Flows are the caller's."""
    home, nearest = fixed.home_E[expert], fixed.nearest_EG[expert, device]
    gradients = len(fixed.sync_cost_L) > 0 and fixed.sync_cost_L[0] > 0.0
    if gradients and home < 0:
        sync_with_first(fixed, state, expert, -1)
    count, used = state.count_E[expert], state.used_G[device]
    if sign > 0:
        state.resident_GC[device, used] = expert
        state.replica_EP[expert, count] = device
        for source in range(state.share_EAP.shape[1]):
            state.share_EAP[expert, source, count] = 0.0
    else:
        _leave(state.resident_GC[device], used - 1, expert)
        _leave(state.replica_EP[expert], count - 1, device)
    state.held_EG[expert, device] = sign > 0
    state.count_E[expert], state.used_G[device] = count + sign, used + sign
    if gradients and home < 0:
        sync_with_first(fixed, state, expert, 1)
    elif gradients:
        _both_ways(fixed.pair_route_GGR, fixed.sync_cost_L, state.sync_L, home, device, sign)
    if nearest >= 0:
        state.new_1[0] += sign
        route_GGR, move_cost_L, move_L = fixed.pair_route_GGR, fixed.move_cost_L, state.move_L
        for place in range(route_GGR.shape[2] if move_cost_L[0] > 0.0 else 0):
            link = route_GGR[nearest, device, place]
            if link >= 0:
                move_L[link] += sign * move_cost_L[link]
