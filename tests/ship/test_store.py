"""The store itself: chunks once, uploads that go on, nothing without proof, garbage and damage, on every backend."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moestro.core.errors import IntegrityError, RefusalError, StorageError
from moestro.package.hashing import SIZE, leaf_hashes, tree_root
from moestro.ship import audit
from moestro.ship.store import Blob, Quotas, Store

CHUNK = 1 << 16
BINARIES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


def blob_of(data: bytes) -> tuple[Blob, bytes]:
    """A blob and its leaves."""
    leaves = leaf_hashes("sha256", data, CHUNK)
    return Blob(tree_root("sha256", leaves).hex(), len(data), "sha256", CHUNK), leaves


def send(store: Store, package_id: str, data: bytes, skip: tuple[int, ...] = ()) -> int:
    """Upload all chunks but some; returns how many had to be sent."""
    blob, leaves = blob_of(data)
    upload = store.open_upload(package_id, blob, "tester")
    if upload is None:
        return 0
    if not upload.declared:
        store.declare(upload, leaves)
        upload = store.upload(upload.id)
    sent = 0
    for number in sorted(set(range(blob.num_chunks)) - store.present(upload) - set(skip)):
        store.put_chunk(upload, number, data[number * CHUNK : (number + 1) * CHUNK], leaves)
        sent += 1
    if not skip:
        store.commit(upload.id)
    return sent


def noise(seed: int, chunks: float) -> bytes:
    """So many chunks of random bytes."""
    import random

    return random.Random(seed).randbytes(int(chunks * CHUNK))


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server for these tests only."""
    pytest.importorskip("psycopg")
    if BINARIES is None or not shutil.which("runuser"):
        pytest.skip("needs Debian's PostgreSQL")
    folder = Path(f"/tmp/moestro-pg-{os.getpid()}")  # a short path: sockets have at most 107 bytes
    folder.mkdir()
    shutil.chown(folder, "postgres")

    def run(*command: str) -> None:
        subprocess.run(["runuser", "-u", "postgres", "--", *command], check=True, cwd="/", stdout=subprocess.DEVNULL)

    try:
        data = folder / "data"
        run(str(BINARIES / "initdb"), "-D", str(data), "-A", "trust", "--no-sync")
        options = f"-k {folder} -c listen_addresses= -c fsync=off"
        run(str(BINARIES / "pg_ctl"), "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
        yield f"postgresql://postgres@/postgres?host={folder}"
        run(str(BINARIES / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3-compatible server (moto) in a process of its own, with an empty bucket."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto.server", exc_type=ImportError)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "log").open("wb")
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    before = {key: os.environ.get(key) for key in keys}
    os.environ.update(keys)
    try:
        endpoint, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="models")
        yield f"s3://models/here?endpoint={endpoint}"
    finally:
        server.kill()
        server.wait()
        log.close()
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})


