"""Read other tools' descriptions of a machine park into cluster.toml's terms.

    FILE -> kind_of -> one host:   nvidia-smi, nccl, hwloc        (host_importers)
                       many hosts: slurm (topology.conf, tree and block), slurm-yaml, kubernetes nodes with Kueue levels
            import_cluster -> Cluster

Schedulers know who is near whom and not how fast: the speed of those levels is asked for (see `nesting`).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.cluster.host_importers import HOST_READERS
from moestro.cluster.nesting import HOST, Inside, Nesting, cluster_of, cluster_of_host, text_of
from moestro.cluster.topology import Cluster
from moestro.core.errors import ClusterError

KINDS = (*HOST_READERS, "slurm", "slurm-yaml", "kubernetes")
HOSTNAME = "kubernetes.io/hostname"
NODE_LEVELS = (
    ("accelerator.topograph.run/domain", "network.topology.nvidia.com/accelerator", "nvidia.com/gpu.clique"),
    ("fabric.topograph.run/tier-0", "network.topology.nvidia.com/leaf", "network.topology.nvidia.com/block"),
    ("fabric.topograph.run/tier-1", "network.topology.nvidia.com/spine"),
    ("fabric.topograph.run/tier-2", "network.topology.nvidia.com/core", "network.topology.nvidia.com/datacenter"),
    ("topology.kubernetes.io/zone",),
    ("topology.kubernetes.io/region",),
)
"""Labels that say the same, from inside out; used where no Kueue Topology names the levels."""


def import_cluster(
    path: Path,
    *,
    kind: str = "",
    speeds: Mapping[str, float] | None = None,
    devices_per_host: int = 0,
    device: str = "",
    host_file: Path | None = None,
    levels_file: Path | None = None,
) -> Cluster:
    """A cluster from another tool's file.

    kind         one of KINDS; empty finds it by content
    speeds       GB/s of one device through each level that the file gives no speed for
    host_file    what one host looks like (nvidia-smi, NCCL or hwloc), for files that describe many
    levels_file  a Kueue Topology, for Kubernetes nodes
    raises       ClusterError naming what is missing or wrong
    """
    text = _read(path)
    kind = kind or kind_of(text, path.name)
    if kind in HOST_READERS:
        return cluster_of_host(HOST_READERS[kind](text), name=path.stem, source=f"{kind}: {path.name}", device=device)
    inside: Inside | None = None
    if host_file is not None:
        host_text = _read(host_file)
        inside = HOST_READERS[kind_of(host_text, host_file.name)](host_text)
    if kind == "kubernetes":
        nesting = read_kubernetes(text, _read(levels_file) if levels_file else "")
    elif kind in ("slurm", "slurm-yaml"):
        nesting = read_slurm(text) if kind == "slurm" else read_slurm_yaml(text)
    else:
        raise ClusterError(f"kind {kind!r} is not known; choose from {', '.join(KINDS)}")
    return cluster_of(
        nesting, name=path.stem, speeds=speeds or {}, devices_per_host=devices_per_host, device=device, inside=inside
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path} cannot be read ({error})") from error


def kind_of(text: str, name: str) -> str:
    """Which tool wrote this; raises ClusterError when none fits."""
    signs = (
        ("nccl", r"<system[\s>]"),
        ("hwloc", r"<topology[\s>]"),
        ("nvidia-smi", r"(?m)^.*\tGPU0\b|^\x1b\[4mGPU0"),
        ("slurm", r"(?im)^\s*(SwitchName|BlockName|RingName)\s*="),
        ("slurm-yaml", r"(?m)^\s*-\s*topology\s*:"),
        ("kubernetes", r"topology\.kubernetes\.io|kubernetes\.io/hostname"),
    )
    for kind, pattern in signs:
        if re.search(pattern, text):
            return kind
    raise ClusterError(f"{name} is none of {', '.join(KINDS)} by its looks; give --kind")


def hostlist(text: str) -> list[str]:
    """Slurm's host lists: 'gpu[001-003,007],login' -> gpu001 gpu002 gpu003 gpu007 login; zero padding kept."""
    return [name for part in _split_outside_brackets(text) for name in _expanded(part)]


