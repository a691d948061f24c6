"""The network that experts are balanced on: read, probed or assumed, and cut to one expert group.

    cluster.toml | probe | equal links -> network_of -> Links of the ranks of dist.ep
    now and then LinkWatch.changed -> probe again

Dimension key:  G devices   L links   R places of a route
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from moestro.cluster.links import Links, links_of
from moestro.cluster.probe import measure, probe
from moestro.cluster.topology import Cluster, DeviceSpec, LevelSpec, read_cluster
from moestro.core.errors import ClusterError
from moestro.dist.mesh import Mesh, swap_between_all
from moestro.nn.moe import MoE
from moestro.nn.permute import sort_by_expert
from moestro.train.balance_spec import BalanceSpec

PROBED_RANKS = 16
"""Most ranks that are probed: every ordered pair takes its turn."""
PROBE_BYTES = 1 << 18
PROBE_REPEATS = 2
WATCH_BYTES = 1 << 15
"""From every rank to every other, to see whether links are what they were."""
WATCH_REPEATS = 2
CHANGED = 2.0
"""Times slower or faster from which links are probed anew."""
EQUAL_GB_PER_S = 2.0
"""Between all ranks where nothing is known: what gloo moves on one machine."""
ROWS = 512
"""Rows of one expert that its speed is measured with."""
REPEATS = 5
ANY = DeviceSpec(name="rank", memory_gib=1.0, memory_gb_per_s=10.0, peak_tflops={"fp32": 0.1})


@dataclass(frozen=True, slots=True)
class Network:
    """What is known of the ranks of one expert group."""

    links: Links
    known_memory: bool
    """Whether memory_bytes_G are real."""
    source: str
    """For people: where it comes from."""
    probed: bool = False
    """Whether it was measured, so that it is measured again when it changes."""


def network_of(spec: BalanceSpec, mesh: Mesh, first: Callable[[Callable[[], Links]], Links]) -> Network:
    """Called by all ranks together; raises ConfigError or ClusterError, the same on all.

    first   lets the leader work and all have the result (`Engine.first`)
    """
    world, groups = mesh.layout.world, mesh.layout.groups("ep")
    if spec.cluster:
        links = first(lambda: _read(Path(spec.cluster), world, len(groups[0])))
        return Network(links if links.devices == len(groups[0]) else of_group(links, groups), True, spec.cluster)
    if world > PROBED_RANKS:
        return Network(_equal(len(groups[0])), False, f"equal links assumed, {world} ranks are too many to probe")
    try:
        return Network(probed(mesh), False, f"probed between {world} ranks", probed=True)
    except ClusterError as error:
        return Network(_equal(len(groups[0])), False, f"equal links assumed, the probe failed: {error}")


def probed(mesh: Mesh) -> Links:
    """Links of the first expert group as they are now; called by all ranks together, may raise ClusterError on all."""
    measured = measure(PROBE_BYTES, PROBE_REPEATS, swap_between_all, lambda text: None)
    links = links_of(probe(measured, ANY, "ranks").cluster, mesh.layout.world)
    return of_group(links, mesh.layout.groups("ep"))


class LinkWatch:
    """Notices when exchanges take longer, or less long, than when links were measured; called by all ranks together."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.usual_s = self._round_s()

    def changed(self) -> float:
        """How many times slower an exchange is than it was, where that is much (or much less); else 0."""
        now_s = self._round_s()
        times = now_s / self.usual_s
        if 1 / CHANGED < times < CHANGED:
            return 0.0
        self.usual_s = now_s
        return times

    def _round_s(self) -> float:
        """Of one exchange between all ranks: the slowest rank's time, the best of some rounds."""
        world, parts = self.mesh["world"], [WATCH_BYTES // 4] * self.mesh.layout.world
        out, best_s = torch.zeros(sum(parts), device=self.mesh.device), float("inf")
        for _ in range(WATCH_REPEATS):
            world.sum(out[:1])  # all begin together
            begun_s = time.perf_counter()
            world.begin_swap(out, parts, parts).wait()[0].item()
            spent = torch.tensor([time.perf_counter() - begun_s], dtype=torch.float64, device=self.mesh.device)
            best_s = min(best_s, float(world.gather_even(spent).max()))
        return best_s


def _read(path: Path, world: int, group: int) -> Links:
    """The cluster's links for all ranks, or for one expert group where it has only so many devices."""
    park = read_cluster(path)
    if park.most_devices >= world:
        return links_of(park, world)
    if park.most_devices == group:
        return links_of(park, group)
    raise ClusterError(
        f"{path} has {park.most_devices:g} devices; the run has {world} ranks, {group} in an expert group: describe "
        "the machines it runs on, or leave balance.cluster out"
    )


def _equal(devices: int) -> Links:
    level = LevelSpec(name="network", fan_out=devices, gb_per_s=EQUAL_GB_PER_S)
    return links_of(Cluster(name="equal links", device=ANY, network=(level,)), devices)


def of_group(links: Links, groups: list[list[int]]) -> Links:
    """The first group's part of the network; links that several groups use give each its share."""
    users_L = np.zeros(len(links.names))
    for ranks in groups:
        used = np.unique(links.route_GGR[np.ix_(ranks, ranks)])
        users_L[used[used >= 0]] += 1
    ranks = groups[0]
    return replace(
        links,
        host_G=np.unique(links.host_G[ranks], return_inverse=True)[1].astype(np.int64),
        bytes_per_s_L=links.bytes_per_s_L / np.maximum(users_L, 1),
        route_GGR=links.route_GGR[np.ix_(ranks, ranks)],
        speed_G=links.speed_G[ranks] if links.speed_G.size else links.speed_G,
        memory_bytes_G=links.memory_bytes_G[ranks] if links.memory_bytes_G.size else links.memory_bytes_G,
    )


@torch.no_grad()
def rows_per_s(moe: MoE, dtype: torch.dtype, mesh: Mesh) -> float:
    """Rows that a rank passes forward through an expert in a second: the median over ranks, which measure at once."""
    device = mesh.device
    x_TD = torch.zeros(ROWS, moe.experts.width, dtype=dtype, device=device)
    weight_TK = torch.ones(ROWS, 1, device=device)
    order = sort_by_expert(torch.zeros(ROWS, 1, dtype=torch.int64, device=device), moe.experts.num_experts)
    spent_s = []
    for _ in range(REPEATS + 1):
        begun_s = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            y_TD = moe.experts(x_TD, weight_TK, order, moe.fastest_path(x_TD))
        y_TD[0, 0].item()  # waits for the device
        spent_s.append(time.perf_counter() - begun_s)
    own = torch.tensor([ROWS / sorted(spent_s[1:])[REPEATS // 2]], dtype=torch.float64, device=device)
    return float(mesh["world"].gather_even(own).median())
