"""The REST interface of a real server process over TLS: what it gives, to whom, and what it refuses."""

import base64
import hashlib
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from package.samples import save_model, tensors
from ship.conftest import Make, Running, Serve

from moestro.core.errors import AccessError, ConfigError, RefusalError, TransferError
from moestro.package.api import MANIFEST, Manifest, Options, Release, new_key, pack, save_pair, sign_package
from moestro.package.residual import diff
from moestro.ship.gate import REMEMBER_S
from moestro.ship.pull import Guard, pull
from moestro.ship.push import push
from moestro.ship.transport import Connection, Server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for this file, with release 1 of `demo`."""
    folder = tmp_path_factory.mktemp("server")
    started = Running(folder / "store", {"public": ["open-*"]}, as_process=True).start()
    out = folder / "package"
    pack(save_model(folder / "model", tensors()), out, Options(release=Release(package_id="demo")))
    push(started.server(), out)
    yield started
    started.stop()


@pytest.fixture
def connection(running: Running) -> Iterator[Connection]:
    with Connection(running.server(tries=1)) as opened:
        yield opened


@pytest.fixture
def largest(running: Running) -> tuple[str, bytes]:
    """Root and bytes of the model's file."""
    manifest = Manifest.parse((running.folder.parent / "package" / MANIFEST).read_bytes())
    entry = max(manifest.files, key=lambda entry: entry.size)
    return entry.root, (running.folder.parent / "package" / entry.path).read_bytes()


@pytest.mark.parametrize(
    ("text", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-", 10, None),
        ("bytes=-7", -7, None),
        ("bytes=1048570-1048590", 1048570, 1048591),
        ("bytes=5-99999999999", 5, None),
    ],
)
def test_ranges(connection: Connection, largest: tuple[str, bytes], text: str, start: int, stop: int | None) -> None:
    root, data = largest
    answer, body = connection.call("GET", f"/v1/blobs/{root}", {"Range": text})
    assert answer.status == 206
    assert body == data[start:stop]
    begin = start % len(data)
    assert answer.header("Content-Range") == f"bytes {begin}-{begin + len(body) - 1}/{len(data)}"


@pytest.mark.parametrize("text", ["bytes=0-1,5-6", "lines=1-2", "bytes=9-3", "bytes=-", "bytes=a-b"])
def test_ranges_that_mean_nothing_give_the_whole_file(
    connection: Connection, largest: tuple[str, bytes], text: str
) -> None:
    answer, body = connection.call("GET", f"/v1/blobs/{largest[0]}", {"Range": text})
    assert (answer.status, body) == (200, largest[1])


def test_a_range_outside_the_file_is_416(connection: Connection, largest: tuple[str, bytes]) -> None:
    with pytest.raises(RefusalError, match="outside") as caught:
        connection.call("GET", f"/v1/blobs/{largest[0]}", {"Range": "bytes=99999999999-"})
    assert caught.value.status == 416


def test_validators_save_the_transfer(connection: Connection, largest: tuple[str, bytes]) -> None:
    root, data = largest
    tag = {"If-None-Match": f'"{root}"'}
    assert connection.call("GET", f"/v1/blobs/{root}", tag)[0].status == 304
    other = {"Range": "bytes=0-9", "If-Range": '"other"'}
    assert connection.call("GET", f"/v1/blobs/{root}", other)[1] == data
    answer, body = connection.call("HEAD", f"/v1/blobs/{root}")
    assert (answer.header("Content-Length"), body) == (str(len(data)), b"")
    head, _ = connection.call("GET", "/v1/packages/demo")
    assert connection.call("GET", "/v1/packages/demo", {"If-None-Match": head.header("ETag")})[0].status == 304


def test_tokens_reach_what_their_scopes_name(running: Running, largest: tuple[str, bytes]) -> None:
    own, foreign = running.token_for("read:demo"), running.token_for("publish:other", "read:open-*")
    with Connection(running.server(own, tries=1)) as connection:
        assert connection.json("GET", "/v1/packages")["packages"][0]["package_id"] == "demo"
        with pytest.raises(AccessError, match="may not publish demo"):
            connection.json("POST", "/v1/packages/demo", {"manifest": ""})
        with pytest.raises(AccessError, match="may not admin"):
            connection.json("GET", "/v1/audit")
        with pytest.raises(AccessError, match="may not admin"):
            connection.json("DELETE", "/v1/packages/demo/1")
    with Connection(running.server(foreign, tries=1)) as connection:
        assert connection.json("GET", "/v1/packages") == {"packages": []}
        with pytest.raises(AccessError, match="may not read demo"):
            connection.json("GET", "/v1/packages/demo")
        for path in (f"/v1/blobs/{largest[0]}", f"/v1/blobs/{largest[0]}/chunks"):
            with pytest.raises(RefusalError, match="no file"):
                connection.call("GET", path)
    with Connection(running.server(None, tries=1)) as connection:
        for path in ("/v1/packages/demo", f"/v1/blobs/{largest[0]}"):
            with pytest.raises(AccessError, match="token"):
                connection.call("GET", path)
    with (
        Connection(running.server("moe_0000000000000000_" + "x" * 43, tries=1)) as connection,
        pytest.raises(AccessError, match="not one of this store"),
    ):
        connection.call("GET", "/v1/packages")


