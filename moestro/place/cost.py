"""Seconds of one sparse layer under a placement: compute, exchange, replicas' gradients, moving experts.

    Layer (network, tokens, costs) + Placement (who holds, who serves) -> step_time -> StepTime

    exchange   exchanges x crowding x bytes / bandwidth of the busiest link (dispatch, combine, and back: 4)
    compute    passes x tokens / speed of the slowest device (forward once, backward twice: 3)
    gradients  every replica beside the home sends its gradient home and gets weights back, `sync_share` not hidden
    moving     bytes of new replicas over the busiest link, paid once, spread over `horizon_steps`

With token sets given, a token crosses to a host once, however many of its experts are there: links between hosts carry,
for each set, the largest of its experts' shares; ports inside hosts carry every copy. The dispatcher moves the same
bytes: `exchange_bytes` is compared with counted ones in the tests.

Dimension key:  S sources (devices)   E experts   G devices   P replicas of an expert   L links
                A groups of sources with one split   H hosts   R replicas of all experts
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moestro.cluster.links import Links
from moestro.core.errors import PlacementError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TokenSet:
    """Tokens of one host that chose exactly these experts."""

    host: int
    experts: tuple[int, ...]
    tokens: float


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a placement is judged by."""

    links: Links
    token_SE: Floats
    """Routed (token, expert) pairs of every source device in one step."""
    tokens_per_s_G: Floats
    """Forward speed of every device on expert rows."""
    slot_G: Ints
    """Most experts a device can hold; see `slots_that_fit`."""
    token_bytes: float
    held_EG: Bools
    """The placement in force: homes are its first holders, moving starts from it."""
    gradient_bytes: float = 0.0
    """Of one expert, replica to home, each step."""
    state_bytes: float = 0.0
    """Of one expert: weights, master weights and both moments."""
    sync_share: float = 0.25
    homes_move: bool = False
    """An expert's home is the first holder of whatever placement is judged, as in training; not for bounds."""
    horizon_steps: float = 100.0
    exchanges: float = 4.0
    passes: float = 3.0
    sets: Sequence[TokenSet] = ()
    """Which experts tokens chose together; empty means that every copy is sent."""

    def __post_init__(self) -> None:
        sources, experts = self.token_SE.shape
        if sources != self.links.devices:
            raise PlacementError(
                f"the trace counts tokens of {sources} ranks, the cluster has {self.links.devices} devices; "
                "give the cluster that the ranks run on"
            )
        if not (np.isfinite(self.token_SE).all() and (self.token_SE >= 0).all()):
            raise PlacementError("token counts are negative or not finite; record the trace again")
        if self.held_EG.shape != (experts, sources):
            raise PlacementError(
                f"the placement in force has shape {self.held_EG.shape}, the layer needs {(experts, sources)}: "
                "it belongs to another model or cluster"
            )
        if int(self.slot_G.sum()) < experts:
            raise PlacementError(
                f"{int(self.slot_G.sum())} slots cannot hold {experts} experts; give devices more slots or memory"
            )
        if not (np.isfinite(self.tokens_per_s_G).all() and (self.tokens_per_s_G > 0).all()):
            raise PlacementError("a device's speed is not above 0; correct tokens_per_s")

    @cached_property
    def home_E(self) -> Ints:
        """Where an expert's optimiser lives: its first holder; -1 where that is not fixed."""
        return np.asarray(-np.ones(len(self.held_EG), np.int64) if self.homes_move else self.held_EG.argmax(axis=1))

    @cached_property
    def nearest_EG(self) -> Ints:
        """The holder that a device would copy an expert from; -1 where it holds it."""
        rate_GG = self.links.path_bytes_per_s_GG
        found_EG = np.repeat(self.held_EG.argmax(axis=1)[:, None], len(rate_GG), axis=1)
        for expert in np.flatnonzero(self.held_EG.sum(axis=1) > 1):
            holders = np.flatnonzero(self.held_EG[expert])
            found_EG[expert] = holders[np.argmax(rate_GG[holders], axis=0)]
        return np.where(self.held_EG, -1, found_EG)

    @property
    def latency_s(self) -> float:
        """Of all exchanges of a step."""
        return self.exchanges * self.links.latency_s


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Who holds an expert, and what share of each source's tokens each holder serves."""

    device_EP: Ints
    """Holders of each expert; -1 fills up."""
    share_AEP: Floats
    """Sums to 1 over P."""
    group_S: Ints
    """Which row of share_AEP a source follows."""
    devices: int

    def __post_init__(self) -> None:
        lost = np.flatnonzero((self.device_EP >= 0).sum(axis=1) == 0)
        if lost.size:
            raise PlacementError(f"expert {lost[0]} has no replica; every expert needs one")

    @property
    def held_EG(self) -> Bools:
        """Whether a device holds an expert."""
        held_EG = np.zeros((len(self.device_EP), self.devices), bool)
        expert_R, place_R = np.nonzero(self.device_EP >= 0)
        held_EG[expert_R, self.device_EP[expert_R, place_R]] = True
        return held_EG

    @property
    def replicas(self) -> int:
        """Slots in use."""
        return int((self.device_EP >= 0).sum())

    def flow_SG(self, token_SE: Floats) -> Floats:
        """Rows that go from each source to each device."""
        expert_R, place_R = np.nonzero(self.device_EP >= 0)
        device_R = self.device_EP[expert_R, place_R]
        order_R = np.argsort(device_R, kind="stable")
        expert_R, place_R, device_R = expert_R[order_R], place_R[order_R], device_R[order_R]
        rows_SR = token_SE[:, expert_R] * self.share_AEP[:, expert_R, place_R][self.group_S]
        flow_SG = np.zeros((len(token_SE), self.devices))
        used_U, start_U = np.unique(device_R, return_index=True)
        flow_SG[:, used_U] = np.add.reduceat(rows_SR, start_U, axis=1)
        return flow_SG


