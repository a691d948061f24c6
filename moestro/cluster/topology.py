"""What a machine park looks like: one kind of device, and the levels of network between devices, from inside out.

    cluster.toml -> read_cluster -> Cluster(device, network=(host, rail, spine, ...))

A level joins `fan_out` units of the level below (the lowest joins devices) and says how fast one device exchanges with
devices that it reaches through this level only. The outermost level may leave its fan_out open (0): as many units as
are asked for. Read by `plan`, later by `place`; importers and the probe write the same file.

What-if settings change a cluster without editing its file: `network.spine=2x` doubles a level's bandwidth,
`network.spine.latency_us=1`, `device.memory_gib=192`, `device.peak_tflops.bf16=0.5x`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moestro.core.config import STRICT, Table, build, parse_value, read_toml, to_table
from moestro.core.errors import ClusterError, ConfigError

GIB = 2.0**30
USUAL_LATENCY_US = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSpec:
    """One accelerator (or one CPU box counted as one)."""

    __pydantic_config__ = STRICT
    name: str
    memory_gib: float
    memory_gb_per_s: float
    """Vendor's bandwidth of the device's memory."""
    peak_tflops: dict[str, float]
    """Dense matrix products per second by number format (fp32, bf16, fp8, fp4), as the vendor states them."""
    achievable_tflops: dict[str, float] = field(default_factory=dict)
    """Best measured on large matrix products, where somebody has measured it."""
    family: str = ""
    """Name under which profiles know the device (H100, GB200 ...); empty takes the first word of the name."""
    host: Literal["x86", "arm"] = "x86"
    """The host's processor: it launches the kernels."""
    tile: int = 256
    """Sides of matrices are worked on in tiles of this width."""
    tiles_at_once: int = 132
    """Tiles of 128 x 256 results worked on at once, an H100's multiprocessors; 0 where products know no waves."""
    released: float = 2024.0
    """Year of general availability; software is slower on devices younger than itself."""
    power_w: float = 0.0
    """Of the device and its share of the host, when training."""
    usd_per_hour: float = 0.0

    def __post_init__(self) -> None:
        for name in ("memory_gib", "memory_gb_per_s"):
            if not getattr(self, name) > 0:
                raise ClusterError(f"device.{name} is {getattr(self, name)}; it must be above 0")
        for table, known in (("peak_tflops", self.peak_tflops), ("achievable_tflops", self.achievable_tflops)):
            wrong = {key: rate for key, rate in known.items() if not rate > 0}
            if wrong:
                raise ClusterError(f"device.{table} has {wrong}; rates must be above 0")
        if not {"bf16", "fp32"} & set(self.peak_tflops):
            raise ClusterError("device.peak_tflops has neither bf16 nor fp32; give the dense rate of at least one")

    @property
    def family_name(self) -> str:
        """How profiles call it."""
        return self.family or self.name.split()[0]

    @property
    def memory_bytes(self) -> float:
        """Device memory."""
        return self.memory_gib * GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelSpec:
    """One level of the network."""

    __pydantic_config__ = STRICT
    name: str
    fan_out: int = 0
    """Units of the level below in one unit of this level; 0 on the outermost: as many as needed."""
    gb_per_s: float | None = None
    """Of one link through this level, each direction, GB = 1e9 bytes."""
    sharing: float = 1.0
    """Devices that share one such link when all send at once: 2 where two devices share a card, 4 on a spine with a
    quarter of the bandwidth below."""
    latency_us: float = 5.0
    """Of one small message; some 5 between hosts."""
    rails: bool = False
    """Device i of every unit below sits on switch i; another rail is reached through the own host's device on it."""

    def __post_init__(self) -> None:
        if self.gb_per_s is None:
            raise ClusterError(
                f"network.{self.name}.gb_per_s is missing; give the link's speed in GB/s per direction (a 400 Gb/s "
                "card is 50), or set it for one question with --set network." + self.name + "=50"
            )
        for name, low in (("fan_out", 0), ("gb_per_s", 0), ("sharing", 0), ("latency_us", 0)):
            value = getattr(self, name)
            if not value >= low or (name in ("gb_per_s", "sharing") and value == 0):
                raise ClusterError(f"network.{self.name}.{name} is {value}; it must be above 0")

    @property
    def bytes_per_s(self) -> float:
        """What one device gets when all send at once."""
        assert self.gb_per_s is not None
        return self.gb_per_s * 1e9 / self.sharing

    @property
    def slowness(self) -> float:
        """Latency beside the usual 5 microseconds."""
        return self.latency_us / USUAL_LATENCY_US