def test_a_revoked_token_is_refused_soon(running: Running) -> None:
    from moestro.ship.database import Database
    from moestro.ship.tokens import revoke_token

    token = running.token_for("read:demo")
    with Connection(running.server(token, tries=1)) as connection:
        connection.json("GET", "/v1/packages/demo")
        db = Database(f"sqlite://{running.folder.absolute()}/store.db")
        revoke_token(db, token.split("_")[1])
        db.close()
        time.sleep(REMEMBER_S + 0.5)
        with pytest.raises(AccessError, match="revoked"):
            connection.json("GET", "/v1/packages/demo")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/packages/nothing", None, 404),
        ("GET", "/v1/packages/..%2f..%2fetc", None, 404),
        ("GET", "/v1/packages/-x", None, 422),
        ("GET", "/v1/packages/demo/9/manifest", None, 404),
        ("GET", "/v1/packages/demo/1/manifest.sig", None, 404),
        ("GET", f"/v1/blobs/{'0' * 64}", None, 404),
        ("GET", "/v1/blobs/../../etc/passwd", None, 404),
        ("GET", "/v1/updates/demo?base=zz", None, 404),
        ("GET", "/v1/packages/demo/transfer?base=x&target=1", None, 400),
        ("GET", "/v1/models?limit=-1", None, 400),
        ("GET", "/v1/uploads/none", None, 404),
        ("POST", "/v1/uploads", b"not json", 422),
        ("POST", "/v1/uploads", b'{"a":1,"a":2}', 422),
        ("POST", "/v1/uploads", b"[" * 10000, 413),
        ("POST", "/v1/uploads", b" " * 70000, 413),
        ("POST", "/v1/packages/demo", b'{"manifest":"%%%"}', 422),
        ("POST", "/v1/packages/demo", b'{"manifest":"e30="}', 422),
        ("PUT", "/v1/uploads/none/0", b"x", 404),
        ("DELETE", "/v1/packages/demo/7", None, 404),
        ("POST", "/v1/devices/..x/reports", b"{}", 422),
        ("PATCH", "/v1/packages", None, 405),
        ("GET", "/nowhere", None, 404),
    ],
)
def test_bad_requests_get_their_status(
    connection: Connection, method: str, path: str, body: bytes | None, status: int
) -> None:
    with pytest.raises(RefusalError) as caught:
        connection.call(method, path, body=body)
    assert caught.value.status == status


def test_publishing_keeps_the_order_and_needs_all_files(
    running: Running, connection: Connection, make: Make, tmp_path: Path
) -> None:
    second, other = make(sequence=2, seed=2), make(sequence=2, seed=3)
    body = {"manifest": base64.b64encode((second / MANIFEST).read_bytes()).decode()}
    with pytest.raises(RefusalError, match="not uploaded yet"):
        connection.json("POST", "/v1/packages/demo", body)
    with pytest.raises(RefusalError, match="of package demo, not other"):
        connection.json("POST", "/v1/packages/other", body)
    assert push(running.server(), second).is_new
    assert not push(running.server(), second).is_new
    with pytest.raises(RefusalError, match="with other content; use 3"):
        push(running.server(), other)
    with pytest.raises(RefusalError, match="at 2 already; use 3"):
        push(running.server(), make(sequence=1, seed=4))
    with pytest.raises(RefusalError, match="has expired"):
        push(running.server(), make(sequence=3, seed=5, expires_at="2020-01-01T00:00:00Z"))
    connection.json("DELETE", "/v1/packages/demo/2")
    assert connection.json("GET", "/v1/packages/demo")["sequence"] == 1
    with pytest.raises(RefusalError, match="revoked") as caught:
        connection.call("GET", "/v1/packages/demo/2/manifest")
    assert caught.value.status == 410
    with pytest.raises(RefusalError, match="revoked"):
        push(running.server(), second)
    lines = connection.json("GET", "/v1/audit")
    assert lines["broken_at"] is None
    done = [(line["action"], line["outcome"][:7]) for line in lines["lines"]]
    assert ("revoke", "done") in done
    assert ("publish", "refused") in done


