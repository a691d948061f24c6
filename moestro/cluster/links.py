"""Every link of a machine park and the way from each device to each other: what placement counts bytes on.

    Cluster --links_of--> Links(names, bytes_per_s_L, route_GGR)      exceptions applied, rails followed

A device has a port into the lowest level; a unit of any level has one link out and one in, as wide as a full unit's
`sharing` says. Traffic from s to g climbs to the level that joins them and down again; on a rail level
it first hops inside the host to the device on g's rail, then crosses by that device's card.

Dimension key:  G devices   L links   R places of a route
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moestro.cluster.topology import Cluster, ExceptionSpec, LevelSpec
from moestro.core.errors import ClusterError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Links:
    """Directed links and routes between devices."""

    host_G: Ints
    names: tuple[str, ...]
    bytes_per_s_L: Floats
    above_L: NDArray[np.bool_]
    """True for links between hosts: a token's copies for one host may cross them once."""
    route_GGR: Ints
    """Links from the first device to the second; -1 fills up; a device reaches itself without any."""
    latency_s: float = 0.0
    """Of one exchange."""
    crowding: float = 1.0
    """See `Cluster.crowding`."""
    speed_G: Floats = field(default_factory=lambda: np.zeros(0))
    """Compute beside the cluster's device; empty means 1 everywhere."""
    memory_bytes_G: Floats = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {rate:g}"
            for name, rate in zip(self.names, self.bytes_per_s_L, strict=True)
            if not 0 < rate < float("inf")
        ]
        if wrong:
            raise ClusterError(f"bandwidth of link {wrong[0]} bytes/s; it must be above 0 and finite")
        off = ~np.eye(self.devices, dtype=bool)
        if self.devices > 1 and (lost := np.argwhere((self.route_GGR[:, :, 0] < 0) & off)).size:
            raise ClusterError(
                f"no link leads from device {lost[0][0]} to device {lost[0][1]}; describe the missing level"
            )

    @property
    def devices(self) -> int:
        """G."""
        return len(self.host_G)

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return int(self.host_G.max()) + 1

    @cached_property
    def path_bytes_per_s_GG(self) -> Floats:
        """The thinnest link of every route; infinite to oneself."""
        rate_L = np.append(self.bytes_per_s_L, np.inf)
        return np.asarray(rate_L[self.route_GGR].min(axis=2))

    @property
    def exchange_bytes_per_s_L(self) -> Floats:
        """What is left of every link's bandwidth when everybody exchanges with everybody."""
        return np.asarray(self.bytes_per_s_L / self.crowding)

    @cached_property
    def _ways(self) -> tuple[Ints, Ints]:
        """Every use of a link: the pair s * G + g, and the link."""
        pair_N = np.flatnonzero(self.route_GGR >= 0)
        return pair_N // self.route_GGR.shape[2], self.route_GGR.ravel()[pair_N]

    def sums(self, amount_GG: Floats) -> Floats:
        """What every link carries when amount_GG goes from device to device."""
        if not amount_GG.any():
            return np.zeros(len(self.names))
        pair_N, link_N = self._ways
        return np.bincount(link_N, amount_GG.ravel()[pair_N], minlength=len(self.names)).astype(np.float64)

    @cached_property
    def leaving_bytes_per_s_H(self) -> Floats:
        """What leaves each host in an exchange: its links above hosts that no other sends through; infinite without."""
        pair_N, link_N = self._ways
        source_N = self.host_G[pair_N // self.devices]
        uses_LH = np.zeros((len(self.names), self.hosts), bool)
        uses_LH[link_N, source_N] = True
        own_L = self.above_L & (uses_LH.sum(axis=1) == 1)
        rate_H = np.bincount(uses_LH[own_L].argmax(axis=1), self.exchange_bytes_per_s_L[own_L], minlength=self.hosts)
        return np.where(rate_H > 0, rate_H, np.inf)


def from_use(
    host_G: Ints, names: tuple[str, ...], bytes_per_s_L: Floats, use_LGG: NDArray[np.bool_], above_L: NDArray[np.bool_]
) -> Links:
    """Links from an explicit table: use_LGG says which links lie on the way from one device to another."""
    longest = max(int(use_LGG.sum(axis=0).max()), 1)
    order_GGL = np.argsort(~use_LGG.transpose(1, 2, 0), axis=2, kind="stable")[:, :, :longest]
    on_way = np.take_along_axis(use_LGG.transpose(1, 2, 0), order_GGL, axis=2)
    return Links(
        host_G=np.asarray(host_G, np.int64),
        names=names,
        bytes_per_s_L=np.asarray(bytes_per_s_L, float),
        above_L=np.asarray(above_L, bool),
        route_GGR=np.where(on_way, order_GGL, -1),
    )


def links_of(cluster: Cluster, devices: int = 0) -> Links:
    """All links of the first `devices` devices; 0 takes the whole park.

    raises ClusterError when the park is smaller, open without a number, or an exception names a unit it has not
    """
    unit_lG = _units(cluster, devices)
    total = unit_lG.shape[1]
    table = _Table(total)
    inner = host_place(cluster)
    for place, level in enumerate(cluster.network):
        below_G = unit_lG[place - 1] if place else np.arange(total)
        if level.rails and place == 1 and inner == 0:
            _rail_links(table, cluster, level, unit_lG[0])
        elif unit_lG[place].size and len(np.unique(below_G)) > 1:
            _tree_links(table, cluster, level, below_G, place)
    links = from_routes(table, unit_lG[inner])
    crossed = [
        level.latency_us for place, level in enumerate(cluster.network) if not place or len(set(unit_lG[place - 1])) > 1
    ]
    return replace(
        links,
        latency_s=max(crossed) * 1e-6,
        crowding=cluster.crowding,
        speed_G=_per_device(cluster, total, "speed", 1.0),
        memory_bytes_G=_per_device(cluster, total, "memory_gib", cluster.device.memory_gib) * 2.0**30,
    )


def host_place(cluster: Cluster) -> int:
    """Which level is the host: the one of that name, else the lowest."""
    return next((place for place, level in enumerate(cluster.network) if level.name == "host"), 0)


class _Table:
    """Links as they are found: a name, a rate, and who uses them from where to where."""

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.names: list[str] = []
        self.rates: list[float] = []
        self.above: list[bool] = []
        self.ends: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]] = []

    def add(self, name: str, rate: float, above: bool, from_G: NDArray[np.bool_], to_G: NDArray[np.bool_]) -> None:
        self.names.append(name)
        self.rates.append(rate)
        self.above.append(above)
        self.ends.append((from_G, to_G))


