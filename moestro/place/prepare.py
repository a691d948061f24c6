"""From a layer to the arrays of a search, and from its state back to a placement.

    Layer -> fixed_arrays -> Fixed -> spread / loaded -> State -> placement_of

Up to `SEPARATE` devices every device is a source of its own. Beyond, a host's devices are taken together: a router
sends much the same from each of them, and a source's own port is the one link that placement hardly changes.

Dimension key:  A sources (devices or hosts)   E experts   G devices   L links   R places of a route   H hosts
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moestro.cluster.links import Links
from moestro.core.errors import PlacementError
from moestro.place.compiled import compiled
from moestro.place.cost import Layer, Placement
from moestro.place.state import MOST_REPLICAS, Fixed, Floats, Ints, State, empty_state, hold, put_near

SEPARATE = 16
"""Most devices that are sources of their own."""
NO_LIMIT = 2**40


def group_sources(links: Links) -> Ints:
    """Which group of sources each device belongs to."""
    return np.arange(links.devices) if links.devices <= SEPARATE else links.host_G


def fixed_arrays(layer: Layer, most_new: int = NO_LIMIT, serial: bool = False) -> Fixed:
    """Everything a search reads.

    serial  charge every copied replica as if copies went one after another over the thinnest link
    """
    links = layer.links
    group_S = group_sources(links)
    token_AE = np.zeros((int(group_S.max()) + 1, layer.token_SE.shape[1]))
    np.add.at(token_AE, group_S, layer.token_SE)
    route_AGR, part_AGR, way_AGW, part_AGW = _grouped_routes(_Keyed(links), bool(layer.sets))
    first_G = np.array([int(np.argmax(links.host_G == host)) for host in range(links.hosts)])
    upper_HHR = links.route_GGR[np.ix_(first_G, first_G)]
    upper_HHR = -np.sort(-np.where((upper_HHR >= 0) & links.above_L[upper_HHR], upper_HHR, -1), axis=2)
    start_EH, stop_EH, type_X, expert_TK, token_T = _token_types(layer)
    rate_L = links.bytes_per_s_L
    link_cost_L = layer.exchanges * layer.token_bytes / links.exchange_bytes_per_s_L
    device_cost_G = layer.passes / layer.tokens_per_s_G
    weight_AGW = part_AGW * np.append(link_cost_L, device_cost_G)[way_AGW]
    return Fixed(
        token_AE=token_AE,
        even_tokens=max(float(token_AE.mean()), 1e-30),
        route_AGR=route_AGR,
        part_AGR=part_AGR,
        way_AGW=way_AGW,
        weight_AGW=weight_AGW,
        link_cost_L=link_cost_L,
        device_cost_G=device_cost_G,
        slot_G=np.ascontiguousarray(layer.slot_G, np.int64),
        pair_route_GGR=np.ascontiguousarray(links.route_GGR),
        sync_cost_L=layer.sync_share * layer.gradient_bytes / rate_L,
        move_cost_L=layer.state_bytes / layer.horizon_steps / rate_L,
        home_E=np.ascontiguousarray(layer.home_E, np.int64),
        nearest_EG=np.ascontiguousarray(layer.nearest_EG),
        host_A=np.ascontiguousarray(links.host_G) if len(token_AE) == links.devices else np.arange(links.hosts),
        host_G=np.ascontiguousarray(links.host_G),
        upper_HHR=np.ascontiguousarray(upper_HHR),
        type_start_EH=start_EH.copy(),
        type_stop_EH=stop_EH.copy(),
        type_of_X=type_X,
        type_expert_TK=expert_TK,
        type_token_T=token_T,
        dedup=bool(layer.sets),
        most_new=most_new,
        new_cost=layer.state_bytes / layer.horizon_steps / float(rate_L.min()) if serial else 0.0,
    )


class _Keyed:
    """Links as a key of a cache: the same object gives the same routes."""

    def __init__(self, links: Links) -> None:
        self.links = links

    def __hash__(self) -> int:
        return id(self.links)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and other.links is self.links


@lru_cache(maxsize=4)
def _grouped_routes(keyed: _Keyed, without_above: bool) -> tuple[Ints, Floats, Ints, Floats]:
    """route_AGR and the share of the group's tokens on each link, and both with the device before the route.

    Links of one source alone are left out of groups.
    """
    links = keyed.links
    route_GGR = links.route_GGR
    if without_above:
        route_GGR = -np.sort(-np.where((route_GGR >= 0) & links.above_L[route_GGR], -1, route_GGR), axis=2)
    group_S = group_sources(links)
    devices, sources, total = links.devices, int(group_S.max()) + 1, len(links.names)
    size_A = np.bincount(group_S)
    s, g, place = np.nonzero(route_GGR >= 0)
    key, users = np.unique((group_S[s] * devices + g) * total + route_GGR[s, g, place], return_counts=True)
    pair, link = np.divmod(key, total)
    keep = (users > 1) | (size_A[pair // devices] <= 2)
    pair, link, users = pair[keep], link[keep], users[keep]
    start_P = np.searchsorted(pair, np.arange(sources * devices))
    column = np.arange(len(pair)) - start_P[pair]
    longest = int(column.max(initial=0)) + 1
    route_AGR, part_AGR = np.full((sources, devices, longest), -1, np.int64), np.ones((sources, devices, longest))
    route_AGR.reshape(-1, longest)[pair, column] = link
    part_AGR.reshape(-1, longest)[pair, column] = users / size_A[pair // devices]
    device_AG1 = np.broadcast_to(total + np.arange(devices)[:, None], (sources, devices, 1))
    way_AGW = np.concatenate([device_AG1, route_AGR], axis=2)
    return route_AGR, part_AGR, way_AGW, np.concatenate([np.ones((sources, devices, 1)), part_AGR], axis=2)


def _token_types(layer: Layer) -> tuple[Ints, Ints, Ints, Ints, Floats]:
    """Token sets by expert and host: start_EH, stop_EH, type_of_X, type_expert_TK, type_token_T."""
    experts, hosts, sets = layer.token_SE.shape[1], layer.links.hosts, layer.sets
    widest = max((len(one.experts) for one in sets), default=1)
    expert_TK = np.full((max(len(sets), 1), widest), -1, np.int64)
    token_T = np.zeros(max(len(sets), 1))
    for kind, one in enumerate(sets):
        expert_TK[kind, : len(one.experts)] = one.experts
        token_T[kind] = one.tokens
    host_T = np.array([one.host for one in sets], np.int64)
    kind_X, place_X = np.nonzero(expert_TK[: len(sets)] >= 0)
    key_X = expert_TK[kind_X, place_X] * hosts + host_T[kind_X] if len(sets) else np.zeros(0, np.int64)
    order_X = np.argsort(key_X, kind="stable")
    bounds = np.searchsorted(key_X[order_X], np.arange(experts * hosts + 1))
    type_X = kind_X[order_X] if len(sets) else np.zeros(1, np.int64)
    return bounds[:-1].reshape(experts, hosts), bounds[1:].reshape(experts, hosts), type_X, expert_TK, token_T


def spread(token_E: Floats, speed_G: Floats, slot_G: Ints, host_G: Ints) -> NDArray[np.bool_]:
    """held_EG: slots to the experts with most tokens per replica, replicas to hosts without one."""
    held_EG = np.zeros((len(token_E), len(slot_G)), np.uint8)
    count_E = _replicas(token_E, int(slot_G.sum()), min(len(slot_G), MOST_REPLICAS))
    each_E = token_E / count_E
    order_E, left_G, load_G = np.argsort(-each_E, kind="stable"), slot_G.copy(), np.zeros(len(slot_G))
    on_EH = np.zeros((len(token_E), int(host_G.max()) + 1), np.int64)
    for more_E in (np.ones_like(count_E), count_E - 1):  # every expert once, then its further replicas
        _hand_out(order_E, more_E, each_E, speed_G, host_G, left_G, load_G, on_EH, held_EG)
    return held_EG.astype(bool)


@compiled
def _replicas(token_E: Floats, slots: int, most: int) -> Ints:
    """Slots, one after another, to the expert with most tokens per replica."""
    count_E = np.ones(len(token_E), np.int64)
    for _ in range(slots - len(token_E)):
        hottest, top = -1, 0.0
        for expert in range(len(token_E)):
            if count_E[expert] < most and token_E[expert] / count_E[expert] > top:
                hottest, top = expert, token_E[expert] / count_E[expert]
        if hottest < 0:
            break
        count_E[hottest] += 1
    return count_E


@compiled
def _hand_out(  # noqa: PLR0913, PLR0917
    order_E: Ints,
    more_E: Ints,
    each_E: Floats,
    speed_G: Floats,
    host_G: Ints,
    left_G: Ints,
    load_G: Floats,
    on_EH: Ints,
    held_EG: NDArray[np.uint8],
) -> None:
    """So many more replicas of every expert, each to the least loaded device of the hosts with fewest of them."""
    for expert in order_E:
        for _ in range(more_E[expert]):
            best, fewest, least = -1, 0, 0.0
            for device in range(len(left_G)):
                if left_G[device] == 0 or held_EG[expert, device]:
                    continue
                near, load = on_EH[expert, host_G[device]], load_G[device] / speed_G[device]
                if best < 0 or near < fewest or (near == fewest and load < least):
                    best, fewest, least = device, near, load
            if best >= 0:
                held_EG[expert, best] = 1
                on_EH[expert, host_G[best]] += 1
                left_G[best] -= 1
                load_G[best] += each_E[expert]


@compiled
def load(fixed: Fixed, state: State, held_EG: NDArray[np.uint8]) -> None:
    """Put every expert's replicas and flows into an empty state, each source to the replicas near it."""
    for expert in range(held_EG.shape[0]):
        for device in range(held_EG.shape[1]):
            if held_EG[expert, device]:
                hold(fixed, state, expert, device, 1)
        put_near(fixed, state, expert)