def test_a_server_that_trusts_keys_takes_only_signed_releases(serve: Serve, make: Make, tmp_path: Path) -> None:
    for name in ("good", "bad"):
        save_pair(new_key("ed25519"), tmp_path / name)
    running, package = serve(trust=[str(tmp_path / "good.pub")]), make()
    with pytest.raises(RefusalError, match="not signed"):
        push(running.server(), package)
    sign_package(package, tmp_path / "bad")
    with pytest.raises(RefusalError, match="0 trusted keys"):
        push(running.server(), package)
    sign_package(package, tmp_path / "good")
    assert push(running.server(), package).is_new


def test_updates_are_found_along_the_cheapest_chain(serve: Serve, tmp_path: Path) -> None:
    running, packages, weights = serve(), [], tensors()
    for sequence in (1, 2, 3):
        weights["scale"] = np.array(weights["scale"] + sequence)
        packages.append(tmp_path / str(sequence))
        pack(
            save_model(tmp_path / f"m{sequence}", weights),
            packages[-1],
            Options(release=Release(package_id="demo", sequence=sequence)),
        )
        push(running.server(), packages[-1])
        if sequence > 1:
            diff([packages[-2]], packages[-1], tmp_path / f"u{sequence}")
            push(running.server(), tmp_path / f"u{sequence}")
    roots = [Manifest.parse((path / MANIFEST).read_bytes()).models[0].weights_root for path in packages]
    with Connection(running.server(tries=1)) as connection:
        found = connection.json("GET", f"/v1/updates/demo?base={roots[0]}")
        assert [step["sequence"] for step in found["steps"]] == [2, 3]
        assert [step["sequence"] for step in connection.json("GET", f"/v1/updates/demo?base={roots[1]}")["steps"]] == [
            3
        ]
        with pytest.raises(RefusalError, match="no residual update"):
            connection.json("GET", f"/v1/updates/demo?base={'a' * 64}")
        diff([packages[0]], packages[2], tmp_path / "direct")
        push(running.server(), tmp_path / "direct")
        direct = connection.json("GET", f"/v1/updates/demo?base={roots[0]}")
        assert [step["sequence"] for step in direct["steps"]] == [3]
        assert direct["bytes"] < found["bytes"] < direct["full_bytes"]
        route = connection.json("GET", "/v1/packages/demo/transfer?base=1&target=3")
        assert route["update_bytes"] == direct["bytes"]
        assert route["chunk_bytes"] <= route["full_bytes"]


def test_chunks_are_checked_against_their_header_too(connection: Connection) -> None:
    data = b"hello"
    root = hashlib.sha256(b"\0" + data).hexdigest()
    wish = {"package_id": "demo", "root": root, "size": 5, "hash": "sha256", "chunk_size": 1 << 16}
    upload = connection.json("POST", "/v1/uploads", wish)["id"]
    with pytest.raises(RefusalError, match="Content-Digest"):
        connection.call("PUT", f"/v1/uploads/{upload}/0", {"Content-Digest": "sha-256=:AAAA:"}, data)
    digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
    connection.call("PUT", f"/v1/uploads/{upload}/0", {"Content-Digest": f"sha-256=:{digest}:"}, data)
    assert connection.json("POST", f"/v1/uploads/{upload}:commit")["size"] == 5


def test_the_openapi_document_is_valid_and_complete(connection: Connection) -> None:
    document = connection.json("GET", "/openapi.json")
    assert {"/v1/blobs/{root}", "/v1/uploads/{upload_id}:commit", "/healthz"} <= document["paths"].keys()
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(document)


def test_metrics_and_health_need_no_token(running: Running) -> None:
    with Connection(running.server(None, tries=1)) as connection:
        assert connection.json("GET", "/healthz") == {"status": "ok"}
        text = connection.call("GET", "/metrics")[1].decode()
    assert 'route="/v1/blobs/{root}"' in text
    sent = next(line for line in text.splitlines() if line.startswith("moestro_ship_sent_bytes_total"))
    assert float(sent.split()[1]) > 0


def test_reports_of_devices_are_kept(running: Running, connection: Connection) -> None:
    table = {"package_id": "demo", "sequence": 1, "state": "active", "weights_root": "a" * 64}
    with Connection(running.server(running.token_for("read:demo"), tries=1)) as device:
        device.json("POST", "/v1/devices/robot-1/reports", table)
        with pytest.raises(RefusalError, match="state is"):
            device.json("POST", "/v1/devices/robot-1/reports", table | {"state": "on fire"})
        assert device.json("GET", "/v1/devices") == {"devices": []}
    assert connection.json("GET", "/v1/devices")["devices"][0]["device_id"] == "robot-1"


