"""Hosts with throttled links on one machine: network namespaces, veth pairs and token buckets; one command per rank.

    python benchmarks/lab.py --host 2,1000,100 --host 2,1000,50 [--timeout 60] [--rate 5,1,20] -- COMMAND ARGS ...

    rank namespaces --port--> switch of their host --uplink--> core        every end of a link is limited on its own

--host is ranks, Mbit/s of each rank's port, Mbit/s of the host's uplink (0: not limited); --rate is seconds after the
start, host, and the Mbit/s its uplink has from then on. COMMAND runs once per rank as under torchrun: RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR, MASTER_PORT, GLOO_SOCKET_IFNAME are set. Prints every rank's
output, then one JSON line with seconds and bytes on each uplink.

Needs root and iproute2 with tbf; without them it prints a line that begins with "skipped" and ends with status 0.
Namespaces are called moelab-PID-*; they reach nothing outside and go when the lab does, also after a signal. Those
of labs whose process is gone are removed by the next one. Other benchmarks import `Lab`:

    with Lab([Host(ranks=2, port_mbit=1000, up_mbit=100)] * 2) as lab:
        job = lab.start([sys.executable, "train.py"])
        time.sleep(5)
        lab.rate(1, 20)
        result = job.wait(60)
        found = lab.call(function, argument, timeout_s=60)      forked gloo ranks: no second import of torch

TCP carries 95.7 % of a set rate as payload. Ports above 1000 Mbit/s are bound by the processor, not by the rate.
"""

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from moestro.cluster.links import Links

sys.path.insert(0, str(Path(__file__).parents[1]))

PREFIX = "moelab"
CLONE_NEWNET = 0x40000000
HEADER_BYTES = 66
"""Ethernet, IP and TCP with time stamps; counters see them once per segment that the kernel hands over whole."""
PAYLOAD_SHARE = 1448 / 1514
"""Of a full frame; the limit counts frames."""


class LabError(Exception):
    """A link could not be made, or a rank failed or hung."""


@dataclass(frozen=True, slots=True)
class Host:
    """Ranks behind one uplink; rates in Mbit/s, 0 leaves them alone."""

    ranks: int
    port_mbit: float = 0
    up_mbit: float = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """What one host's uplink has carried, headers taken off."""

    out_bytes: int
    in_bytes: int


@dataclass(frozen=True, slots=True)
class Output:
    """What one rank's command left."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Result:
    """Of one command on all ranks."""

    outputs: list[Output]
    seconds: float
    uplinks: list[Sent]


def missing() -> str:
    """Why there can be no lab here; empty where there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "iproute2 (ip and tc) is not installed"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        try:
            _run("ip", "-n", probe, "link", "add", "name", "one", "type", "veth", "peer", "name", "two")
            _limit(probe, "one", 10)
        finally:
            _run("ip", "netns", "del", probe)
    except LabError as error:
        return f"this kernel gives no namespaces, veth or tbf ({error})"
    return ""


def skip_without_lab() -> None:
    """End the program with status 0 and a line that says why, where there can be no lab."""
    if reason := missing():
        print(f"skipped: {reason}")
        sys.exit(0)


