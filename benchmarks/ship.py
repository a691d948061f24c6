"""How fast a package server sends, how long hundreds of clients wait, what a corrupting line costs.

    python benchmarks/ship.py FOLDER [--gb 0.5 4] [--clients 200] [--out benchmarks/results/ship.json]

FOLDER keeps a store between runs (as large as the largest size). Measured: bytes per CPU-second of the server process
(user + system, from /proc) while one client reads a whole file in ranges of 16 MiB, over HTTP and HTTPS, best of
three; the anchor is Starlette's FileResponse under the same uvicorn, loop and TLS. Then `--clients` connections from
one process that each ask for a random 64 KiB: paced at one request a second each, and without pause. Then a pull
through a proxy that flips a byte in 1 % of the 1 MiB chunks.

Prints tables, then one JSON line.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.remove(str(Path(__file__).resolve().parent))  # its names are those of folders of tests

from moestro.package.hashing import leaf_hashes, tree_root
from moestro.ship.store import Blob, Store
from moestro.ship.tls import own_certificate
from moestro.ship.transport import Connection, Server

MIB = 1 << 20
RUN = 16 * MIB
TICKS = os.sysconf("SC_CLK_TCK")
ANCHOR = """
import sys, ssl, uvicorn
from starlette.applications import Starlette
from starlette.responses import FileResponse
from starlette.routing import Route
from moestro.ship.tls import server_context
from pathlib import Path
async def show(request): return FileResponse(sys.argv[1])
app = Starlette(routes=[Route("/file", show)])
tls = server_context(Path(sys.argv[3]), Path(sys.argv[4])) if len(sys.argv) > 3 else None
config = uvicorn.Config(app, port=int(sys.argv[2]), access_log=False, log_level="warning",
                        ssl_context_factory=(lambda *_: tls) if tls else None)
uvicorn.Server(config).run()
"""


def cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def prepared(folder: Path, gigabytes: float) -> Blob:
    """A file of random bytes in the store, made where it is missing."""
    store = Store.open(folder / "store")
    name, total = folder / f"random-{gigabytes:g}", int(gigabytes * 1e9)
    leaves = bytearray()
    if not name.exists() or name.stat().st_size != total:
        with name.open("wb") as file:
            rng = random.Random(0)
            for start in range(0, total, MIB):
                file.write(rng.randbytes(min(MIB, total - start)))
    with name.open("rb") as file:
        while piece := file.read(RUN):
            leaves += leaf_hashes("sha256", piece, MIB)
        blob = Blob(tree_root("sha256", bytes(leaves)).hex(), total, "sha256", MIB)
        upload = store.open_upload("bench", blob, "bench")
        if upload is not None:
            store.declare(upload, bytes(leaves))
            upload = store.upload(upload.id)
            for number in sorted(set(range(blob.num_chunks)) - store.present(upload)):
                file.seek(number * MIB)
                store.put_chunk(upload, number, file.read(MIB), bytes(leaves))
            store.commit(upload.id)
    store.db.close()
    return blob


@contextmanager
def served(folder: Path, plain: bool) -> Iterator[tuple[Server, int]]:
    """Our server in a process; how to reach it, and its number."""
    settings = folder / "settings.toml"
    settings.write_text("port = 0\n[rates]\nrequests_per_s = 1e6\nburst_requests = 1000000\n")
    command = [sys.executable, "-m", "moestro", "serve-packages", str(folder / "store"), "--json"]
    command += ["--settings", str(settings)]
    process = subprocess.Popen(command + ["--plain"] * plain, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        table = json.loads(process.stdout.readline())
        token, authority = Path(table["admin_token"]).read_text().strip(), table.get("authority")
        yield Server(url=table["url"], token=token, authority=authority and Path(authority)), process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def anchored(folder: Path, file: Path, plain: bool) -> Iterator[tuple[Server, int]]:
    """Starlette's FileResponse in a process."""
    certificate, key, authority = own_certificate(folder / "tls", [])
    port = random.randrange(20000, 30000)
    files = [] if plain else [str(certificate), str(key)]
    process = subprocess.Popen([sys.executable, "-c", ANCHOR, str(file), str(port), *files])
    try:
        server = Server(url=f"http{'' if plain else 's'}://127.0.0.1:{port}", authority=None if plain else authority)
        wait_for(port)
        yield server, process.pid
    finally:
        process.terminate()
        process.wait()


def wait_for(port: int) -> None:
    """Until something listens there."""
    deadline = time.monotonic() + 120
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, "the anchor does not start"
        time.sleep(0.1)


def rate(server: Server, pid: int, path: str, size: int) -> tuple[float, float]:
    """(GB per CPU-second of the server, GB per second) for one file in ranges."""
    buffer = memoryview(bytearray(MIB))
    before, begin = cpu_s(pid), time.perf_counter()
    with Connection(server) as connection:
        for start in range(0, size, RUN):
            stop = min(start + RUN, size)
            with connection.stream("GET", path, {"Range": f"bytes={start}-{stop - 1}"}) as answer:
                assert answer.status == 206
                for at in range(start, stop, MIB):
                    answer.fill(buffer[: min(MIB, stop - at)])
    return size / 1e9 / (cpu_s(pid) - before), size / 1e9 / (time.perf_counter() - begin)


