"""What one host says about itself: `nvidia-smi topo -m`, NCCL's topology XML, hwloc's XML.

    text -> read_nvidia_smi | read_nccl | read_hwloc -> Inside(levels, device, cards)

Bandwidths are what NCCL assumes (src/graph/topo.h, xml.cc at 5067397c): per NVLink and direction 20 GB/s on sm70 and
sm80, 12 on sm86, 20.6 on sm90, 40.1 on sm100; PCIe by generation and width; `SYS` crosses the processors' interconnect.
Devices are grouped by their fastest connections; where these do not nest into equal groups, the slowest counts.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moestro.cluster.nesting import HOST, Inside
from moestro.cluster.topology import LevelSpec
from moestro.core.errors import ClusterError

NVLINK_GB_PER_S = {70: 20.0, 80: 20.0, 86: 12.0, 89: 12.0, 90: 20.6, 100: 40.1, 120: 40.1}
SM_NAMES = {70: "V100", 80: "A100", 86: "A6000", 89: "L40", 90: "H100", 100: "B200"}
PATH_GB_PER_S = {"PIX": 24.0, "PXB": 24.0, "PHB": 24.0, "NODE": 16.0, "SYS": 10.0}
"""Through bridges PCIe 4.0 x16; between host bridges and between sockets what the processors let through."""
LANE_UNITS = {"2.5": 15, "5": 30, "8": 60, "16": 120, "32": 240, "64": 480}
"""NCCL's speed of a PCIe lane in 0.1 Gb/s, by GT/s."""
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def read_nvidia_smi(text: str) -> Inside:
    """The matrix of `nvidia-smi topo -m`; raises ClusterError where it is none or not symmetric."""
    rows = [[cell.strip() for cell in line.split("\t")] for line in ANSI.sub("", text).splitlines() if "\t" in line]
    header = next((row for row in rows if any(cell == "GPU0" for cell in row[1:])), None)
    if header is None:
        raise ClusterError("this is not the output of nvidia-smi topo -m: there is no header with GPU0")
    names = [cell for cell in header if re.fullmatch(r"GPU\d+|NIC\d+|mlx\d+_\d+", cell)]
    cells = {row[0]: row[1 : len(names) + 1] for row in rows if row[0] in names}
    gpus = [name for name in names if name.startswith("GPU")]
    if any(name not in cells or len(cells[name]) < len(names) for name in gpus):
        raise ClusterError("the matrix of nvidia-smi topo -m is cut off; give all its rows")
    links = [int(cell[2:]) for gpu in gpus for cell in cells[gpu] if cell.startswith("NV")]
    generation = _generation(max(links, default=0))
    rate_GG = np.full((len(gpus), len(gpus)), np.inf)
    for row, gpu in enumerate(gpus):
        for column in range(len(gpus)):
            if row != column:
                rate_GG[row, column] = _path_rate(cells[gpu][column], NVLINK_GB_PER_S[generation])
    return Inside(levels=_levels(rate_GG), cards=len(names) - len(gpus), device=SM_NAMES[generation] if links else "")


def _generation(links: int) -> int:
    """Compute capability by NVLinks of one device: 6 on V100, 12 on A100, 18 since H100."""
    return 90 if links > 12 else 80 if links > 6 else 70


def _path_rate(cell: str, nvlink: float) -> float:
    if re.fullmatch(r"NV\d+", cell):
        return int(cell[2:]) * nvlink
    if cell not in PATH_GB_PER_S:
        raise ClusterError(
            f"nvidia-smi topo -m has {cell!r} between two devices; known are NV#, {', '.join(PATH_GB_PER_S)}"
        )
    return PATH_GB_PER_S[cell]


