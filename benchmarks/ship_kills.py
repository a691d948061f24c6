"""Kill clients and servers at random instants, hundreds of times, and look at what is left.

    python benchmarks/ship_kills.py FOLDER [--kills 500] [--mib 96] [--out benchmarks/results/ship_kills.json]

Three kinds in turn, each a process that gets SIGKILL after a random part of the time that it needs undisturbed: a
*pull* (an update by chunks), an *apply* (an update by residuals), a *publish* (a push). Every tenth kill hits the
server as well, which is started again. Each is tried again until it ends; then every byte is compared. Asserted: the
active version is at all times the old or the new one; counted: bytes the server sent beyond those needed, per kill.

Prints one line per kind, then one JSON line.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.remove(str(Path(__file__).resolve().parent))  # its names are those of folders of tests

import numpy as np
from package.samples import contents, save_model

from moestro.package.api import Options, Release, pack
from moestro.package.residual import diff
from moestro.ship import transport
from moestro.ship.edge import Edge
from moestro.ship.install import update
from moestro.ship.pull import Guard
from moestro.ship.push import push
from moestro.ship.serve import PackageServer
from moestro.ship.settings import ServerSettings

MIB = 1 << 20
ANYBODY = Guard(trust=None)
PATIENCE = 8
"""After so many kills of one trial the next may wait twice as long, so that a busy machine gets to an end."""
SERVER_DIES = 0.1
"""Share of kills that hit the server too."""


def forked(work: Callable[[], object]) -> int:
    """Start a copy of this process that does one thing; its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # it ends with the process
            work()
            status = 0
        finally:
            os._exit(status)
    return child


class Server:
    """A server in a copy of this process, so that one that was killed is back in a moment, on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.child, self.port = folder, 0, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.token = (folder / "admin.token").read_text().strip()

    def start(self) -> None:
        """Wait until it listens."""
        reading, writing = os.pipe()

        def work() -> None:
            settings = ServerSettings(plain=True, port=self.port)
            with PackageServer(self.folder, settings, log_level="critical") as server:
                os.write(writing, server.address.url.encode())
                server.run()

        self.child = forked(work)
        os.close(writing)
        self.port = int(os.read(reading, 100).rpartition(b":")[2])
        os.close(reading)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it."""
        os.kill(self.child, number)
        os.waitpid(self.child, 0)

    def server(self) -> transport.Server:
        """For clients."""
        return transport.Server(url=self.url, token=self.token)