@pytest.fixture(params=["files", "postgres", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store on each backend."""
    urls: dict[str, Any] = {}
    if request.param == "postgres":
        urls["database"] = request.getfixturevalue("postgres")
    if request.param == "s3":
        urls["objects"] = request.getfixturevalue("bucket")
    opened = Store.open(tmp_path / "store", **urls)
    yield opened
    for table in ("upload", "received", "holding", "blob", "audit"):
        opened.db.run(f"DELETE FROM {table}")
    for kind in ("chunks", "leaves"):
        for key, _, _ in list(opened.objects.keys(kind)):
            opened.objects.delete(key)
    opened.db.close()


def test_a_file_goes_in_and_comes_out_in_parts(anywhere: Store) -> None:
    data = noise(1, 3.5)
    assert send(anywhere, "demo", data) == 4
    blob = anywhere.blob(blob_of(data)[0].root)
    assert blob
    assert anywhere.read(blob) == data
    assert anywhere.read(blob, CHUNK - 5, 2 * CHUNK + 5) == data[CHUNK - 5 : 2 * CHUNK + 5]
    assert anywhere.holders(blob.root) == ["demo"]


def test_a_broken_upload_goes_on_and_shared_chunks_are_not_sent_again(anywhere: Store) -> None:
    first = noise(1, 4)
    assert send(anywhere, "demo", first, skip=(2,)) == 3
    with pytest.raises(RefusalError, match="1 of 4 chunks are missing"):
        anywhere.commit(anywhere.db.value("SELECT id FROM upload"))
    assert send(anywhere, "demo", first) == 1
    second = first[: 3 * CHUNK] + noise(2, 1)
    assert send(anywhere, "demo", second) == 1
    assert send(anywhere, "demo", second) == 0
    assert len(list(anywhere.objects.keys("chunks"))) == 5


def test_another_package_gains_nothing_by_naming_a_digest(anywhere: Store) -> None:
    data = noise(1, 2)
    send(anywhere, "demo", data)
    assert send(anywhere, "other", data) == 2, "chunks of another package count as missing"
    assert len(list(anywhere.objects.keys("chunks"))) == 2


def test_collection_keeps_what_is_wanted_and_removes_the_rest(anywhere: Store) -> None:
    kept, dropped = noise(1, 2), noise(2, 3)
    send(anywhere, "demo", kept)
    send(anywhere, "demo", dropped)
    root = blob_of(kept)[0].root
    anywhere.db.run(
        "INSERT INTO release (package_id, sequence, package_root, kind, size, manifest, created_at, published, "
        "publisher) VALUES ('demo', 1, 'r', 'full', 1, ?, '', 0, 'me')",
        b"",
    )
    anywhere.db.run("INSERT INTO release_file VALUES ('demo', 'r', 'p', ?, 1)", root)
    assert send(anywhere, "demo", noise(3, 2), skip=(1,)) == 1
    assert anywhere.collect(3600).objects == 0, "all of it is young"
    done = anywhere.collect(-10)
    assert (done.uploads, done.files) == (1, 1)
    assert anywhere.read(blob_of(kept)[0]) == kept
    assert len(list(anywhere.objects.keys("chunks"))) == 2
    anywhere.db.run("DELETE FROM release")
    anywhere.db.run("DELETE FROM release_file")
    anywhere.collect(-10)
    assert list(anywhere.objects.keys("chunks")) == list(anywhere.objects.keys("leaves")) == []


def test_an_unfinished_upload_survives_a_collection(anywhere: Store) -> None:
    data = noise(1, 3)
    send(anywhere, "demo", data, skip=(2,))
    for key, _, _ in anywhere.objects.keys("chunks"):
        assert anywhere.objects.exists(key)
    anywhere.db.run("UPDATE upload SET touched = touched + 1000")
    anywhere.collect(-10)
    assert send(anywhere, "demo", data) == 1


def test_the_audit_log_shows_where_it_was_changed(anywhere: Store) -> None:
    for number in range(5):
        audit.record(anywhere.db, "me", "here", "publish", f"demo/{number}", "done")
    assert audit.check(anywhere.db) is None
    assert [line["target"] for line in audit.lines(anywhere.db, 2)] == ["demo/3", "demo/4"]
    anywhere.db.run("UPDATE audit SET outcome = 'refused' WHERE number = 3")
    assert audit.check(anywhere.db) == 3
    anywhere.db.run("DELETE FROM audit WHERE number = 2")
    assert audit.check(anywhere.db) == 2


def test_an_empty_file_has_no_chunks(store: Store) -> None:
    assert send(store, "demo", b"") == 0
    blob = store.blob(blob_of(b"")[0].root)
    assert blob
    assert store.read(blob) == b""


@pytest.mark.parametrize("wrong", [b"", b"x" * CHUNK, noise(1, 1)[:-1]])
def test_a_wrong_chunk_is_refused(store: Store, wrong: bytes) -> None:
    data = noise(1, 2)
    blob, leaves = blob_of(data)
    upload = store.open_upload("demo", blob, "me")
    assert upload
    store.declare(upload, leaves)
    with pytest.raises(RefusalError, match="not what its leaf promises"):
        store.put_chunk(store.upload(upload.id), 0, wrong, leaves)
    assert store.present(upload) == set()


def test_leaves_must_make_the_root(store: Store) -> None:
    blob, leaves = blob_of(noise(1, 2))
    upload = store.open_upload("demo", blob, "me")
    assert upload
    with pytest.raises(RefusalError, match="not the leaves"):
        store.declare(upload, leaves[SIZE:] + leaves[:SIZE])
    assert list(store.objects.keys("leaves")) == []


def test_quotas_are_kept(tmp_path: Path) -> None:
    limits = Quotas(max_file_bytes=4 * CHUNK, max_package_bytes=5 * CHUNK, max_open_uploads=2)
    store = Store.open(tmp_path, quotas=limits)
    with pytest.raises(RefusalError, match="at most"):
        send(store, "demo", noise(1, 5))
    send(store, "demo", noise(1, 4))
    with pytest.raises(RefusalError, match="more than its"):
        send(store, "demo", noise(2, 2))
    send(store, "demo", noise(3, 0.1), skip=(0,))
    send(store, "demo", noise(4, 0.1), skip=(0,))
    with pytest.raises(RefusalError, match="unfinished uploads"):
        send(store, "demo", noise(5, 0.1))
    store.db.close()


def test_damage_is_found_and_said(store: Store) -> None:
    data = noise(1, 3)
    send(store, "demo", data)
    assert store.scrub() == []
    blob, leaves = blob_of(data)
    path = store.objects.folder / "chunks" / leaves[:1].hex() / leaves[:SIZE].hex()  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert store.scrub() == [blob.root]
    path.unlink()
    with pytest.raises(StorageError, match="missing"):
        store.read(blob)
    leaf_file = store.objects.folder / "leaves" / blob.root[:2] / blob.root  # type: ignore[attr-defined]
    leaf_file.write_bytes(bytes(len(leaves)))
    with pytest.raises(IntegrityError, match="damaged"):
        store.leaves(blob)