class Lab:
    """The network, while the `with` block lasts."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = list(hosts)
        self.host_of = [number for number, host in enumerate(hosts) for _ in range(host.ranks)]
        self.name = f"{PREFIX}-{os.getpid()}"
        self.jobs: list[Job] = []
        self.handlers: dict[int, Any] = {}

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.host_of)

    def address(self, rank: int) -> str:
        """IP address of a rank."""
        return f"10.79.{rank // 250}.{rank % 250 + 1}"

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.handlers[number] = signal.signal(number, _leave)
        try:
            _remove_left_over()
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._remove()

    def _build(self) -> None:
        core = f"{self.name}-core"
        _switch(core)
        for number, host in enumerate(self.hosts):
            switch = f"{self.name}-host{number}"
            _switch(switch)
            _pair(switch, "uplink", core, f"host{number}")
            _plug(switch, "uplink")
            _plug(core, f"host{number}")
            self.rate(number, host.up_mbit)
        for rank, number in enumerate(self.host_of):
            place, switch = f"{self.name}-rank{rank}", f"{self.name}-host{number}"
            _namespace(place)
            _pair(place, "eth0", switch, f"rank{rank}")
            _plug(switch, f"rank{rank}")
            _run("ip", "-n", place, "addr", "add", f"{self.address(rank)}/16", "dev", "eth0")
            _run("ip", "-n", place, "link", "set", "eth0", "up")
            _limit(place, "eth0", self.hosts[number].port_mbit)
            _limit(switch, f"rank{rank}", self.hosts[number].port_mbit)

    def _remove(self) -> None:
        for job in self.jobs:
            job.kill()
        for name in _namespaces():
            if name.startswith(self.name + "-"):
                _run("ip", "netns", "del", name)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def rate(self, host: int, up_mbit: float) -> None:
        """Give a host's uplink another rate, in both directions, also while a command runs."""
        _limit(f"{self.name}-host{host}", "uplink", up_mbit)
        _limit(f"{self.name}-core", f"host{host}", up_mbit)

    def uplinks(self) -> list[Sent]:
        """What every host's uplink has carried since the lab began."""
        return [self._sent(f"{self.name}-host{number}") for number in range(len(self.hosts))]

    def links(self) -> "Links":
        """The same network as the placement and dispatch models see it, at the rates payload gets."""
        from moestro.cluster.links import exception, links_of
        from moestro.cluster.topology import Cluster, DeviceSpec, LevelSpec

        device = DeviceSpec(name="CPU", memory_gib=1, memory_gb_per_s=10, peak_tflops={"fp32": 0.1})
        most, gb_per_s = max(host.ranks for host in self.hosts), PAYLOAD_SHARE / 8e3
        inside = LevelSpec(name="host", fan_out=most, gb_per_s=(self.hosts[0].port_mbit or 1e6) * gb_per_s)
        between = LevelSpec(name="network", fan_out=len(self.hosts), gb_per_s=1.0, sharing=most)
        unlike = [exception("network", n, gb_per_s=h.up_mbit * gb_per_s) for n, h in enumerate(self.hosts)]
        unlike += [exception("network", n, fan_out=h.ranks) for n, h in enumerate(self.hosts) if h.ranks < most]
        unlike += [
            exception("host", rank, gb_per_s=self.hosts[number].port_mbit * gb_per_s)
            for rank, number in enumerate(self.host_of)
            if self.hosts[number].port_mbit
        ]
        cluster = Cluster(name="lab", device=device, network=(inside, between), exception=tuple(unlike))
        return links_of(cluster, self.ranks)

    def _sent(self, switch: str) -> Sent:
        counted = json.loads(_run("ip", "-n", switch, "-s", "-j", "link", "show", "uplink"))[0]["stats64"]
        out, into = (counted[way]["bytes"] - HEADER_BYTES * counted[way]["packets"] for way in ("tx", "rx"))
        return Sent(out, into)

    def start(self, command: Sequence[str], environment: Mapping[str, str] | None = None, port: int = 29500) -> "Job":
        """Start a command on every rank; `environment` is added to ours and to what torchrun would set."""
        job = Job(self, command, dict(environment or {}), port)
        self.jobs.append(job)
        return job

    def run(self, command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None) -> Result:
        """Start a command on every rank and wait for all; raises LabError when one fails or hangs."""
        return self.start(command, environment).wait(timeout_s)

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float) -> list[Any]:
        """Call function(*args) on forked gloo ranks, one in each rank's namespace; returns what they returned."""
        from moestro.dist.testing import run_on_ranks  # deferred: commands need no torch

        return run_on_ranks(function, *args, ranks=self.ranks, timeout_s=timeout_s, enter=self.enter)

    def enter(self, rank: int) -> None:
        """Move this process into a rank's namespace."""
        given = _as_torchrun(self, rank, 29500)
        os.environ |= {
            key: value for key, value in given.items() if not key.startswith("MASTER_")
        }  # they meet elsewhere
        with Path(f"/run/netns/{self.name}-rank{rank}").open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise LabError(f"rank {rank} cannot enter its namespace: {os.strerror(ctypes.get_errno())}")


