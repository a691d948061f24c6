"""Versions on a device, against a real server: switching, rolling back, residual updates, replay, loss of power."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from package.samples import contents, save_model, tensors
from ship.conftest import Make, Running, Serve

from moestro.core.errors import ConfigError, FormatError, RefusalError, RollbackError, SignatureError
from moestro.package.api import Options, Release, Trust, new_key, pack, save_pair, sign_package
from moestro.package.residual import diff
from moestro.ship.edge import PLANNED, Edge
from moestro.ship.install import CURRENT, HELD_BACK, INSTALLED, How, Outcome, roll_back, update, watch
from moestro.ship.pull import Guard
from moestro.ship.push import push

ANYBODY = Guard(trust=None)


def lineage(folder: Path, count: int, key: Path | None = None) -> tuple[list[Path], list[Path]]:
    """(full packages, updates between neighbours) of a model whose one expert moves a little each time."""
    weights, fulls, updates = tensors(), list[Path](), list[Path]()
    for sequence in range(1, count + 1):
        out = folder / f"full-{sequence}"
        options = Options(release=Release(package_id="demo", sequence=sequence))
        pack(save_model(folder / f"weights-{sequence}", weights), out, options)
        if key:
            sign_package(out, key)
        if fulls:
            updates.append(folder / f"update-{sequence}")
            diff(fulls[-1:], out, updates[-1])
            if key:
                sign_package(updates[-1], key)
        fulls.append(out)
        weights["experts.w"][sequence % 3] *= np.float32(1.001)
    return fulls, updates


def test_an_update_installs_switches_and_rolls_back(serve: Serve, make: Make, tmp_path: Path) -> None:
    running, edge = serve(), Edge(tmp_path / "home", "demo")
    first, second = make(sequence=1, seed=0), make(sequence=2, seed=1)
    push(running.server(), first)
    assert update(running.server(), edge, ANYBODY).state == INSTALLED
    assert contents(edge.root / "active") == contents(first)
    assert update(running.server(), edge, ANYBODY).state == CURRENT

    push(running.server(), second)
    assert update(running.server(), edge, ANYBODY).sequence == 2
    assert contents(edge.root / "active") == contents(second)
    previous = edge.state.previous
    assert previous
    assert contents(edge.folder(previous)) == contents(first)

    roll_back(edge)
    assert contents(edge.root / "active") == contents(first)
    assert update(running.server(), edge, ANYBODY).state == HELD_BACK
    assert update(running.server(), edge, ANYBODY, How(again=True)).state == INSTALLED
    assert contents(edge.root / "active") == contents(second)


def test_nothing_to_roll_back_to_is_said(tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="not installed"):
        roll_back(Edge(tmp_path, "demo"))
    assert not (tmp_path / "demo").exists()
    (tmp_path / "demo").mkdir()
    with pytest.raises(RefusalError, match="no former version"):
        roll_back(Edge(tmp_path, "demo"))


def test_residual_updates_lead_to_the_very_same_signed_package(serve: Serve, tmp_path: Path) -> None:
    """R-8.2.6-2, -4, -5: exact, bound to the base, chained; the result carries the publisher's own signature."""
    save_pair(new_key("ed25519"), tmp_path / "key")
    guard = Guard(trust=Trust.load([tmp_path / "key.pub"]))
    fulls, updates = lineage(tmp_path, 3, tmp_path / "key")
    running, edge = serve(trust=[str(tmp_path / "key.pub")]), Edge(tmp_path / "home", "demo")
    push(running.server(), fulls[0])
    update(running.server(), edge, guard)
    for package in (fulls[1], updates[0], fulls[2], updates[1]):
        push(running.server(), package)
    outcome = update(running.server(), edge, guard, How(device_id="robot"))
    assert (outcome.way, outcome.sequence) == ("update", 3)
    assert outcome.full_bytes
    assert outcome.traffic.fetched_bytes < outcome.full_bytes / 2
    assert contents(edge.root / "active") == contents(fulls[2])
    assert update(running.server(), edge, guard).state == CURRENT
    roll_back(edge)
    assert contents(edge.root / "active") == contents(fulls[0])