def _split_outside_brackets(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for place, letter in enumerate(text):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    if depth:
        raise ClusterError(f"host list {text!r} has an open bracket")
    yield text[start:]


def _expanded(part: str) -> Iterator[str]:
    match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part.strip())
    if match is None:
        if part.strip():
            yield part.strip()
        return
    head, inner, tail = match.groups()
    for piece in inner.split(","):
        first, dash, last = piece.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ClusterError(f"host list {part!r} has {piece!r}; ranges are numbers like 001-004")
        for number in range(int(first), int(last or first) + 1):
            for rest in _expanded(tail) if tail else [""]:
                yield f"{head}{number:0{len(first)}d}{rest}"


def read_slurm(text: str) -> Nesting:
    """topology.conf: SwitchName lines (tree) or BlockName lines (block)."""
    switches: dict[str, tuple[list[str], list[str]]] = {}
    blocks: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        setting = line.partition("#")[0].strip()
        if not setting:
            continue
        values = {key.lower(): value for key, equals, value in (w.partition("=") for w in setting.split()) if equals}
        if "switchname" in values:
            switches[values["switchname"]] = (hostlist(values.get("nodes", "")), hostlist(values.get("switches", "")))
        elif "blockname" in values:
            blocks[values["blockname"]] = hostlist(values.get("nodes", ""))
        elif "blocksizes" not in values:
            raise ClusterError(
                f"topology.conf line {number}: {setting!r} is neither SwitchName, BlockName nor BlockSizes"
            )
    if switches and blocks:
        raise ClusterError("topology.conf has switches and blocks; Slurm reads only one kind")
    return _of_blocks(blocks) if blocks else _of_switches(switches)


def read_slurm_yaml(text: str) -> Nesting:
    """topology.yaml: the topology that is the cluster's default, else the first."""
    tables = _yaml(text)
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables) or not tables:
        raise ClusterError("topology.yaml must be a list of topologies")
    table = next((table for table in tables if table.get("cluster_default")), tables[0])
    if "tree" in table:
        switches = {
            text_of(one.get("switch")): (hostlist(text_of(one.get("nodes"))), hostlist(text_of(one.get("children"))))
            for one in table["tree"].get("switches", [])
        }
        return _of_switches(switches)
    if "block" in table:
        return _of_blocks(
            {text_of(one.get("block")): hostlist(text_of(one.get("nodes"))) for one in table["block"].get("blocks", [])}
        )
    raise ClusterError(f"topology {table.get('topology')!r} has neither tree nor block; only these nest")


def _of_blocks(blocks: Mapping[str, list[str]]) -> Nesting:
    units = {host: (block, "all") for block, hosts in blocks.items() for host in hosts}
    if not units:
        raise ClusterError("the Slurm topology names no nodes")
    return Nesting(level_names=("block", "blocks"), units=units, source="Slurm blocks")


def _of_switches(switches: Mapping[str, tuple[list[str], list[str]]]) -> Nesting:
    parents: dict[str, str] = {}
    for name, (_, children) in switches.items():
        for child in children:
            if child not in switches:
                raise ClusterError(f"switch {name} lists switch {child}, which is not described")
            if child in parents:
                raise ClusterError(f"switch {child} hangs below {parents[child]} and {name}; only trees can be read")
            parents[child] = name
    units: dict[str, tuple[str, ...]] = {}
    for name, (nodes, _) in switches.items():
        for node in nodes:
            if node in units:
                raise ClusterError(f"node {node} hangs below {units[node][0]} and {name}; only trees can be read")
            units[node] = tuple(_upwards(name, parents))
    if not units:
        raise ClusterError("the Slurm topology names no nodes")
    depth = max(len(path) for path in units.values())
    roots = {path[-1] for path in units.values()}
    if len(roots) > 1 or any(len(path) < depth for path in units.values()):
        units = {node: (*path, *["all"] * (depth + (len(roots) > 1) - len(path))) for node, path in units.items()}
        depth = max(len(path) for path in units.values())
    names = ("leaf", "spine", "core")[:depth] if depth <= 3 else tuple(f"switch{number}" for number in range(depth))
    return Nesting(level_names=names, units=units, source="Slurm switches")


