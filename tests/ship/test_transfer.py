"""Transfers that are disturbed: killed clients and servers, corrupted chunks, full disks. All with real processes."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from package.samples import contents, save_model
from ship.conftest import Running, Serve

from moestro.core.errors import IntegrityError, RefusalError, StorageError, TransferError
from moestro.package.api import Options, Release, pack
from moestro.ship.fetch import Silent
from moestro.ship.pull import Guard, pull, stage_of
from moestro.ship.push import push
from moestro.ship.transport import Server

ANYBODY = Guard(trust=None)
MIB = 1 << 20
FullDisk = Callable[[int], AbstractContextManager[None]]


def large(folder: Path, mebibytes: int, sequence: int = 1, seed: int = 0, changed: int = 0) -> Path:
    """A package of random weights; `changed` of its tensors of one MiB are others than with that seed alone."""
    weights = {}
    for number in range(mebibytes):
        rng = np.random.default_rng([seed + (1000 if number < changed else 0), number])
        weights[f"w{number:03d}"] = rng.integers(0, 255, MIB, np.uint8)
    folder.mkdir(exist_ok=True)
    out = folder / f"package-{sequence}"
    model = save_model(folder / f"model-{sequence}", weights)
    pack(model, out, Options(release=Release(package_id="demo", sequence=sequence)))
    return out


def pull_process(running: Running, out: Path) -> subprocess.Popen[str]:
    """`moestro pull` in a process of its own."""
    command = [sys.executable, "-m", "moestro", "pull", running.url, "demo", str(out), "--allow-unsigned", "--json"]
    command += ["--authority", str(running.authority)] if running.authority else []
    environment = os.environ | {"MOESTRO_TOKEN": running.token}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, process_group=0)


def staged_bytes(out: Path) -> int:
    """Bytes on the disk of what is being fetched."""
    stage = stage_of(out)
    return sum(path.stat().st_blocks * 512 for path in stage.iterdir()) if stage.is_dir() else 0


def wait_until(condition: object, timeout_s: float = 60) -> None:
    """Poll."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


SLOW = {"plain": True, "rates": {"bytes_per_s": 16e6}}
"""16 MB a second, so that a transfer can be met half-way."""


def test_a_killed_pull_goes_on_where_it_was(serve: Serve, tmp_path: Path) -> None:
    running, package, out = serve(as_process=True, **SLOW), large(tmp_path, 40), tmp_path / "out"
    push(running.server(), package)
    process = pull_process(running, out)
    wait_until(lambda: staged_bytes(out) > 12 * MIB)
    process.kill()
    process.communicate()
    assert not out.exists(), "nothing half-written under the final name"
    done = pull(running.server(), "demo", out, ANYBODY)
    assert contents(out) == contents(package)
    assert done.traffic.resumed_bytes > 8 * MIB
    assert done.traffic.fetched_bytes + done.traffic.resumed_bytes == sum(map(len, contents(package).values())) - len(
        (package / "Meta-info/manifest.json").read_bytes()
    )
    assert not stage_of(out).exists()


def test_a_killed_server_is_waited_for(serve: Serve, tmp_path: Path) -> None:
    running, package, out = serve(as_process=True, **SLOW), large(tmp_path, 32), tmp_path / "out"
    push(running.server(), package)
    process = pull_process(running, out)
    wait_until(lambda: staged_bytes(out) > 6 * MIB)
    running.stop(signal.SIGKILL)
    time.sleep(0.5)
    running.start()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert contents(out) == contents(package)
    assert json.loads(text)["bad_chunks"] == 0


def test_a_killed_push_sends_only_the_rest(serve: Serve, tmp_path: Path) -> None:
    running, package = serve(as_process=True), large(tmp_path, 24)
    command = [sys.executable, "-m", "moestro", "push", str(package), running.url, "--authority"]
    environment = os.environ | {"MOESTRO_TOKEN": running.token}
    process = subprocess.Popen([*command, str(running.authority)], env=environment, stdout=subprocess.DEVNULL)
    chunks = running.folder / "objects" / "chunks"
    wait_until(lambda: sum(1 for _ in chunks.glob("*/*")) > 8)
    process.kill()
    process.wait()
    running.stop(signal.SIGKILL)  # and the server with it
    running.start()
    there = sum(1 for _ in chunks.glob("*/*"))
    done = push(running.server(), package)
    assert done.known_bytes >= (there - 6) * MIB
    assert done.sent_bytes + done.known_bytes == sum(map(len, contents(package).values())) - len(
        (package / "Meta-info/manifest.json").read_bytes()
    )
    pull(running.server(), "demo", tmp_path / "out", ANYBODY)
    assert contents(tmp_path / "out") == contents(package)


def test_an_update_fetches_only_chunks_that_are_not_here(serve: Serve, tmp_path: Path) -> None:
    running = serve()
    first, second = large(tmp_path / "a", 80), large(tmp_path / "b", 80, sequence=2, changed=3)
    push(running.server(), first)
    assert push(running.server(), second).sent_bytes < 6 * MIB
    done = pull(running.server(), "demo", tmp_path / "out", ANYBODY, known=[first])
    assert contents(tmp_path / "out") == contents(second)
    assert 3 * MIB <= done.traffic.fetched_bytes < 6 * MIB


