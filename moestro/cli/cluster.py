"""`moestro cluster show|import|probe`: what the machine park looks like."""

import json
import sys
from pathlib import Path

import typer

from moestro.core.errors import ClusterError

app = typer.Typer(help="Describe, import and measure a machine park.", no_args_is_help=True)


@app.command("show")
def show(
    cluster: Path = typer.Argument(help="A cluster.toml."),
    devices: int = typer.Option(0, "--devices", help="How many, where the file leaves it open."),
    settings: list[str] = typer.Option([], "--set", help="What-if, for example network.spine=2x."),
    as_json: bool = typer.Option(False, "--json", help="Print the links as one JSON object."),
) -> None:
    """Draw a cluster: levels, links, and what differs."""
    from moestro.cluster.draw import draw
    from moestro.cluster.links import links_of
    from moestro.cluster.topology import read_cluster

    park = read_cluster(cluster, settings)
    if not as_json:
        print("\n".join(draw(park, devices)))
        return
    links = links_of(park, devices)
    rates = {name: rate / 1e9 for name, rate in zip(links.names, links.bytes_per_s_L, strict=True)}
    print(json.dumps({"name": park.name, "devices": links.devices, "hosts": links.hosts, "gb_per_s": rates}))


@app.command("import")
def import_file(
    file: Path = typer.Argument(help="nvidia-smi topo -m, NCCL or hwloc XML, Slurm topology, or Kubernetes nodes."),
    out: Path = typer.Option(Path("cluster.toml"), "--out", "-o", help="Where to write."),
    kind: str = typer.Option("", "--kind", help="What the file is; found by its content otherwise."),
    speed: list[str] = typer.Option([], "--speed", help="LEVEL=GB/s of one device, where the file has none."),
    device: str = typer.Option("", "--device", help="Which accelerator, where the file has none: H100, MI300X ..."),
    devices_per_host: int = typer.Option(0, "--devices-per-host", help="Where the file does not say."),
    host: Path | None = typer.Option(None, "--host", help="nvidia-smi, NCCL or hwloc file of one host."),
    levels: Path | None = typer.Option(None, "--levels", help="A Kueue Topology for Kubernetes nodes."),
) -> None:
    """Write a cluster.toml from another tool's description."""
    from moestro.cluster.draw import draw
    from moestro.cluster.importers import import_cluster
    from moestro.core.config import save_toml

    park = import_cluster(
        file,
        kind=kind,
        speeds=dict(_speed(text) for text in speed),
        devices_per_host=devices_per_host,
        device=device,
        host_file=host,
        levels_file=levels,
    )
    save_toml(out, park)
    print("\n".join(draw(park)))
    print(f"\nwritten: {out}")


def _speed(text: str) -> tuple[str, float]:
    level, equals, number = text.partition("=")
    try:
        if equals:
            return level, float(number)
    except ValueError:
        pass
    raise ClusterError(f"--speed {text!r} is not LEVEL=NUMBER; write for example --speed leaf=50")


@app.command("probe")
def probe_network(
    out: Path = typer.Option(Path("cluster.toml"), "--out", "-o", help="Where rank 0 writes."),
    ranks: int = typer.Option(0, "--ranks", help="Start this many ranks here; without it, run under torchrun."),
    payload_mb: float = typer.Option(
        4.0, "--payload-mb", help="Size of a large message; over 0.1 s on the slowest link."
    ),
    repeats: int = typer.Option(3, "--repeats", help="The best of so many counts."),
    device: str = typer.Option("", "--device", help="Which accelerator the ranks have, for the file."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Measure bandwidth and latency between ranks, fit the levels, write cluster.toml."""
    import os

    if ranks and "RANK" not in os.environ:
        _start_ranks(ranks)
        return
    from moestro.cluster.draw import draw
    from moestro.cluster.nesting import device_of
    from moestro.cluster.probe import in_group, measure, probe
    from moestro.cluster.topology import DeviceSpec
    from moestro.core.config import save_toml
    from moestro.dist.mesh import swap_between_all

    cpu = DeviceSpec(name="CPU", memory_gib=1.0, memory_gb_per_s=10.0, peak_tflops={"fp32": 0.1})

    def work() -> None:
        first = os.environ["RANK"] == "0"
        say = (lambda text: print(text, file=sys.stderr)) if first else (lambda text: None)
        measured = measure(int(payload_mb * 1e6), repeats, swap_between_all, say)
        found = probe(measured, device_of(device) if device else cpu, out.stem)
        if not first:
            return
        save_toml(out, found.cluster)
        if as_json:
            rows = {"gb_per_s": measured.rate_RR.round(4).tolist(), "latency_us": measured.latency_RR.round(2).tolist()}
            print(json.dumps({**rows, "crowding": round(found.crowding, 3), "exchange_s": measured.exchange_s}))
            return
        print("\n".join(draw(found.cluster, len(measured.rate_RR))))
        print(f"\nan all-to-all takes {found.crowding:.2f} times what these links promise; written: {out}")

    in_group(work)


def _start_ranks(ranks: int) -> None:
    """This command again, once per rank, on this machine."""
    import os
    import socket
    import subprocess

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "moestro", *sys.argv[1:]]
    started = [subprocess.Popen(command, env={**base, "RANK": str(rank)}) for rank in range(ranks)]
    failed = [process.wait() for process in started]
    if any(failed):
        raise ClusterError("a rank of the probe failed; its message stands above")