def speeds(folder: Path, sizes: list[float], repeats: int) -> list[dict[str, Any]]:
    """All rates."""
    rows = []
    for gigabytes in sizes:
        blob = prepared(folder, gigabytes)
        for plain in (True, False):
            kind = "HTTP" if plain else "HTTPS"
            with served(folder, plain) as (server, pid):
                ours = max(rate(server, pid, f"/v1/blobs/{blob.root}", blob.size) for _ in range(repeats))
            with anchored(folder, folder / f"random-{gigabytes:g}", plain) as (server, pid):
                theirs = max(rate(server, pid, "/file", blob.size) for _ in range(repeats))
            rows.append({"gb": gigabytes, "kind": kind, "ours": ours, "file_response": theirs})
            print(
                f"{kind:6} {gigabytes:4g} GB   ours {ours[0]:.2f} GB/CPU-s ({ours[1]:.2f} GB/s)   "
                f"FileResponse {theirs[0]:.2f} GB/CPU-s ({theirs[1]:.2f} GB/s)",
                flush=True,
            )
    return rows


async def waits(server: Server, blob: Blob, clients: int, pause_s: float, seconds: float) -> dict[str, float]:
    """Time from a request to the first byte of its answer's head, over all connections."""
    parts, found = urlsplit(server.url), list[float]()
    context = server.context()
    deadline = time.perf_counter() + seconds

    async def client(number: int) -> None:
        dice = random.Random(number)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=context)
        await asyncio.sleep(dice.random() * max(pause_s, 0.5))
        while time.perf_counter() < deadline:
            start = dice.randrange(blob.size - 65536)
            writer.write(
                f"GET /v1/blobs/{blob.root} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\n"
                f"Range: bytes={start}-{start + 65535}\r\n\r\n".encode()
            )
            begin = time.perf_counter()
            first = await reader.readexactly(1)
            found.append(time.perf_counter() - begin)
            assert first + await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(65536)
            await asyncio.sleep(max(0.0, pause_s - (time.perf_counter() - begin)))
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    found.sort()
    return {
        "requests": len(found),
        "per_s": len(found) / seconds,
        "median_ms": 1e3 * statistics.median(found),
        "p99_ms": 1e3 * found[int(0.99 * len(found))],
        "worst_ms": 1e3 * found[-1],
    }


def crowds(folder: Path, clients: int, gigabytes: float) -> list[dict[str, Any]]:
    """Waiting times of many clients."""
    rows, blob = [], prepared(folder, gigabytes)
    for plain in (True, False):
        for pause_s in (1.0, 0.0):
            with served(folder, plain) as (server, _):
                row = asyncio.run(waits(server, blob, clients, pause_s, seconds=10))
            kind, pace = "HTTP" if plain else "HTTPS", "one a second each" if pause_s else "without pause"
            rows.append({"kind": kind, "pace": pace, "clients": clients, **row})
            print(
                f"{kind:6} {clients} clients, {pace}: {row['per_s']:.0f} requests/s, first byte median "
                f"{row['median_ms']:.1f} ms, p99 {row['p99_ms']:.1f} ms, worst {row['worst_ms']:.1f} ms",
                flush=True,
            )
    return rows


def corruption(folder: Path) -> dict[str, Any]:
    """Extra traffic of a pull over a line that damages 1 % of the chunks."""
    from ship.test_transfer import corrupting, large  # the tests' proxy

    from moestro.ship.pull import Guard, pull
    from moestro.ship.push import push

    work = folder / "corruption"
    shutil.rmtree(work, ignore_errors=True)
    package = large(work, 800)
    with served(work, plain=True) as (server, _):
        push(server, package)
        with corrupting(server.url, share=0.01) as (url, sent):
            done = pull(Server(url=url, token=server.token), "demo", work / "out", Guard(trust=None))
    needed = done.traffic.fetched_bytes
    bad, extra = done.traffic.bad_chunks, 100 * (sent[0] / needed - 1)
    row = {"bad_chunks": bad, "bytes": needed, "bad_percent": 100 * bad * MIB / needed, "extra_percent": extra}
    print(f"1 % corrupted: {bad} bad chunks of {needed // MIB}, {extra:.3f} % extra traffic, heads of answers included")
    shutil.rmtree(work)
    return row


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, nargs="+", default=[0.5, 4])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["speed", "crowd", "corruption"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.parts == ["prepare"]:
        for gigabytes in args.gb:
            prepared(args.folder, gigabytes)
        return
    result: dict[str, Any] = {"bench": "ship", "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count()}
    result |= {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()}
    result |= {"openssl": ssl.OPENSSL_VERSION}
    if "speed" in args.parts:
        result["speed"] = speeds(args.folder, args.gb, args.repeats)
    if "crowd" in args.parts:
        result["crowd"] = crowds(args.folder, args.clients, min(args.gb))
    if "corruption" in args.parts:
        result["corruption"] = corruption(args.folder)
    print(json.dumps(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
