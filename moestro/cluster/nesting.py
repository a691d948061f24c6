"""From "which host hangs below which switch" to levels of a cluster: what all importers have in common.

    Nesting(level_names, hosts with their units) + speeds -> cluster_of -> Cluster

Most sources say who is near whom and not how fast; the speeds of such levels must be given or probed, none is made up.
Groups of unequal size become a fan_out with exceptions; hosts are ordered so that every unit is contiguous.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.cluster.devices import find_device
from moestro.cluster.topology import Cluster, DeviceSpec, ExceptionSpec, LevelSpec
from moestro.core.errors import ClusterError

HOST = "host"


@dataclass(frozen=True, kw_only=True)
class Inside:
    """What a host looks like inside: levels from inside out, the last one joins all its devices."""

    levels: tuple[LevelSpec, ...]
    device: str = ""
    """Name of its devices, where the source says it."""
    card_gb_per_s: float | None = None
    """Speed of one network card."""
    cards: int = 0

    @property
    def devices(self) -> int:
        """Devices of the host."""
        total = 1
        for level in self.levels:
            total *= level.fan_out
        return total


@dataclass(frozen=True, kw_only=True)
class Nesting:
    """Hosts and the units around them."""

    level_names: tuple[str, ...]
    """Levels above the host, from inside out."""
    units: Mapping[str, tuple[str, ...]]
    """Host -> the unit it lies in on each of these levels."""
    source: str = ""
    devices_per_host: int = 0
    device: str = ""


def device_of(*names: str) -> DeviceSpec:
    """The known device of the first name that means one."""
    found = find_device(*names)
    if found is None:
        given = next((name for name in names if name), "")
        what = f"device {given!r} is not known" if given else "the source does not say which devices the hosts have"
        raise ClusterError(f"{what}; give --device, for example H100, or write [device] into the cluster file")
    return found


def cluster_of_host(inside: Inside, *, name: str, source: str, device: str = "", hosts: int = 0) -> Cluster:
    """One host as a cluster; where it says its cards' speed, hosts of its kind joined by them."""
    levels = list(inside.levels)
    if inside.card_gb_per_s and inside.cards:
        sharing = inside.devices / inside.cards
        levels.append(LevelSpec(name="network", fan_out=hosts, gb_per_s=inside.card_gb_per_s, sharing=sharing))
    return Cluster(name=name, device=device_of(device, inside.device), network=tuple(levels), source=source)


def cluster_of(
    nesting: Nesting,
    *,
    name: str,
    speeds: Mapping[str, float],
    devices_per_host: int = 0,
    device: str = "",
    inside: Inside | None = None,
) -> Cluster:
    """Levels from nesting.

    speeds   GB/s per direction of one device through each level (`host`, then the nesting's), for those not in `inside`
    inside   what a host looks like, from another importer
    raises   ClusterError naming the levels whose speed is missing
    """
    per_host = inside.devices if inside else devices_per_host or nesting.devices_per_host
    if not per_host:
        raise ClusterError(f"{nesting.source} does not say how many devices a host has; give --devices-per-host")
    wanted = [*([] if inside else [HOST]), *nesting.level_names]
    missing = [level for level in wanted if level not in speeds]
    if missing:
        example = " ".join(f"--speed {level}=50" for level in missing)
        raise ClusterError(
            f"{nesting.source} says who is near whom, not how fast; give {example} (GB/s of a device) or probe"
        )
    unknown = sorted(set(speeds) - set(wanted))
    if unknown:
        raise ClusterError(f"--speed {unknown[0]} is not a level here; there are {', '.join(wanted)}")
    order = sorted(nesting.units, key=lambda host: (tuple(reversed(nesting.units[host])), host))
    lowest = inside.levels if inside else (LevelSpec(name=HOST, fan_out=per_host, gb_per_s=speeds[HOST]),)
    levels, exceptions = list(lowest), list[ExceptionSpec]()
    paths: list[tuple[str, ...]] = [tuple(reversed((host, *nesting.units[host]))) for host in order]
    for depth, level in enumerate(nesting.level_names):
        here = len(nesting.level_names) - depth
        sizes = _sizes(paths, here)
        levels.append(LevelSpec(name=level, fan_out=max(sizes), gb_per_s=speeds[level]))
        if depth + 1 < len(nesting.level_names) and min(sizes) < max(sizes):
            exceptions += _smaller(nesting.level_names[depth + 1], sizes)
    return Cluster(
        name=name,
        device=device_of(device, nesting.device, inside.device if inside else ""),
        network=tuple(levels),
        source=nesting.source,
        exception=tuple(exceptions),
        hosts=tuple(order),
    )


def _sizes(paths: Sequence[tuple[str, ...]], depth: int) -> list[int]:
    """Number of units directly below each unit at this depth of the paths, in order."""
    below = dict.fromkeys(path[: depth + 1] for path in paths)
    return list(Counter(path[:depth] for path in below).values())


def _smaller(level_above: str, sizes: list[int]) -> list[ExceptionSpec]:
    """One exception for every size below the largest; exceptions stand on the level above."""
    found = []
    for size in sorted(set(sizes) - {max(sizes)}):
        units = tuple(unit for unit, here in enumerate(sizes) if here == size)
        found.append(ExceptionSpec(level=level_above, units=units, fan_out=size))
    return found


def text_of(value: Any) -> str:
    """A label's value as text; numbers in YAML are names here."""
    return "" if value is None else str(value)