def _upwards(name: str, parents: Mapping[str, str]) -> Iterator[str]:
    seen = []
    while name:
        if name in seen:
            raise ClusterError(f"switch {name} lies below itself")
        seen.append(name)
        yield name
        name = parents.get(name, "")


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ClusterError(f"this is not YAML ({' '.join(str(error).split())})") from error


def read_kueue_levels(text: str) -> list[str]:
    """Node labels of a Kueue Topology, from inside out, without the hostname."""
    table = _yaml(text)
    try:
        labels = [text_of(level["nodeLabel"]) for level in table["spec"]["levels"]]
    except (TypeError, KeyError) as error:
        raise ClusterError("a Kueue Topology has spec.levels with nodeLabel each; this file has not") from error
    return [label for label in reversed(labels) if label != HOSTNAME]


def read_kubernetes(text: str, kueue: str = "") -> Nesting:
    """Nodes from `kubectl get nodes -o json` (or yaml), nested by a Kueue Topology's labels or by the usual ones."""
    table = json.loads(text) if text.lstrip().startswith("{") else _yaml(text)
    items = table.get("items", [table]) if isinstance(table, dict) else []
    nodes: dict[str, dict[str, Any]] = {}
    for item in items:
        meta = item.get("metadata", {}) if isinstance(item, dict) else {}
        labels = meta.get("labels") or {}
        nodes[text_of(labels.get(HOSTNAME) or meta.get("name"))] = labels
    if not nodes or "" in nodes:
        raise ClusterError("no nodes with names in this file; write it with kubectl get nodes -o json")
    groups = [(label,) for label in read_kueue_levels(kueue)] if kueue else _used_levels(list(nodes.values()))
    units: dict[str, tuple[str, ...]] = {}
    for name, labels in nodes.items():
        path = [next((text_of(labels[label]) for label in group if label in labels), "") for group in groups]
        if "" in path:
            raise ClusterError(f"node {name} has no label {groups[path.index('')][0]}; label it or choose other levels")
        units[name] = tuple(path)
    names = [re.sub(r"^topology-", "", group[0].rpartition("/")[2]) for group in groups]
    if len({path[-1] for path in units.values()}) > 1:
        names, units = [*names, "all"], {name: (*path, "all") for name, path in units.items()}
    counts = {int(text_of(labels.get("nvidia.com/gpu.count") or 0)) for labels in nodes.values()}
    products = {text_of(labels.get("nvidia.com/gpu.product")) for labels in nodes.values()} - {""}
    if len(counts) > 1:
        raise ClusterError(f"nodes have {sorted(counts)} devices each; import nodes of one kind at a time")
    return Nesting(
        level_names=tuple(names),
        units=units,
        source="Kubernetes node labels",
        devices_per_host=counts.pop(),
        device=products.pop() if len(products) == 1 else "",
    )


def _used_levels(labels: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The usual levels that every node has a label of, up to the first that all nodes share."""
    used = [group for group in NODE_LEVELS if all(any(label in one for label in group) for one in labels)]
    if not used:
        raise ClusterError(
            f"the nodes have none of the labels {', '.join(group[0] for group in NODE_LEVELS)} in common"
        )
    kept: list[tuple[str, ...]] = []
    for group in used:
        values = {next(text_of(one[label]) for label in group if label in one) for one in labels}
        kept.append(group)
        if len(values) == 1:
            break
    return kept


__all__ = ["HOST", "KINDS", "hostlist", "import_cluster", "kind_of", "read_kubernetes", "read_slurm", "read_slurm_yaml"]