def test_an_update_that_does_not_fit_falls_back_to_the_full_package(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-8.2.6-4: refused, the base untouched, the full package taken."""
    fulls, updates = lineage(tmp_path, 2)
    running, edge = serve(), Edge(tmp_path / "home", "demo")
    push(running.server(), fulls[0])
    update(running.server(), edge, ANYBODY)
    push(running.server(), fulls[1])
    push(running.server(), updates[0])
    active = edge.state.active
    assert active
    wrong = contents(edge.folder(active))["Model/demo/model.ptm"]
    file = edge.folder(active) / "Model/demo/model.ptm"
    file.write_bytes(wrong[:-600] + bytes(8) + wrong[-592:])  # the base rotted: the update cannot verify
    outcome = update(running.server(), edge, ANYBODY)
    assert (outcome.state, outcome.way) == (INSTALLED, "full")
    assert outcome.dropped
    assert contents(edge.root / "active") == contents(fulls[1])


def test_replay_downgrade_and_exchange_are_refused(serve: Serve, make: Make, tmp_path: Path) -> None:
    """R-8.2.7-2: a store that forgot, was restored from an old copy, or lies about a sequence."""
    first, second, forged = make(sequence=1), make(sequence=2, seed=1), make(sequence=2, seed=9)
    honest, old, liar = (serve(folder=tmp_path / name) for name in ("honest", "old", "liar"))
    edge = Edge(tmp_path / "home", "demo")
    push(honest.server(), first)
    push(honest.server(), second)
    update(honest.server(), edge, ANYBODY)
    push(old.server(), first)
    with pytest.raises(RollbackError, match="sequence 1, but 2 was here"):
        update(old.server(), edge, ANYBODY)
    push(liar.server(), forged)
    with pytest.raises(RollbackError, match="another release 2"):
        update(liar.server(), edge, ANYBODY)
    assert contents(edge.root / "active") == contents(second)


def test_releases_that_expired_or_nobody_trusted_signed_are_refused(
    serve: Serve, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("good", "bad"):
        save_pair(new_key("ed25519"), tmp_path / name)
    guard = Guard(trust=Trust.load([tmp_path / "good.pub"]))
    running, edge = serve(), Edge(tmp_path / "home", "demo")
    unsigned, foreign = make(sequence=1), make(sequence=2, seed=1)
    expiring = make(sequence=3, seed=2, expires_at="2026-01-01T00:00:00Z")
    sign_package(foreign, tmp_path / "bad")
    sign_package(expiring, tmp_path / "good")
    for package, match in ((unsigned, "not signed"), (foreign, "0 trusted keys")):
        push(running.server(), package)
        with pytest.raises(SignatureError, match=match):
            update(running.server(), edge, guard)
    monkeypatch.setattr("moestro.ship.catalogue.expired", lambda _: False)  # a server with a slow clock
    push(running.server(), expiring)
    with pytest.raises(RollbackError, match="has expired"):
        update(running.server(), edge, guard)
    assert edge.state.active is None
    assert not (edge.root / "active").exists()
    assert os.listdir(edge.root / "versions") == []


def test_a_manifest_of_another_package_is_refused(serve: Serve, make: Make, tmp_path: Path) -> None:
    running = serve()
    push(running.server(), make())
    running.stop()
    from moestro.ship.database import Database

    db = Database(f"sqlite://{running.folder.absolute()}/store.db")
    for table in ("release", "release_file", "model", "holding"):
        db.run(f"UPDATE {table} SET package_id = 'other'")
    db.close()
    running.start()
    with pytest.raises(RollbackError, match="gave release 1 of demo where release 1 of other"):
        update(running.server(), Edge(tmp_path / "home", "other"), ANYBODY)


STEPS = ("write state", "rename version", "rename link", "rename state", "flush")
DYING = """
import os, signal, sys
from pathlib import Path
from moestro.core import files
from moestro.ship import edge, install, pull, fetch
left = int(sys.argv[1])
def dying(function):
    def step(*args, **more):
        global left
        left -= 1
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **more)
        left -= 1
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        return result
    return step