def even_split(held_EG: Bools) -> Placement:
    """Every holder of an expert serves the same share of everybody's tokens: what EPLB assumes."""
    count_E = held_EG.sum(axis=1)
    place_EP = np.arange(int(count_E.max())) < count_E[:, None]
    device_EP = np.full(place_EP.shape, -1, np.int64)
    device_EP[place_EP] = np.nonzero(held_EG)[1]
    share_AEP = (place_EP / np.maximum(count_E, 1)[:, None])[None]
    devices = held_EG.shape[1]
    return Placement(device_EP=device_EP, share_AEP=share_AEP, group_S=np.zeros(devices, np.int64), devices=devices)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step, by cause."""

    exchange_s: float
    compute_s: float
    sync_s: float
    move_s: float
    latency_s: float

    @property
    def total_s(self) -> float:
        """Their sum."""
        return self.exchange_s + self.compute_s + self.sync_s + self.move_s + self.latency_s


def step_time(layer: Layer, placement: Placement) -> StepTime:
    """What a step takes."""
    rate_L = layer.links.bytes_per_s_L
    flow_SG = placement.flow_SG(layer.token_SE)
    load_G = flow_SG.sum(axis=0)
    return StepTime(
        exchange_s=layer.exchanges
        * _longest(_dispatched_bytes(layer, placement, flow_SG) / layer.links.exchange_bytes_per_s_L),
        compute_s=layer.passes * _longest(load_G / layer.tokens_per_s_G),
        sync_s=layer.sync_share * _longest(sync_bytes(layer, placement.held_EG) / rate_L),
        move_s=_longest(move_bytes(layer, placement.held_EG) / rate_L) / layer.horizon_steps,
        latency_s=layer.latency_s,
    )


def _longest(seconds_N: Floats) -> float:
    return float(seconds_N.max(initial=0.0))


def exchange_bytes(layer: Layer, placement: Placement) -> Floats:
    """Bytes of one dispatch on every link; the combine takes the same ways back."""
    return _dispatched_bytes(layer, placement, placement.flow_SG(layer.token_SE))


def _dispatched_bytes(layer: Layer, placement: Placement, flow_SG: Floats) -> Floats:
    links = layer.links
    bytes_L = links.sums(flow_SG) * layer.token_bytes
    if layer.sets:
        bytes_L[links.above_L] = _merged_bytes(layer, placement)[links.above_L]
    return bytes_L


def host_share_EHH(layer: Layer, placement: Placement) -> Floats:
    """Share of a host's tokens for an expert that each host serves."""
    links = layer.links
    to_EPH = np.where(placement.device_EP[:, :, None] < 0, 0.0, np.eye(links.hosts)[links.host_G[placement.device_EP]])
    share_EHH = np.zeros((len(placement.device_EP), links.hosts, links.hosts))
    for source, tokens_E in enumerate(layer.token_SE):
        served_EH = np.einsum("ep,eph->eh", placement.share_AEP[placement.group_S[source]], to_EPH)
        share_EHH[:, links.host_G[source]] += tokens_E[:, None] * served_EH
    total_HE = np.zeros((links.hosts, layer.token_SE.shape[1]))
    np.add.at(total_HE, links.host_G, layer.token_SE)
    return np.asarray(share_EHH / np.maximum(total_HE.T, 1e-300)[:, :, None])


