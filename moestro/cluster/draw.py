"""A cluster as a tree of text: every unit once, equal ones counted, what differs marked.

Cluster -> draw -> lines for `moestro cluster show`
"""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from moestro.cluster.links import Links, host_place, links_of
from moestro.cluster.topology import Cluster

MOST_LINES = 60


def draw(cluster: Cluster, devices: int = 0) -> list[str]:
    """Lines of text; without `devices` an open outermost level is drawn with two units."""
    open_ended = not devices and not cluster.hosts and cluster.most_devices == float("inf")
    sizes = cluster.unit_sizes()
    shown = devices or (2 * int(sizes[-2]) if open_ended and len(sizes) > 1 else 0)
    links = links_of(cluster, shown)
    ranges = "any number of devices" if open_ended else f"{links.devices} devices"
    lines = [f"{cluster.name}: {ranges}, {cluster.device.name} with {cluster.device.memory_gib:g} GiB"]
    if cluster.source:
        lines.append(f"from {cluster.source}")
    lines += ["", *_table(cluster), "", *_tree(cluster, links)]
    return lines


def _table(cluster: Cluster) -> Iterator[str]:
    yield f"{'level':12s} {'joins':>20s} {'a link':>12s} {'shared by':>10s} {'a device':>12s} {'latency':>10s}"
    below = "devices"
    for level in cluster.network:
        joins = f"{level.fan_out or 'any number of'} {below}"
        rate = f"{level.bytes_per_s / 1e9:.4g} GB/s"
        yield (
            f"{level.name:12s} {joins:>20s} {level.gb_per_s:>7.4g} GB/s {level.sharing:>10.3g} {rate:>12s} "
            f"{level.latency_us:>7.3g} us{'  rails' if level.rails else ''}"
        )
        below = f"{level.name}s"
    for spec in cluster.exception:
        said = [
            f"{name.replace('_', ' ')} {value:g}"
            for name in ("gb_per_s", "gb_per_s_in", "fan_out", "speed", "memory_gib")
            if (value := getattr(spec, name)) is not None
        ]
        yield f"  except {spec.level} unit {', '.join(map(str, spec.units))}: {', '.join(said)}"


def _tree(cluster: Cluster, links: Links) -> list[str]:
    """Hosts in order, runs of equal ones drawn once."""
    inner = cluster.network[host_place(cluster)].name
    hosts = [_host_text(links, host, inner) for host in range(links.hosts)]
    names = list(cluster.hosts) or [f"host{host}" for host in range(links.hosts)]
    lines = [f"{cluster.network[-1].name}"]
    number = 0
    for text, run in groupby(hosts):
        count = len(list(run))
        span = names[number] if count == 1 else f"{names[number]} .. {names[number + count - 1]} ({count})"
        number += count
        branch = "└" if number == links.hosts else "├"
        lines.append(f"{branch}── {span:28s} {text}")
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"    ... and {len(lines) - MOST_LINES} more"]
    return lines


def _host_text(links: Links, host: int, level: str) -> str:
    mine = np.flatnonzero(links.host_G == host)
    ours = {f"{level}{host}.out", *(f"card{device}.out" for device in mine)}
    own = [link for link, name in enumerate(links.names) if name in ours]
    speed_G = links.speed_G[mine] if links.speed_G.size else np.ones(len(mine))
    slow = "" if (speed_G == 1).all() else f"  speed {', '.join(f'{s:g}' for s in sorted(set(speed_G)))}"
    out = sum(links.bytes_per_s_L[link] for link in own) / 1e9
    return f"{'■' * min(len(mine), 16)} {len(mine)} devices" + (f"  out {out:.4g} GB/s" if own else "") + slow