def _levels(rate_GG: NDArray[np.float64]) -> tuple[LevelSpec, ...]:
    """Nested equal groups by bandwidth, fastest inside; raises ClusterError for a matrix that is not symmetric."""
    devices = len(rate_GG)
    if not np.allclose(rate_GG, rate_GG.T):
        g, h = np.argwhere(~np.isclose(rate_GG, rate_GG.T))[0]
        raise ClusterError(
            f"devices {g} and {h} see each other at {rate_GG[g, h]:g} and {rate_GG[h, g]:g} GB/s; measure again"
        )
    if devices == 1:
        return (LevelSpec(name=HOST, fan_out=1, gb_per_s=PATH_GB_PER_S["PIX"]),)
    rates = sorted({float(rate) for rate in rate_GG[np.isfinite(rate_GG)]}, reverse=True)
    found: list[tuple[int, float]] = []
    for rate in rates:
        size = _equal_groups(rate_GG >= rate)
        if size and size > (found[-1][0] if found else 1):
            found.append((size, rate))
    if not found or found[-1][0] < devices:
        found.append((devices, rates[-1]))
    sizes = [1, *[size for size, _ in found]]
    levels = []
    for number, ((below, size), (_, rate)) in enumerate(zip(pairwise(sizes), found, strict=True)):
        name = HOST if number == len(found) - 1 else "nvlink" if rate > PATH_GB_PER_S["PIX"] else f"pcie{number}"
        levels.append(LevelSpec(name=name, fan_out=size // below, gb_per_s=rate, latency_us=2.0))
    return tuple(levels)


def _equal_groups(near_GG: NDArray[np.bool_]) -> int:
    """Size of the groups when neighbours-and-self fall into equal, contiguous, fully joined groups; else 0."""
    near_GG = near_GG | np.eye(len(near_GG), dtype=bool)
    size = int(near_GG[0].sum())
    group = np.arange(len(near_GG)) // size
    return size if len(near_GG) % size == 0 and np.array_equal(near_GG, group[:, None] == group) else 0


def _tree(text: str, kind: str) -> ET.Element:
    try:
        return ET.fromstring(text)
    except ET.ParseError as error:
        raise ClusterError(f"the {kind} file is not XML ({error})") from error


def read_nccl(text: str) -> Inside:
    """NCCL_TOPO_DUMP_FILE's XML; hand-written files without gpu and nic elements are read by PCI class."""
    system = _tree(text, "NCCL topology")
    if system.tag != "system":
        raise ClusterError(f"an NCCL topology starts with <system>, this one with <{system.tag}>")
    gpus = [pci for pci in system.iter("pci") if pci.find("gpu") is not None or _is_class(pci, "0x03")]
    nets = list(system.iter("net"))
    cards = len(nets) or sum(_is_class(pci, "0x02") for pci in system.iter("pci"))
    if not gpus:
        raise ClusterError("the NCCL topology has no GPU; dump it on a host with devices")
    inner = [gpu for pci in gpus if (gpu := pci.find("gpu")) is not None]
    sm = max((_number(gpu, "sm", 0) for gpu in inner), default=0)
    links = min((sum(_number(link, "count", 1) for link in gpu.iter("nvlink")) for gpu in inner), default=0)
    pcie = min(_pcie_gb_per_s(pci) for pci in gpus)
    nearest = max((known for known in NVLINK_GB_PER_S if known <= sm), default=80)
    rate = links * NVLINK_GB_PER_S[nearest] or min(pcie, PATH_GB_PER_S["SYS"] if _sockets(system) > 1 else pcie)
    level = LevelSpec(name=HOST, fan_out=len(gpus), gb_per_s=rate, latency_us=2.0)
    speeds = [speed if (speed := _number(net, "speed", 0)) > 0 else 10000 for net in nets]
    return Inside(
        levels=(level,),
        device=SM_NAMES.get(max((known for known in SM_NAMES if known <= sm), default=0), ""),
        cards=cards,
        card_gb_per_s=min(speeds) / 8000 if speeds else None,
    )


def _is_class(pci: ET.Element, prefix: str) -> bool:
    return pci.get("class", "").startswith(prefix) and pci.find("pci") is None


def _number(element: ET.Element, key: str, otherwise: int) -> int:
    text = element.get(key, "")
    try:
        return int(float(text)) if text else otherwise
    except ValueError as error:
        raise ClusterError(f"{element.tag} has {key}={text!r}; it must be a number") from error


def _sockets(system: ET.Element) -> int:
    return len({cpu.get("numaid") for cpu in system.iter("cpu")})


def _pcie_gb_per_s(pci: ET.Element) -> float:
    match = re.match(r"([\d.]+) GT/s", pci.get("link_speed", ""))
    lane = LANE_UNITS.get(match.group(1).removesuffix(".0"), 60) if match else 60
    return _number(pci, "link_width", 16) * lane / 80


def read_hwloc(text: str) -> Inside:
    """lstopo's XML, version 2 or 3, with PCI devices and, where NVML was there, NVLink bandwidths."""
    top = _tree(text, "hwloc")
    if top.tag != "topology":
        raise ClusterError(f"an hwloc file starts with <topology>, this one with <{top.tag}>")
    pcis = [one for one in top.iter("object") if one.get("type") == "PCIDev"]
    gpus = [pci for pci in pcis if pci.get("pci_type", "").startswith("03")]
    cards = [pci for pci in pcis if pci.get("pci_type", "").startswith("02")]
    if not gpus:
        raise ClusterError("the hwloc file shows no GPU; run lstopo with --whole-io on a host with devices")
    rate_GG = _nvlink_matrix(top, len(gpus))
    if rate_GG is None:
        slowest = min(float(pci.get("pci_link_speed", "0")) or PATH_GB_PER_S["PIX"] for pci in gpus)
        rate_GG = np.full((len(gpus), len(gpus)), slowest)
        np.fill_diagonal(rate_GG, np.inf)
    models = [info.get("value", "") for info in top.iter("info") if info.get("name") == "GPUModel"]
    return Inside(levels=_levels(rate_GG), device=models[0] if models else "", cards=len(cards))


def _nvlink_matrix(top: ET.Element, devices: int) -> NDArray[np.float64] | None:
    """NVLinkBandwidth distances in GB/s, or None."""
    for table in top.iter("distances2"):
        if table.get("name") == "NVLinkBandwidth":
            numbers = [float(word) for part in table.iter("u64values") for word in (part.text or "").split()]
            if len(numbers) != devices * devices:
                raise ClusterError(f"hwloc's NVLinkBandwidth has {len(numbers)} values for {devices} devices")
            rate_GG = np.array(numbers).reshape(devices, devices) / 1000
            np.fill_diagonal(rate_GG, np.inf)
            return rate_GG
    return None


HOST_READERS: Mapping[str, Callable[[str], Inside]] = {
    "nvidia-smi": read_nvidia_smi,
    "nccl": read_nccl,
    "hwloc": read_hwloc,
}