def _merged_bytes(layer: Layer, placement: Placement) -> Floats:
    links, share_EHH = layer.links, host_share_EHH(layer, placement)
    crossing_HH = np.zeros((links.hosts, links.hosts))
    for one in layer.sets:
        crossing_HH[one.host] += one.tokens * share_EHH[list(one.experts), one.host].max(axis=0)
    np.fill_diagonal(crossing_HH, 0.0)
    first_H = np.array([int(np.argmax(links.host_G == host)) for host in range(links.hosts)])
    amount_GG = np.zeros((links.devices, links.devices))
    amount_GG[np.ix_(first_H, first_H)] = crossing_HH * layer.token_bytes
    return links.sums(amount_GG)


def sync_bytes(layer: Layer, held_EG: Bools) -> Floats:
    """Bytes on every link for the replicas' gradients, and the weights that come back."""
    expert_R, device_R = np.nonzero(held_EG)
    home_R = (held_EG.argmax(axis=1) if layer.homes_move else layer.home_E)[expert_R]
    away = home_R != device_R
    amount_GG = np.zeros((layer.links.devices,) * 2)
    np.add.at(amount_GG, (device_R[away], home_R[away]), layer.gradient_bytes)
    return layer.links.sums(amount_GG + amount_GG.T)


def move_bytes(layer: Layer, held_EG: Bools) -> Floats:
    """Bytes on every link to bring the new replicas, each from its nearest holder."""
    expert_R, device_R = np.nonzero(held_EG & ~layer.held_EG)
    amount_GG = np.zeros((layer.links.devices,) * 2)
    np.add.at(amount_GG, (layer.nearest_EG[expert_R, device_R], device_R), layer.state_bytes)
    return layer.links.sums(amount_GG)


def slots_that_fit(links: Links, expert_bytes: float, other_bytes: float) -> Ints:
    """Experts that each device's memory holds beside `other_bytes`; raises PlacementError where not even one fits."""
    if not links.memory_bytes_G.size:
        raise PlacementError(
            "the cluster does not say how much memory its devices have; give device.memory_gib or slots"
        )
    slot_G = np.floor((links.memory_bytes_G - other_bytes) / expert_bytes).astype(np.int64)
    if (slot_G < 1).any():
        device = int(np.argmin(slot_G))
        have, need = links.memory_bytes_G[device] / 2**30, (other_bytes + expert_bytes) / 2**30
        raise PlacementError(
            f"device {device} has {have:.1f} GiB, one replica and the rest need {need:.1f} GiB; "
            "use fewer layers per device"
        )
    return slot_G


def contiguous(num_experts: int, slot_G: Ints) -> Bools:
    """Plain expert parallelism: expert e on device e G / E, on the next one with room where that is full."""
    devices = len(slot_G)
    held_EG, left_G = np.zeros((num_experts, devices), bool), slot_G.copy()
    for expert in range(num_experts):
        device = expert * devices // num_experts
        while left_G[device] == 0:
            device = (device + 1) % devices
        held_EG[expert, device] = True
        left_G[device] -= 1
    return held_EG