Path.rename, Path.replace, Path.symlink_to = dying(Path.rename), dying(Path.replace), dying(Path.symlink_to)
Path.unlink, files.flush_to_disk = dying(Path.unlink), dying(files.flush_to_disk)
import shutil
shutil.rmtree = dying(shutil.rmtree)
os.link = dying(os.link)
from moestro.ship.transport import Server
server = Server(url=sys.argv[2], token=sys.argv[3], authority=Path(sys.argv[4]))
install.update(server, edge.Edge(Path(sys.argv[5]), "demo"), pull.Guard(trust=None))
print(left)
"""


def dying_update(running: Running, home: Path, at: int) -> int:
    """Update in a process that is killed before or after its `at`-th step on the disk; its exit status."""
    values = (str(at), running.url, running.token, str(running.authority), str(home))
    return subprocess.run([sys.executable, "-c", DYING, *values], stdout=subprocess.DEVNULL, check=False).returncode


def whole(edge: Edge, versions: list[dict[str, bytes]]) -> int:
    """Which version is active: by its state and, once recovered, by its link; its files are all of it."""
    with edge.locked():
        pass
    active = edge.state.active
    assert active
    found = contents(edge.folder(active))
    assert contents(edge.root / "active") == found
    return versions.index(found)


@pytest.mark.parametrize("by_update", [False, True], ids=["full", "residual"])
@pytest.mark.slow
def test_power_lost_at_every_step_leaves_the_old_or_the_new_version(
    serve: Serve, tmp_path: Path, by_update: bool
) -> None:
    power_losses(serve, tmp_path, by_update, every=1)


def test_power_lost_at_some_steps_leaves_the_old_or_the_new_version(serve: Serve, tmp_path: Path) -> None:
    power_losses(serve, tmp_path, by_update=True, every=43)


def power_losses(serve: Serve, tmp_path: Path, by_update: bool, every: int) -> None:
    """Kill an update at each step in turn, until one survives."""
    fulls, updates = lineage(tmp_path, 2)
    both = [contents(path) for path in fulls]
    running, origin = serve(), tmp_path / "origin"
    push(running.server(), fulls[0])
    update(running.server(), Edge(origin, "demo"), ANYBODY)
    push(running.server(), fulls[1])
    if by_update:
        push(running.server(), updates[0])
    at, seen = 1, set()
    while True:
        home = tmp_path / f"home-{at}"
        shutil.copytree(origin, home, symlinks=True)
        status = dying_update(running, home, at)
        edge = Edge(home, "demo")
        seen.add(whole(edge, both))
        update(running.server(), edge, ANYBODY)
        assert whole(edge, both) == 1
        assert sorted(os.listdir(edge.root / "versions")) == sorted(
            version.folder for version in (edge.state.active, edge.state.previous) if version
        )
        shutil.rmtree(home)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        at += every
    assert 0 in seen
    assert at > 20


def test_r_8_2_6_6_a_device_keeps_what_apply_had_written_until_the_release_is_another(tmp_path: Path) -> None:
    edge = Edge(tmp_path, "demo")
    with edge.locked():
        edge.note(2, "ab" * 32, PLANNED)
    for name in (f"2-{'ab' * 8}.partial", f"1-{'cd' * 8}.partial"):
        (edge.root / "versions" / name).mkdir()
    with edge.locked():
        assert os.listdir(edge.root / "versions") == [f"2-{'ab' * 8}.partial"]
        edge.note(3, "ef" * 32, PLANNED)
    with edge.locked():
        assert not os.listdir(edge.root / "versions")


def test_two_installers_do_not_meet(tmp_path: Path) -> None:
    edge = Edge(tmp_path, "demo")
    with edge.locked(), pytest.raises(ConfigError, match="another moestro"), edge.locked():
        pass


def test_a_damaged_state_is_said(tmp_path: Path) -> None:
    edge = Edge(tmp_path, "demo")
    with edge.locked():
        pass
    for text in ("{", '{"schema":"x","package_id":"demo"}', '{"package_id":"demo","unknown":1}'):
        (edge.root / "state.json").write_text(text)
        with pytest.raises(Exception, match=r"state\.json") as caught:
            edge.state.active  # noqa: B018
        assert type(caught.value).__name__ in ("StorageError", "ConfigError")


def test_watch_installs_what_appears_and_outlives_the_server(serve: Serve, make: Make, tmp_path: Path) -> None:
    running, edge = serve(), Edge(tmp_path / "home", "demo")
    push(running.server(), make(sequence=1))
    stop, events = threading.Event(), list[object]()
    server = running.server(tries=1)

    def watching() -> None:
        for event in watch(server, edge, ANYBODY, How(stopped=stop.is_set), 0.1, sleep=stop.wait):
            events.append(event)

    thread = threading.Thread(target=watching)
    thread.start()

    def wait_for(count: int, kind: type) -> None:
        deadline = time.monotonic() + 30
        while sum(isinstance(event, kind) for event in events) < count:
            assert time.monotonic() < deadline, events
            time.sleep(0.02)

    try:
        wait_for(1, Outcome)
        running.stop()
        wait_for(1, Exception)
        running.start()
        push(running.server(), make(sequence=2, seed=1))
        deadline = time.monotonic() + 30
        while (edge.state.active and edge.state.active.sequence) != 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        stop.set()
        thread.join(30)


def test_commands_install_and_roll_back(serve: Serve, make: Make, tmp_path: Path) -> None:
    running = serve()
    for sequence in (1, 2):
        push(running.server(), make(sequence=sequence, seed=sequence))
        common = ["demo", str(tmp_path / "home"), "--authority", str(running.authority), "--json"]
        result = subprocess.run(
            [sys.executable, "-m", "moestro", "update", running.url, *common, "--allow-unsigned"],
            env=os.environ | {"MOESTRO_TOKEN": running.token}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(result.stdout)["sequence"] == sequence
    done = subprocess.run(
        [sys.executable, "-m", "moestro", "rollback", *common], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"package_id": "demo", "active": 1, "held_back": [2]}
    refused = subprocess.run(
        [sys.executable, "-m", "moestro", "update", running.url, *common], capture_output=True, text=True, check=False
    )
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "--allow-unsigned" in refused.stderr


def test_a_server_that_answers_nonsense_is_refused(tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from moestro.ship.transport import Server

    class Liar(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"releases": [{"sequence": "7", "package_root": "../../x", "kind": "full", "size": 1}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Liar) as http:
        thread = threading.Thread(target=http.handle_request)
        thread.start()
        server = Server(url=f"http://127.0.0.1:{http.server_port}", tries=1)
        with pytest.raises(FormatError, match="sequence"):
            update(server, Edge(tmp_path, "demo"), ANYBODY)
        thread.join()