def test_rates_are_limited_per_client(serve: Serve) -> None:
    running = serve(plain=True, rates={"requests_per_s": 1, "burst_requests": 5})
    with Connection(running.server(tries=1)) as connection:
        for _ in range(5):
            connection.json("GET", "/v1/packages")
        with pytest.raises(TransferError, match="too many requests"):
            connection.json("GET", "/v1/packages")
    with Connection(running.server(tries=4)) as connection:
        connection.json("GET", "/v1/packages")  # Retry-After is heeded
    with Connection(running.server("moe_wrong", tries=1)) as connection:
        for _ in range(20):
            with pytest.raises(AccessError):
                connection.json("GET", "/v1/packages")
        with pytest.raises(TransferError, match="refused tokens"):
            connection.json("GET", "/v1/packages")


def test_endless_headers_are_cut_off(running: Running) -> None:
    host, port = running.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=str(running.authority))
    with socket.create_connection((host, int(port)), 10) as raw, context.wrap_socket(raw, server_hostname=host) as tls:
        tls.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")

        def go_on() -> None:
            for _ in range(100):
                tls.sendall(b"X-Long: " + b"a" * 8000 + b"\r\n")
                time.sleep(0.001)

        with pytest.raises((ConnectionError, ssl.SSLError)):
            go_on()


def test_tls_is_on_checked_and_modern(running: Running) -> None:
    assert running.url.startswith("https://")
    with Connection(Server(url=running.url, tries=1)) as unknown, pytest.raises(AccessError, match="not trusted"):
        unknown.json("GET", "/healthz")
    host, port = running.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=str(running.authority))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, int(port))) as raw, context.wrap_socket(raw, server_hostname=host) as tls:
        assert tls.version() == "TLSv1.2"
    assert (running.folder / "tls" / "authority.key").stat().st_mode & 0o777 == 0o600
    assert (running.folder / "admin.token").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="not sent without TLS"):
        Server(url="http://models.example", token="moe_x")


def test_a_public_package_needs_no_token(running: Running, make: Make, tmp_path: Path) -> None:
    package = make(package_id="open-demo")
    push(running.server(), package)
    done = pull(running.server(None), "open-demo", tmp_path / "out", Guard(trust=None))
    assert done.traffic.fetched_bytes > 0


def test_the_list_of_packages_is_json_for_machines(connection: Connection) -> None:
    listed = connection.json("GET", "/v1/models?q=demo")["models"]
    assert json.dumps(listed).count("weights_root") >= 1
    assert connection.json("GET", "/v1/models/demo")["managementinfo"]["license"] == "mit"


def test_a_damaged_store_is_scrubbed_and_healed_by_pushing_again(serve: Serve, make: Make, tmp_path: Path) -> None:
    running, package = serve(), make()
    push(running.server(), package)
    largest = max((running.folder / "objects" / "chunks").glob("*/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(100))
    command = [sys.executable, "-m", "moestro", "collect-garbage", str(running.folder), "--scrub", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, len(json.loads(found.stdout)["damaged"])) == (1, 1)
    done = push(running.server(), package)
    assert not done.is_new
    assert done.sent_bytes > 0
    pull(running.server(), "demo", tmp_path / "out", Guard(trust=None))
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_over_plain_http_files_reach_slow_and_leaving_clients(serve: Serve, tmp_path: Path) -> None:
    """The kernel copies files to sockets by itself (`ship.sendfile`); full sockets are waited for."""
    weights = {"w": np.random.default_rng(0).integers(0, 255, 12 << 20, np.uint8)}
    pack(save_model(tmp_path / "model", weights), tmp_path / "p", Options(release=Release(package_id="demo")))
    running = serve(plain=True)
    push(running.server(), tmp_path / "p")
    entry = max(Manifest.parse((tmp_path / "p" / MANIFEST).read_bytes()).files, key=lambda file: file.size)
    right = (tmp_path / "p" / entry.path).read_bytes()
    host, port = running.url.removeprefix("http://").split(":")
    request = f"GET /v1/blobs/{entry.root} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.token}\r\n\r\n"
    with socket.create_connection((host, int(port))) as leaving:
        leaving.sendall(request.encode())
        leaving.recv(1 << 16)
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall((request * 2).encode())  # the second one is answered behind the first, on the same line
        time.sleep(0.3)
        with slow.makefile("rb") as lines:
            for _ in range(2):
                assert lines.readline() == b"HTTP/1.1 200 OK\r\n"
                while lines.readline() != b"\r\n":
                    pass
                assert lines.read(len(right)) == right