def test_known_packages_that_rotted_are_not_believed(serve: Serve, tmp_path: Path) -> None:
    running, package = serve(), large(tmp_path, 4)
    push(running.server(), package)
    rotten = tmp_path / "rotten"
    shutil.copytree(package, rotten)
    file = rotten / "Model/demo/model.ptm"
    data = bytearray(file.read_bytes())
    data[2 * MIB + 5] ^= 1
    file.write_bytes(data)
    done = pull(running.server(), "demo", tmp_path / "out", ANYBODY, known=[rotten])
    assert contents(tmp_path / "out") == contents(package)
    assert done.traffic.fetched_bytes == MIB


@contextmanager
def corrupting(url: str, share: float) -> Iterator[tuple[str, list[int]]]:
    """A proxy that flips a byte in exactly so large a share of the MiB on their way to the client; counts bytes."""
    host, port = url.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    sent, lock = [0, 0], threading.Lock()

    def forward(source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if is_answer:
                    with lock:
                        sent[0] += len(data)
                        due = len(data) > 5000 and sent[1] + 0.5 < share * sent[0] / MIB
                        sent[1] += due
                    if due:
                        changed = bytearray(data)
                        changed[len(data) // 2] ^= 255
                        data = bytes(changed)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            with suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)
            source.close()

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((host, int(port)))
            for pair in ((client, server, False), (server, client, True)):
                begin(threading.Thread(target=forward, args=pair, daemon=True))

    def begin(thread: threading.Thread) -> None:
        threads.append(thread)
        thread.start()

    threads: list[threading.Thread] = []
    begin(threading.Thread(target=accept, daemon=True))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", sent
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in threads:
            thread.join(10)


def test_corrupted_chunks_alone_are_fetched_again(serve: Serve, tmp_path: Path) -> None:
    running, package = serve(plain=True), large(tmp_path, 64)
    push(running.server(), package)
    with corrupting(running.url, share=0.05) as (url, sent):
        done = pull(Server(url=url, token=running.token), "demo", tmp_path / "out", ANYBODY)
    assert contents(tmp_path / "out") == contents(package)
    assert 0 < done.traffic.bad_chunks <= sent[1]
    assert sent[0] < done.traffic.fetched_bytes + (done.traffic.bad_chunks + 1) * MIB


def test_a_line_that_corrupts_everything_is_given_up(serve: Serve, tmp_path: Path) -> None:
    running, package = serve(plain=True), large(tmp_path, 2)
    push(running.server(), package)
    with corrupting(running.url, share=1000) as (url, _), pytest.raises((IntegrityError, TransferError)):
        pull(Server(url=url, token=running.token), "demo", tmp_path / "out", ANYBODY)
    assert not (tmp_path / "out").exists()


def test_a_damaged_store_does_not_damage_the_client(serve: Serve, tmp_path: Path) -> None:
    running, package = serve(plain=True), large(tmp_path, 3)
    push(running.server(), package)
    largest = max((running.folder / "objects" / "chunks").glob("*/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[77] ^= 1
    largest.write_bytes(data)
    with pytest.raises(IntegrityError, match="came wrong 5 times"):
        pull(running.server(), "demo", tmp_path / "out", ANYBODY)
    largest.unlink()
    with pytest.raises(TransferError, match="gave up"):
        pull(running.server(tries=2), "demo", tmp_path / "out", ANYBODY)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_here_is_one_line_and_the_next_try_goes_on(
    serve: Serve, tmp_path: Path, full_disk: FullDisk
) -> None:
    running, package, out = serve(), large(tmp_path, 6), tmp_path / "out"
    push(running.server(), package)
    with full_disk(3 * MIB), pytest.raises(StorageError, match="cannot be written"):
        pull(running.server(), "demo", out, ANYBODY)
    assert not out.exists()
    pull(running.server(), "demo", out, ANYBODY)
    assert contents(out) == contents(package)


def test_too_little_space_is_said_before_anything_is_fetched(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, package = serve(), large(tmp_path, 2)
    push(running.server(), package)
    real = os.statvfs(tmp_path)
    tiny = os.statvfs_result((real.f_bsize, real.f_frsize, real.f_blocks, 10, 10, *tuple(real)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: tiny)
    with pytest.raises(StorageError, match="but the disk has"):
        pull(running.server(), "demo", tmp_path / "out", ANYBODY)
    assert staged_bytes(tmp_path / "out") == 0


def test_a_full_disk_at_the_server_refuses_and_heals(serve: Serve, tmp_path: Path) -> None:
    running, package = serve(as_process=True), large(tmp_path, 2)
    assert running.process
    limits = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (400_000, limits[1]))
    with pytest.raises(RefusalError, match="cannot be written") as caught:
        push(running.server(), package)
    assert caught.value.status == 507
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, limits)
    push(running.server(), package)
    pull(running.server(), "demo", tmp_path / "out", ANYBODY)
    assert contents(tmp_path / "out") == contents(package)


def test_progress_adds_up_to_the_package(serve: Serve, tmp_path: Path) -> None:
    class Counting(Silent):
        total = done = 0

        def begin(self, what: str, total_bytes: int) -> None:
            self.total = total_bytes

        def advance(self, num_bytes: int) -> None:
            self.done += num_bytes

    running, package = serve(), large(tmp_path, 3)
    sending, fetching = Counting(), Counting()
    push(running.server(), package, sending)
    pull(running.server(), "demo", tmp_path / "out", ANYBODY, known=[package], progress=fetching)
    assert sending.done == sending.total > 0
    assert fetching.done == fetching.total == sending.total
