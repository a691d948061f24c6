"""The content-addressed store: chunks by their leaf hash, files ("blobs") as lists of leaves by their tree root.

    upload   open -> declare leaves -> put what is missing -> commit      every step can be repeated
    read     blob(root), leaves(blob), read(blob, start, stop)

A file of a package is known by the tree root that its manifest gives, so the store proves what it keeps without
opening any of it, and a chunk that two releases share lies there once. A package *holds* the blobs that were uploaded
to it: what one package holds is neither readable through another nor taken over from it, so nobody gains bytes by
naming a digest.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moestro.core.errors import IntegrityError, RefusalError, StorageError
from moestro.core.units import bytes_text
from moestro.package.hashing import SIZE, check_hash, leaf_hashes, tree_root
from moestro.package.limits import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES
from moestro.package.paths import check_model_id
from moestro.ship.database import Database
from moestro.ship.objects import Objects, open_objects

TOUCH_EVERY = 32
"""Received chunks after which an upload counts as alive again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quotas:
    """What one package may take."""

    max_file_bytes: int = 1 << 44
    max_package_bytes: int = 1 << 44
    """Files that a package holds, all releases together, shared ones once."""
    max_open_uploads: int = 64
    max_releases: int = 10_000


@dataclass(frozen=True, slots=True)
class Blob:
    """A file by its content."""

    root: str
    size: int
    hash: str
    chunk_size: int

    @property
    def num_chunks(self) -> int:
        """An empty file has none."""
        return -(-self.size // self.chunk_size)

    def chunk_bytes(self, number: int) -> int:
        """Bytes of one chunk; the last may have fewer."""
        return min(self.chunk_size, self.size - number * self.chunk_size)

    def check(self) -> None:
        """Raises RefusalError for numbers that no package can have."""
        check_hash(self.hash)
        wrong = self.chunk_size & (self.chunk_size - 1) or not MIN_CHUNK_BYTES <= self.chunk_size <= MAX_CHUNK_BYTES
        if wrong or self.size < 0:
            raise RefusalError(f"a file of {self.size} bytes in chunks of {self.chunk_size} is not possible", 422)


@dataclass(frozen=True, slots=True)
class Upload:
    """A blob on its way into a package."""

    id: str
    package_id: str
    blob: Blob
    declared: bool
    """True once its leaves are known."""


@dataclass(slots=True)
class Store:
    """Tables and objects; safe to use from many threads and processes at once."""

    db: Database
    objects: Objects
    quotas: Quotas = field(default_factory=Quotas)

    @classmethod
    def open(
        cls, folder: Path, database: str | None = None, objects: str | None = None, quotas: Quotas | None = None
    ) -> "Store":
        """Below `folder` unless URLs say otherwise."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        db = Database(database or f"sqlite://{(folder / 'store.db').absolute()}")
        return cls(db, open_objects(objects or str(folder / "objects")), quotas or Quotas())

    # reading

    def blob(self, root: str) -> Blob | None:
        """A complete file, or None."""
        row = self.db.row("SELECT root, size, hash, chunk_size FROM blob WHERE root = ?", root)
        return Blob(*row) if row else None

    def holders(self, root: str) -> list[str]:
        """The packages that hold a blob."""
        return [row[0] for row in self.db.rows("SELECT package_id FROM holding WHERE root = ?", root)]

    def leaves(self, blob: Blob) -> bytes:
        """Its leaf hashes, joined; checked against the root, so that a damaged store says so itself."""
        if blob.num_chunks <= 1:
            return bytes.fromhex(blob.root) if blob.num_chunks else b""
        leaves = self.objects.read(f"leaves/{blob.root}", 0, blob.num_chunks * SIZE)
        if tree_root(blob.hash, leaves).hex() != blob.root:
            raise IntegrityError(f"leaves/{blob.root}", "the store's copy is damaged")
        return leaves

    def spans(self, blob: Blob, leaves: bytes, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """(key, from, to) of the objects' parts that make bytes [start, stop)."""
        while start < stop:
            number, inside = divmod(start, blob.chunk_size)
            count = min(blob.chunk_bytes(number) - inside, stop - start)
            yield _chunk_key(leaves, number), inside, inside + count
            start += count

    def read(self, blob: Blob, start: int = 0, stop: int | None = None) -> bytes:
        """A part of a file, for small ones."""
        stop = blob.size if stop is None else stop
        return b"".join(self.objects.read(*span) for span in self.spans(blob, self.leaves(blob), start, stop))

    # writing

    def open_upload(self, package_id: str, blob: Blob, owner: str) -> Upload | None:
        """A new or resumed upload; None where the package holds the blob already.

        raises   RefusalError 413 or 429 where a quota is reached
        """
        check_model_id(package_id, "package_id")
        blob.check()
        upload_id = hashlib.sha256(f"{package_id}/{blob.root}".encode()).hexdigest()[:32]
        with self.db.alone():
            if self.db.row("SELECT 1 FROM holding WHERE package_id = ? AND root = ?", package_id, blob.root):
                self._hold(package_id, blob.root)
                return None
            known = self._find_upload(upload_id)
            if known and known.blob == blob:
                self.db.run("UPDATE upload SET touched = ? WHERE id = ?", _now(), upload_id)
                return known
            self._forget_upload(upload_id)
            self._check_quotas(package_id, blob)
            single = blob.num_chunks <= 1
            self.db.run(
                "INSERT INTO upload (id, package_id, root, size, hash, chunk_size, owner, declared, touched) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                *(upload_id, package_id, blob.root, blob.size, blob.hash, blob.chunk_size, owner, int(single), _now()),
            )
        return Upload(upload_id, package_id, blob, single)

    def _check_quotas(self, package_id: str, blob: Blob) -> None:
        quotas = self.quotas
        held = self.db.value(
            "SELECT COALESCE(SUM(blob.size), 0) FROM holding JOIN blob ON blob.root = holding.root "
            "WHERE holding.package_id = ?",
            package_id,
        )
        coming, count = self.db.row(  # type: ignore[misc]  # an aggregate has exactly one row
            "SELECT COALESCE(SUM(size), 0), COUNT(*) FROM upload WHERE package_id = ?", package_id
        )
        if count >= quotas.max_open_uploads:
            raise RefusalError(f"{package_id} has {count} unfinished uploads; finish some or wait a day", 429)
        if blob.size > quotas.max_file_bytes:
            limit = bytes_text(quotas.max_file_bytes)
            raise RefusalError(f"a file has {bytes_text(blob.size)}; this store takes at most {limit}", 413)
        if int(held) + int(coming) + blob.size > quotas.max_package_bytes:
            limit = bytes_text(quotas.max_package_bytes)
            raise RefusalError(f"{package_id} would take more than its {limit} on this store; revoke releases", 413)

    def upload(self, upload_id: str) -> Upload:
        """By id; raises RefusalError 404."""
        found = self._find_upload(upload_id)
        if found is None:
            raise RefusalError("there is no such upload; open it again", 404)
        return found

    def _find_upload(self, upload_id: str) -> Upload | None:
        row = self.db.row(
            "SELECT id, package_id, root, size, hash, chunk_size, declared FROM upload WHERE id = ?", upload_id
        )
        return Upload(row[0], row[1], Blob(*row[2:6]), bool(row[6])) if row else None

    def declare(self, upload: Upload, leaves: bytes) -> None:
        """Say the leaves; chunks that the package holds already count as received."""
        blob = upload.blob
        if len(leaves) != blob.num_chunks * SIZE or tree_root(blob.hash, leaves).hex() != blob.root:
            raise RefusalError(f"these are not the leaves of {blob.root[:16]}", 422)
        if not upload.declared:
            self.objects.put(f"leaves/{blob.root}", leaves)
        with self.db.alone():  # beside garbage collection a chunk could vanish after it was found
            if self.upload(upload.id).declared and upload.declared:
                return
            self.db.run("UPDATE upload SET declared = 1 WHERE id = ?", upload.id)
            held = self._held_chunks(upload)
            for number in range(blob.num_chunks):
                leaf = leaves[number * SIZE : (number + 1) * SIZE]
                if leaf in held and self.objects.exists(_chunk_key(leaves, number)):
                    self._note_received(upload.id, number)

    def _held_chunks(self, upload: Upload) -> set[bytes]:
        """Leaves of same-hash blobs of the package."""
        rows = self.db.rows(
            "SELECT blob.root, size, hash, chunk_size FROM holding JOIN blob ON blob.root = holding.root "
            "WHERE package_id = ? AND hash = ?",
            *(upload.package_id, upload.blob.hash),
        )
        found: set[bytes] = set()
        for row in rows:
            leaves = self.leaves(Blob(*row))
            found.update(leaves[at : at + SIZE] for at in range(0, len(leaves), SIZE))
        return found

    def _note_received(self, upload_id: str, number: int) -> None:
        self.db.run(
            "INSERT INTO received (upload_id, number) SELECT id, CAST(? AS BIGINT) FROM upload WHERE id = ? "
            "ON CONFLICT DO NOTHING",
            *(number, upload_id),
        )
        if number % TOUCH_EVERY == 0:
            self.db.run("UPDATE upload SET touched = ? WHERE id = ?", _now(), upload_id)

    def present(self, upload: Upload) -> set[int]:
        """Numbers of the chunks that need not be sent."""
        return {row[0] for row in self.db.rows("SELECT number FROM received WHERE upload_id = ?", upload.id)}

    def put_chunk(self, upload: Upload, number: int, data: bytes, leaves: bytes) -> None:
        """Keep a chunk once it is what its leaf promises.

        leaves   of the blob, as `leaves(upload.blob)` gives them
        raises   RefusalError 409 before `declare`, 404 for a wrong number, 422 for wrong bytes
        """
        blob = upload.blob
        if not upload.declared:
            raise RefusalError("the upload's leaves are not declared yet", 409)
        if not 0 <= number < blob.num_chunks:
            raise RefusalError(f"chunk {number} is outside 0..{blob.num_chunks - 1}", 404)
        wanted = leaves[number * SIZE : (number + 1) * SIZE]
        if len(data) != blob.chunk_bytes(number) or leaf_hashes(blob.hash, data, blob.chunk_size) != wanted:
            raise RefusalError(f"chunk {number} is not what its leaf promises; send it again", 422)
        self.objects.put(_chunk_key(leaves, number), data)
        self._note_received(upload.id, number)

    def commit(self, upload_id: str) -> Blob:
        """The package now holds the blob; raises RefusalError 409 where chunks are missing."""
        with self.db.alone():
            upload = self.upload(upload_id)
            blob = upload.blob
            missing = blob.num_chunks - len(self.present(upload))
            if missing:
                raise RefusalError(f"{missing} of {blob.num_chunks} chunks are missing", 409)
            self.db.run(
                "INSERT INTO blob (root, size, hash, chunk_size, touched) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (root) DO UPDATE SET touched = excluded.touched",
                *(blob.root, blob.size, blob.hash, blob.chunk_size, _now()),
            )
            self._hold(upload.package_id, blob.root)
            self._forget_upload(upload_id)
        return blob

    def _hold(self, package_id: str, root: str) -> None:
        self.db.run(
            "INSERT INTO holding (package_id, root, touched) VALUES (?, ?, ?) "
            "ON CONFLICT (package_id, root) DO UPDATE SET touched = excluded.touched",
            *(package_id, root, _now()),
        )

    def _forget_upload(self, upload_id: str) -> None:
        self.db.run("DELETE FROM received WHERE upload_id = ?", upload_id)
        self.db.run("DELETE FROM upload WHERE id = ?", upload_id)

    # garbage collection

    def collect(self, grace_s: int) -> "Collected":
        """Delete what no release needs and nobody touched for `grace_s` seconds: uploads, blobs, chunks.

        Runs alone: nobody can publish, open or finish an upload meanwhile; reading and sending chunks go on.
        """
        done, before = Collected(), _now() - grace_s
        with self.db.alone():
            for (upload_id,) in self.db.rows("SELECT id FROM upload WHERE touched < ?", before):
                self._forget_upload(upload_id)
                done.uploads += 1
            self.db.run(
                "DELETE FROM holding WHERE touched < ? AND NOT EXISTS (SELECT 1 FROM release_file f JOIN release r "
                "ON r.package_id = f.package_id AND r.package_root = f.package_root WHERE r.revoked IS NULL "
                "AND f.package_id = holding.package_id AND f.root = holding.root)",
                before,
            )
            done.files = self.db.run("DELETE FROM blob WHERE root NOT IN (SELECT root FROM holding)")
            wanted_files, wanted_chunks = self._wanted()
            self._sweep("leaves", wanted_files, before, done)
            self._sweep("chunks", wanted_chunks, before, done)
        return done

    def _wanted(self) -> tuple[set[str], set[str]]:
        """Roots and leaves that blobs and unfinished uploads need."""
        rows = self.db.rows(
            "SELECT root, size, hash, chunk_size, 1 FROM blob "
            "UNION SELECT root, size, hash, chunk_size, declared FROM upload"
        )
        chunks: set[str] = set()
        for row in rows:
            leaves = self.leaves(Blob(*row[:4])).hex() if row[4] else ""
            chunks.update(leaves[at : at + 2 * SIZE] for at in range(0, len(leaves), 2 * SIZE))
        return {row[0] for row in rows}, chunks

    def _sweep(self, kind: str, wanted: set[str], before: int, done: "Collected") -> None:
        for key, size, changed in self.objects.keys(kind):
            if key.split("/")[1] not in wanted and changed < before:
                self.objects.delete(key)
                done.objects, done.num_bytes = done.objects + 1, done.num_bytes + size

    def scrub(self) -> list[str]:
        """Read everything; the roots of blobs that are no longer what they were."""
        rows = self.db.rows("SELECT root, size, hash, chunk_size FROM blob")
        return [row[0] for row in rows if self._damaged(Blob(*row))]

    def _damaged(self, blob: Blob) -> list[str]:
        """Keys of the objects of a blob that are not what they should be."""
        try:
            leaves = self.leaves(blob)
        except (StorageError, IntegrityError):
            return [f"leaves/{blob.root}"]
        return [
            _chunk_key(leaves, number) for number in range(blob.num_chunks) if not self._sound(blob, leaves, number)
        ]

    def _sound(self, blob: Blob, leaves: bytes, number: int) -> bool:
        try:
            data = self.objects.read(_chunk_key(leaves, number), 0, blob.chunk_bytes(number))
        except StorageError:
            return False
        return leaf_hashes(blob.hash, data, blob.chunk_size) == leaves[number * SIZE : (number + 1) * SIZE]

    def drop_damaged(self, root: str) -> None:
        """Forget a damaged file, so that pushing its package again sends it; sound chunks stay."""
        with self.db.alone():
            blob = self.blob(root)
            for key in self._damaged(blob) if blob else ():
                self.objects.delete(key)
            self.db.run("DELETE FROM holding WHERE root = ?", root)
            self.db.run("DELETE FROM blob WHERE root = ?", root)


@dataclass(slots=True)
class Collected:
    """What garbage collection removed."""

    uploads: int = 0
    files: int = 0
    objects: int = 0
    num_bytes: int = 0


def _chunk_key(leaves: bytes, number: int) -> str:
    return f"chunks/{leaves[number * SIZE : (number + 1) * SIZE].hex()}"


def _now() -> int:
    return int(time.time())