def from_routes(table: _Table, host_G: Ints) -> Links:
    """Lay the links of the table along the ways that use them, in the order they were added."""
    total = table.devices
    depth_GG = np.zeros((total, total), np.int64)
    places: list[tuple[Ints, Ints, Ints]] = []
    for from_G, to_G in table.ends:
        s, g = np.flatnonzero(from_G), np.flatnonzero(to_G)
        s, g = np.repeat(s, len(g)), np.tile(g, len(s))
        s, g = s[s != g], g[s != g]
        places.append((s, g, depth_GG[s, g]))
        depth_GG[s, g] += 1
    route_GGR = np.full((total, total, max(int(depth_GG.max()), 1)), -1, np.int64)
    for link, (s, g, place) in enumerate(places):
        route_GGR[s, g, place] = link
    return Links(
        host_G=host_G,
        names=tuple(table.names),
        bytes_per_s_L=np.array(table.rates, float),
        above_L=np.array(table.above, bool),
        route_GGR=route_GGR,
    )


def _tree_links(table: _Table, cluster: Cluster, level: LevelSpec, below_G: Ints, place: int) -> None:
    lower = cluster.network[place - 1].name if place else "device"
    width = (cluster.unit_sizes()[place - 1] if place else 1.0) / level.sharing * 1e9
    for unit in range(int(below_G.max()) + 1):
        inside = below_G == unit
        out, into = _rates(cluster, level, unit)
        table.add(f"{lower}{unit}.out", out * width, place > host_place(cluster), inside, ~inside)
        table.add(f"{lower}{unit}.in", into * width, place > host_place(cluster), ~inside, inside)