def loaded(fixed: Fixed, held_EG: NDArray[np.bool_]) -> State:
    """The state of a placement, its split near first.

    raises PlacementError when an expert has more replicas than the search keeps track of, or a device than slots
    """
    state = empty_state(fixed)
    most = state.replica_EP.shape[1]
    if (held_EG.sum(axis=1) > most).any():
        raise PlacementError(f"an expert has more than {most} replicas; give it fewer")
    over_G = held_EG.sum(axis=0) > fixed.slot_G
    if over_G.any():
        device = int(over_G.argmax())
        raise PlacementError(
            f"device {device} holds {held_EG[:, device].sum()} replicas and has {fixed.slot_G[device]} slots; "
            "give it more slots or fewer replicas"
        )
    load(fixed, state, held_EG.astype(np.uint8))
    return state


def placement_of(layer: Layer, state: State) -> Placement:
    """Holders and shares of a state."""
    most = int(state.count_E.max())
    place_EP = np.arange(most) < state.count_E[:, None]
    device_EP = np.where(place_EP, state.replica_EP[:, :most], -1)
    share_EAP = state.share_EAP[:, :, :most] * place_EP[:, None, :]
    total_EA = share_EAP.sum(axis=2)
    expert_N, source_N = np.nonzero(total_EA == 0)
    share_EAP[expert_N, source_N] = place_EP[expert_N]
    total_EA[expert_N, source_N] = state.count_E[expert_N]
    share_AEP = np.ascontiguousarray((share_EAP / total_EA[:, :, None]).transpose(1, 0, 2))
    return Placement(
        device_EP=device_EP, share_AEP=share_AEP, group_S=group_sources(layer.links), devices=layer.links.devices
    )