def content_bytes(running: Server, way: str) -> float:
    """File content that the server has `sent` or `received` since it started."""
    with urllib.request.urlopen(f"{running.url}/metrics") as answer:
        text = answer.read().decode()
    found = re.search(rf"^moestro_ship_{way}_bytes_total (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


class Trial:
    """One server, two releases of a model, and the numbers."""

    def __init__(self, folder: Path, mebibytes: int, seed: int) -> None:
        self.folder, self.dice = folder, random.Random(seed)
        rng = np.random.default_rng(seed)
        weights = {f"w{i:03d}": rng.normal(0, 0.02, MIB // 4).astype(np.float32) for i in range(mebibytes)}
        self.fulls: list[Path] = []
        for sequence in (1, 2):
            out = folder / f"full-{sequence}"
            model = save_model(folder / f"model-{sequence}", weights)
            pack(model, out, Options(release=Release(package_id="demo", sequence=sequence)))
            shutil.rmtree(model)
            self.fulls.append(out)
            for i in range(mebibytes // 2):
                weights[f"w{i:03d}"] *= np.float32(1.0001)
        self.update = folder / "update"
        diff(self.fulls[:1], self.fulls[1], self.update)
        self.both = [contents(path) for path in self.fulls]
        self.origin = folder / "origin"
        self.numbers: dict[str, dict[str, Any]] = {}

    def running(self, name: str, packages: list[Path]) -> Server:
        """A server with some packages."""
        running = Server(self.folder / name / "store")
        for package in packages:
            push(running.server(), package)
        return running

    def install(self, kind: str, kills: int) -> None:
        """Updates on a device; `pull` has no residual to take, `apply` has."""
        packages = [*self.fulls, self.update] if kind == "apply" else self.fulls
        running = self.running(kind, packages[:1])
        shutil.rmtree(self.origin, ignore_errors=True)
        update(running.server(), Edge(self.origin, "demo"), ANYBODY)
        for package in packages[1:]:
            push(running.server(), package)
        done, refetched, worst, switched = 0, 0.0, 0.0, 0
        needed, length_s = self._undisturbed(running)
        while done < kills:
            home = self.folder / "home"
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(self.origin, home, symlinks=True)
            edge, sent, own = Edge(home, "demo"), 0.0, 0
            while True:
                before = content_bytes(running, "sent")
                work = partial(update, running.server(), edge, ANYBODY)
                status, lost = self._killed(running, work, length_s * (1 + own / PATIENCE))
                sent += 0 if lost else content_bytes(running, "sent") - before
                own += status != 0
                switched += self._look(edge) and status != 0
                if status == 0:
                    break
            assert self._look(edge) == 1
            extra = max(0.0, sent - needed)
            done, refetched, worst = done + own, refetched + extra, max(worst, extra / max(own, 1))
        running.stop()
        shutil.rmtree(self.folder / "home")
        self._note(kind, done, refetched, worst, killed_after_the_switch=switched)

    def _undisturbed(self, running: Server) -> tuple[float, float]:
        home = self.folder / "home"
        shutil.copytree(self.origin, home, symlinks=True)
        before, begin = content_bytes(running, "sent"), time.monotonic()
        update(running.server(), Edge(home, "demo"), ANYBODY)
        length_s = time.monotonic() - begin
        shutil.rmtree(home)
        return content_bytes(running, "sent") - before, length_s

    def _killed(self, running: Server, work: Callable[[], object], length_s: float) -> tuple[int, bool]:
        """Do something in a process and kill it, or the server, somewhere; (status, the server was killed)."""
        child, server_dies = forked(work), self.dice.random() < SERVER_DIES
        deadline = time.monotonic() + self.dice.uniform(0, 1.3 * length_s)
        while time.monotonic() < deadline:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return status, False
            time.sleep(0.001)
        if server_dies:
            running.stop(signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if server_dies:
            running.start()
        return status, server_dies

    def _look(self, edge: Edge) -> int:
        """0 or 1: the active version, which is whole."""
        with edge.locked():
            pass
        active = edge.state.active
        assert active
        found = contents(edge.folder(active))
        assert contents(edge.root / "active") == found
        return self.both.index(found)

    def publish(self, kills: int) -> None:
        """Pushes; the store lists a release whole or not at all."""
        done, resent, worst, round_number = 0, 0, 0.0, 0
        length_s = 0.0
        while done < kills:
            name = f"publish-{round_number}"
            round_number += 1
            running = self.running(name, [])
            own, begin = 0, time.monotonic()
            while True:
                length = length_s * (1 + own / PATIENCE) or 1e9
                status, _ = self._killed(running, partial(push, running.server(), self.fulls[0]), length)
                length_s = length_s or time.monotonic() - begin
                if status == 0:
                    break
                own += 1
                listed = json.loads(self._get(running, "/v1/packages"))["packages"]
                assert listed == [] or len(listed[0]["releases"]) == 1
            received = content_bytes(running, "received")
            home = Edge(self.folder / "home", "demo")
            update(running.server(), home, ANYBODY)
            assert self._look(home) == 0
            shutil.rmtree(self.folder / "home")
            extra = max(0, received - sum(map(len, self.both[0].values())))
            done, resent, worst = done + own, resent + extra, max(worst, extra / max(own, 1))
            running.stop()
            shutil.rmtree(self.folder / name)
        self._note("publish", done, resent, worst)

    def _get(self, running: Server, path: str) -> str:
        request = urllib.request.Request(running.url + path, headers={"Authorization": f"Bearer {running.token}"})
        with urllib.request.urlopen(request) as answer:
            return str(answer.read().decode())

    def _note(self, kind: str, kills: int, again: float, worst: float, **more: int) -> None:
        mean = again / max(kills, 1) / MIB
        self.numbers[kind] = {"kills": kills, "mean_again_mib": mean, "worst_again_mib": worst / MIB, **more}
        print(f"{kind:8} {kills} kills, all ended bit-correct; sent again per kill: mean {mean:.2f} MiB, "
              f"worst trial {worst / MIB:.2f} MiB {more or ''}", flush=True)  # fmt: skip


def main() -> None:
    """All three kinds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--mib", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=["pull", "apply", "publish"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    trial, begin = Trial(args.folder, args.mib, args.seed), time.monotonic()
    share = args.kills // 3
    if "pull" in args.kinds:
        trial.install("pull", share)
    if "apply" in args.kinds:
        trial.install("apply", share)
    if "publish" in args.kinds:
        trial.publish(args.kills - 2 * share)
    result = {"bench": "ship_kills", "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "mib": args.mib}
    result |= {"minutes": (time.monotonic() - begin) / 60, "kinds": trial.numbers}
    print(json.dumps(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