@dataclass(frozen=True, kw_only=True, slots=True)
class ExceptionSpec:
    """Links, units or devices of a level that differ from the rest of it."""

    __pydantic_config__ = STRICT
    level: str
    units: tuple[int, ...]
    """Which units of the level below, counted over the whole park from 0: hosts on the level that joins hosts,
    devices on the lowest."""
    gb_per_s: float | None = None
    """Of their links out into this level; None leaves it."""
    gb_per_s_in: float | None = None
    """Of their links in, where that differs."""
    fan_out: int | None = None
    """Devices or units that each of them holds: a host with fewer devices."""
    speed: float | None = None
    """Compute of their devices beside the cluster's device; 0.5 is half as fast."""
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        for name in ("gb_per_s", "gb_per_s_in", "fan_out", "speed", "memory_gib"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ClusterError(
                    f"exception.{name} of {self.level} {list(self.units)} is {value}; it must be above 0"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Devices and the network between them, levels from inside out."""

    __pydantic_config__ = STRICT
    name: str
    device: DeviceSpec
    network: tuple[LevelSpec, ...]
    source: str = ""
    """Where the numbers come from."""
    exception: tuple[ExceptionSpec, ...] = ()
    """What differs from the levels' general figures: one slow card, a host of fewer devices, slower devices."""
    hosts: tuple[str, ...] = ()
    """Names of the hosts in rank order, where known."""
    crowding: float = 1.0
    """Time of an exchange of all with all beside what links promise one by one; from the probe, over TCP some 1.1."""

    def __post_init__(self) -> None:
        if not self.network:
            raise ClusterError("network is empty; give at least one [[network]] level, the devices of one host")
        names = [level.name for level in self.network]
        if len(set(names)) < len(names):
            raise ClusterError(f"network has levels {names}; every level needs a name of its own")
        open_levels = [level.name for level in self.network[:-1] if not level.fan_out]
        if open_levels:
            raise ClusterError(f"network.{open_levels[0]}.fan_out is 0; only the outermost level may leave it open")
        unknown = [spec.level for spec in self.exception if spec.level not in names]
        if unknown:
            raise ClusterError(f"exception.level is {unknown[0]!r}; the network's levels are {', '.join(names)}")
        if not 1 <= self.crowding < float("inf"):
            raise ClusterError(f"crowding is {self.crowding}; it must be 1 (none) or more, see moestro cluster probe")

    @property
    def most_devices(self) -> float:
        """Devices of the whole park; infinite where the outermost level is open."""
        total = 1.0
        for level in self.network:
            total *= level.fan_out or float("inf")
        return total

    def unit_sizes(self) -> list[float]:
        """Devices of one unit of every level, from inside out."""
        sizes, total = [], 1.0
        for level in self.network:
            total *= level.fan_out or float("inf")
            sizes.append(total)
        return sizes


def read_cluster(path: Path, settings: Sequence[str] = ()) -> Cluster:
    """A cluster.toml with what-if settings applied; raises ConfigError or ClusterError in one line."""
    return build(Cluster, with_settings(read_toml(path), settings), where=str(path))


def changed(cluster: Cluster, settings: Sequence[str]) -> Cluster:
    """The cluster under what-if settings."""
    return build(Cluster, with_settings(to_table(cluster), settings), where=cluster.name)


def with_settings(table: Table, settings: Sequence[str]) -> Table:
    """Apply `network.LEVEL[.KEY]=VALUE` and `device.KEY=VALUE`; `2x` and `0.5x` multiply what is there."""
    levels = [dict(level) for level in table.get("network", [])]
    table = {**table, "device": dict(table.get("device", {})), "network": levels}
    for setting in settings:
        name, equals, text = setting.partition("=")
        kind, *keys = name.split(".")
        if not equals or kind not in ("network", "device") or not keys:
            raise ConfigError(
                f"'{setting}' is not a what-if; write network.LEVEL=2x, network.LEVEL.KEY=VALUE or device.KEY=VALUE"
            )
        if kind == "device":
            _set(table["device"], keys, text, name)
            continue
        level = next((level for level in levels if level.get("name") == keys[0]), None)
        if level is None:
            known = ", ".join(str(level.get("name")) for level in levels)
            raise ConfigError(
                f"network.{keys[0]} is not a level of {table.get('name', 'this cluster')}; it has {known}"
            )
        _set(level, keys[1:] or ["gb_per_s"], text, name)
    return table


def _set(place: dict[str, Any], keys: Sequence[str], text: str, name: str) -> None:
    *folders, last = keys
    for folder in folders:
        place[folder] = dict(place.get(folder, {}))
        place = place[folder]
    if not text.endswith("x"):
        place[last] = parse_value(text)
        return
    before, factor = place.get(last), parse_value(text[:-1])
    if not isinstance(before, int | float) or not isinstance(factor, int | float):
        raise ConfigError(f"{name}={text} cannot be applied: {last} is {before!r}; give a number with its unit instead")
    place[last] = before * factor