def _rail_links(table: _Table, cluster: Cluster, level: LevelSpec, host_G: Ints) -> None:
    """One card per device; the detour to the right rail goes through the ports inside the host."""
    rail_G = np.concatenate([np.arange(n) for n in np.bincount(host_G)])
    for device in range(len(host_G)):
        mine, near = host_G == host_G[device], rail_G == rail_G[device]
        out, into = _rates(cluster, level, int(host_G[device]))
        me = np.arange(len(host_G)) == device
        table.add(f"card{device}.out", out * 1e9 / level.sharing, True, mine, near & ~mine)
        table.add(f"card{device}.in", into * 1e9 / level.sharing, True, ~mine, me)
        port = table.names.index(f"device{device}.out")
        table.ends[port] = (me, ~near)
        table.ends[port + 1] = (mine & ~me, near)


def _rates(cluster: Cluster, level: LevelSpec, unit: int) -> tuple[float, float]:
    """GB/s out and in of one link of this unit."""
    assert level.gb_per_s is not None
    out = into = level.gb_per_s
    for spec in cluster.exception:
        if spec.level == level.name and unit in spec.units:
            if spec.gb_per_s is not None:
                out = into = spec.gb_per_s
            if spec.gb_per_s_in is not None:
                into = spec.gb_per_s_in
    return out, into


def _units(cluster: Cluster, devices: int) -> Ints:
    """Unit of every level that holds each device, [levels, G], exceptions in fan_out applied."""
    wanted = devices
    if not wanted and cluster.hosts:
        wanted = len(cluster.hosts) * int(cluster.unit_sizes()[host_place(cluster)])
    if not wanted and cluster.most_devices < float("inf"):
        wanted = int(cluster.most_devices)
    if not wanted:
        raise ClusterError(f"{cluster.name} leaves its outermost level open; say how many devices there are")
    rows: list[Ints] = []
    for place, level in enumerate(cluster.network):
        lower = int(rows[-1].max()) + 1 if rows else wanted
        unit_B = _filled(cluster, level, place, lower)
        rows.append(unit_B[rows[-1]] if rows else unit_B)
    room = int((rows[-1] == 0).sum())
    if room < wanted and devices:
        raise ClusterError(
            f"{cluster.name} has {room} devices, {wanted} are asked for; "
            f"raise network.{cluster.network[-1].name}.fan_out"
        )
    rows, wanted = [row[:room] for row in rows], room
    _check_exceptions(cluster, rows, wanted)
    return np.array(rows)


def _filled(cluster: Cluster, level: LevelSpec, place: int, lower: int) -> Ints:
    """Unit of this level for each of `lower` units below, filled in order."""
    above = cluster.network[place + 1].name if place + 1 < len(cluster.network) else ""
    special = {
        unit: spec.fan_out
        for spec in cluster.exception
        if spec.level == above and spec.fan_out is not None
        for unit in spec.units
    }
    unit_B: list[int] = []
    unit = 0
    while len(unit_B) < lower:
        room = special.get(unit, level.fan_out) or lower
        unit_B += [unit] * min(room, lower - len(unit_B))
        unit += 1
    return np.array(unit_B, np.int64)


def _check_exceptions(cluster: Cluster, rows: list[Ints], total: int) -> None:
    names = [level.name for level in cluster.network]
    for spec in cluster.exception:
        place = names.index(spec.level)
        there = int(rows[place - 1].max()) + 1 if place else total
        wrong = [unit for unit in spec.units if not 0 <= unit < there]
        if wrong:
            raise ClusterError(f"exception of {spec.level} names unit {wrong[0]}; there are 0..{there - 1}")


def _per_device(cluster: Cluster, total: int, key: str, usual: float) -> Floats:
    """A figure of every device; exceptions on the lowest level name devices, on the next one whole hosts."""
    value_G = np.full(total, usual)
    host_G = _units(cluster, total)[host_place(cluster)]
    for spec in cluster.exception:
        value = getattr(spec, key)
        if value is None:
            continue
        place = [level.name for level in cluster.network].index(spec.level)
        if place > host_place(cluster) + 1:
            raise ClusterError(f"exception.{key} is given for {spec.level}; give it for devices or for whole hosts")
        value_G[np.isin(host_G if place else np.arange(total), spec.units)] = value
    return value_G


def exception(level: str, *units: int, **values: float) -> ExceptionSpec:
    """Shorthand: exception("network", 3, gb_per_s=12.5)."""
    return ExceptionSpec(level=level, units=units, **values)  # type: ignore[arg-type]