class Job:
    """One command on all ranks of a lab."""

    def __init__(self, lab: Lab, command: Sequence[str], environment: dict[str, str], port: int) -> None:
        self.lab, self.folder = lab, tempfile.TemporaryDirectory(prefix=PREFIX)
        self.began_s, self.before = time.monotonic(), lab.uplinks()
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(lab.ranks):
            enter = ["ip", "netns", "exec", f"{lab.name}-rank{rank}"]
            everything = os.environ | _as_torchrun(lab, rank, port) | environment
            out, error = (self._file(rank, kind).open("wb") for kind in ("stdout", "stderr"))
            with out, error:
                self.processes.append(
                    subprocess.Popen(
                        [*enter, *command], env=everything, stdout=out, stderr=error, start_new_session=True
                    )
                )

    def _file(self, rank: int, kind: str) -> Path:
        return Path(self.folder.name) / f"{rank}.{kind}"

    def output(self, rank: int) -> Output:
        """What a rank has printed so far; status is -1 while it runs."""
        status = self.processes[rank].poll()
        out, error = (self._file(rank, kind).read_text(errors="replace") for kind in ("stdout", "stderr"))
        return Output(-1 if status is None else status, out, error)

    def running(self) -> list[int]:
        """Ranks whose command has not ended."""
        return [rank for rank, process in enumerate(self.processes) if process.poll() is None]

    def wait(self, timeout_s: float, check: bool = True) -> Result:
        """Until all ranks have ended; raises LabError when one fails (if `check`) or after `timeout_s`."""
        until_s = time.monotonic() + timeout_s
        while left := self.running():
            failed = [rank for rank, process in enumerate(self.processes) if process.poll()]
            if time.monotonic() > until_s:
                self._give_up(f"ranks {left} had not ended after {timeout_s:g} s", left[0])
            if check and failed:
                time.sleep(0.5)  # others may say more
                break
            time.sleep(0.01)
        seconds = time.monotonic() - self.began_s
        failed = [rank for rank, process in enumerate(self.processes) if process.poll()]
        if check and failed:
            self._give_up(f"rank {failed[0]} ended with status {self.processes[failed[0]].returncode}", failed[0])
        now = self.lab.uplinks()
        moved = [
            Sent(after.out_bytes - before.out_bytes, after.in_bytes - before.in_bytes)
            for before, after in zip(self.before, now, strict=True)
        ]
        result = Result([self.output(rank) for rank in range(self.lab.ranks)], seconds, moved)
        self.kill()
        return result

    def _give_up(self, problem: str, rank: int) -> None:
        said = self.output(rank)
        self.kill()
        raise LabError(f"{problem}; it said:\n{(said.stdout + said.stderr)[-3000:]}")

    def kill(self) -> None:
        """End what still runs, with all that it has started."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.folder.cleanup()


def _as_torchrun(lab: Lab, rank: int, port: int) -> dict[str, str]:
    host = lab.host_of[rank]
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(lab.ranks),
        "LOCAL_RANK": str(rank - lab.host_of.index(host)),
        "LOCAL_WORLD_SIZE": str(lab.hosts[host].ranks),
        "GROUP_RANK": str(host),
        "MASTER_ADDR": lab.address(0),
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
    }


def _leave(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.split()]


def _remove_left_over() -> None:
    """Labs whose process is gone."""
    for name in _namespaces():
        parts = name.split("-")
        if parts[0] == PREFIX and parts[1].isdigit() and not Path("/proc", parts[1]).exists():
            _run("ip", "netns", "del", name)


def _namespace(name: str) -> None:
    _run("ip", "netns", "add", name)
    _run("ip", "-n", name, "link", "set", "lo", "up")


def _switch(name: str) -> None:
    _namespace(name)
    _run("ip", "-n", name, "link", "add", "switch", "type", "bridge")
    _run("ip", "-n", name, "link", "set", "switch", "up")


def _pair(left: str, left_end: str, right: str, right_end: str) -> None:
    """A cable between two namespaces."""
    peer = ("peer", "name", right_end, "netns", right)
    _run("ip", "link", "add", "name", left_end, "netns", left, "type", "veth", *peer)


def _plug(switch: str, end: str) -> None:
    _run("ip", "-n", switch, "link", "set", end, "master", "switch")
    _run("ip", "-n", switch, "link", "set", end, "up")


def _limit(place: str, end: str, mbit: float) -> None:
    """A bucket of 4 ms (at least one segment of 64 KiB); what waits longer than 200 ms is dropped."""
    if not mbit:
        return
    bucket = max(65536, round(mbit * 1e6 / 8 * 0.004))
    rate = ("rate", f"{mbit:g}mbit", "burst", str(bucket), "latency", "200ms")
    _run("tc", "-n", place, "qdisc", "replace", "dev", end, "root", "tbf", *rate)


def _numbers(text: str, kinds: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if len(values) != len(kinds.split(",")):
        raise argparse.ArgumentTypeError(f"'{text}' is not {kinds}")
    return values


def main() -> None:
    """Run one command in a lab."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="append", type=lambda text: _numbers(text, "ranks,port,up"), required=True)
    parser.add_argument("--rate", action="append", type=lambda text: _numbers(text, "second,host,up"), default=[])
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    skip_without_lab()
    try:
        with Lab([Host(int(ranks), port, up) for ranks, port, up in args.host]) as lab:
            job = lab.start(args.command)
            for second, host, up_mbit in sorted(args.rate):
                while job.running() and time.monotonic() - job.began_s < second:
                    time.sleep(0.01)
                lab.rate(int(host), up_mbit)
            result = job.wait(args.timeout)
    except LabError as error:
        sys.exit(f"lab: {error}")
    for rank, output in enumerate(result.outputs):
        for line in (output.stdout + output.stderr).splitlines():
            print(f"rank {rank}: {line}")
    moved = [{"out_bytes": sent.out_bytes, "in_bytes": sent.in_bytes} for sent in result.uplinks]
    print(json.dumps({"bench": "lab", "seconds": result.seconds, "uplinks": moved}))


if __name__ == "__main__":
    main()
