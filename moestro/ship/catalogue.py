"""Releases: what is published, in which order, from which parents, and what an update to the newest would transfer.

    publish(store, package_id, manifest, signature, trust, who)      head, release, releases, revoke
    transfer(store, package_id, base, target)                        bytes by whole files, by chunks, by residuals

A *release* is one manifest: package_id, sequence and package_root. A sequence may have several: the full package, and
residual updates that give the same weights from other bases. Sequences only rise; a revoked one is never used again.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.core.errors import IntegrityError, RefusalError, SignatureError
from moestro.package.describe import check_management
from moestro.package.hashing import SIZE, root_of, tree_root
from moestro.package.limits import MAX_DESCRIPTION_BYTES
from moestro.package.manifest import FileEntry, Manifest, ModelEntry
from moestro.package.sign import MAX_ENVELOPE_BYTES, Trust, signers
from moestro.ship.store import Blob, Store

Table = dict[str, Any]
FULL, UPDATE = "full", "update"


@dataclass(frozen=True, slots=True)
class Release:
    """One published manifest."""

    package_id: str
    sequence: int
    package_root: str
    kind: str
    """`full`, or `update` where some model needs a base."""
    size: int
    created_at: str
    expires_at: str | None
    published: int
    """Seconds since 1970."""
    publisher: str
    revoked: int | None


COLUMNS = "package_id, sequence, package_root, kind, size, created_at, expires_at, published, publisher, revoked"


def publish(
    store: Store, manifest_bytes: bytes, signature: bytes | None, who: str, package_id: str, trust: Trust | None
) -> tuple[Release, bool]:
    """Make a release visible, all at once; (release, False) where exactly this one is there already.

    raises   FormatError, SignatureError, RefusalError 409 (order, missing files) or 422
    """
    manifest = Manifest.parse(manifest_bytes)
    if manifest.package_id != package_id:
        raise RefusalError(f"the manifest is of package {manifest.package_id}, not {package_id}", 422)
    if expired(manifest.expires_at):
        raise RefusalError(f"the package has expired at {manifest.expires_at}", 422)
    if signature is not None and len(signature) > MAX_ENVELOPE_BYTES:
        raise RefusalError("the signature is too long", 413)
    if trust is not None:
        trust.check(manifest_bytes, signature)
    elif signature is not None and not signers(manifest_bytes, signature):
        raise SignatureError("manifest.sig holds no signature over this manifest")
    infos = [_check_files(store, manifest, model) for model in manifest.models]
    with store.db.alone():
        known = _check_order(store, manifest)
        if known is None:
            _insert(store, manifest, manifest_bytes, signature, who)
            _insert_models(store, manifest, infos)
    found = release(store, package_id, manifest.sequence, manifest.package_root)
    return found, known is None


def expired(expires_at: str | None, now: float | None = None) -> bool:
    """True once a manifest's own date has passed."""
    if expires_at is None:
        return False
    text = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() if now is None else now))
    return expires_at <= text


def _check_files(store: Store, manifest: Manifest, model: ModelEntry) -> Table:
    """All files are held, digests of chunks are the files' own; returns the model's management information."""
    for entry in manifest.files:
        blob = _held(store, manifest, entry)
        if entry.chunks is not None:
            leaves = store.leaves(blob)
            if root_of(manifest.hash, leaves, manifest.chunk_size).hex() != manifest.entry(entry.chunks).root:
                raise RefusalError(f"{entry.chunks} does not hold the digests of {entry.path}", 422)
    entry = manifest.entry(f"Meta-info/{model.model_id}/managementinfo.json")
    if entry.size > MAX_DESCRIPTION_BYTES:
        raise RefusalError(f"{entry.path} has {entry.size} bytes; at most {MAX_DESCRIPTION_BYTES} are allowed", 422)
    return check_management(store.read(_held(store, manifest, entry)), model.model_id)


def _held(store: Store, manifest: Manifest, entry: FileEntry) -> Blob:
    held = store.db.row("SELECT 1 FROM holding WHERE package_id = ? AND root = ?", manifest.package_id, entry.root)
    blob = store.blob(entry.root) if held else None
    if blob is None:
        raise RefusalError(f"{entry.path} ({entry.root[:16]}) is not uploaded yet", 409)
    same = (blob.size, blob.hash) == (entry.size, manifest.hash)
    if not same or (blob.num_chunks > 1 and blob.chunk_size != manifest.chunk_size):
        raise RefusalError(f"{entry.path} was uploaded with another size, hash or chunk_size", 422)
    return blob


def _check_order(store: Store, manifest: Manifest) -> Release | None:
    """None where the release may be added, itself where it is there."""
    package_id, sequence = manifest.package_id, manifest.sequence
    rows = store.db.rows(f"SELECT {COLUMNS} FROM release WHERE package_id = ? AND sequence >= ?", package_id, sequence)
    newer = [Release(*row) for row in rows]
    for item in newer:
        if item.package_root == manifest.package_root and item.sequence == sequence:
            if item.revoked is not None:
                raise RefusalError(f"release {sequence} of {package_id} was revoked; publish a new sequence", 409)
            return item
    last = max((item.sequence for item in newer), default=0)
    if last > sequence:
        raise RefusalError(f"sequence is {sequence}, but {package_id} is at {last} already; use {last + 1}", 409)
    for item in newer:
        theirs = {row[0]: row[1] for row in models(store, item)}
        ours = {model.model_id: model.weights_root for model in manifest.models}
        if theirs != ours or item.kind == kind_of(manifest) == FULL:
            raise RefusalError(
                f"sequence {sequence} of {package_id} is published with other content; use {sequence + 1}", 409
            )
    count = store.db.value("SELECT COUNT(*) FROM release WHERE package_id = ? AND revoked IS NULL", package_id)
    if count >= store.quotas.max_releases:
        raise RefusalError(f"{package_id} has {count} releases, as many as this store allows; revoke some", 413)
    return None


def kind_of(manifest: Manifest) -> str:
    """`update` where some model needs a base."""
    return UPDATE if any(model.update for model in manifest.models) else FULL


def _insert(store: Store, manifest: Manifest, data: bytes, signature: bytes | None, who: str) -> None:
    store.db.run(
        "INSERT INTO release (package_id, sequence, package_root, kind, size, manifest, signature, created_at, "
        "expires_at, published, publisher) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        *(manifest.package_id, manifest.sequence, manifest.package_root, kind_of(manifest), manifest.size),
        *(data, signature, manifest.created_at, manifest.expires_at, int(time.time()), who),
    )
    for entry in manifest.files:
        store.db.run(
            "INSERT INTO release_file (package_id, package_root, path, root, size) VALUES (?, ?, ?, ?, ?)",
            *(manifest.package_id, manifest.package_root, entry.path, entry.root, entry.size),
        )


def _insert_models(store: Store, manifest: Manifest, infos: Sequence[Table]) -> None:
    for model, info in zip(manifest.models, infos, strict=True):
        update = model.update
        store.db.run(
            "INSERT INTO model (package_id, package_root, model_id, weights_root, base, chain, mode, info) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *(manifest.package_id, manifest.package_root, model.model_id, model.weights_root),
            *((update.base, update.chain, update.mode) if update else (None, None, None)),
            json.dumps(info),
        )


def revoke(store: Store, package_id: str, sequence: int) -> int:
    """Withdraw all releases of a sequence; their files may then be collected. Returns how many there were."""
    changed = store.db.run(
        "UPDATE release SET revoked = ? WHERE package_id = ? AND sequence = ? AND revoked IS NULL",
        *(int(time.time()), package_id, sequence),
    )
    if not changed:
        raise RefusalError(f"there is no release {sequence} of {package_id}", 404)
    return changed


# reading


def packages(store: Store) -> list[str]:
    """Ids of all packages with a release, sorted."""
    return [row[0] for row in store.db.rows("SELECT DISTINCT package_id FROM release ORDER BY package_id")]


def releases(store: Store, package_id: str) -> list[Release]:
    """Newest first, revoked ones included."""
    rows = store.db.rows(
        f"SELECT {COLUMNS} FROM release WHERE package_id = ? ORDER BY sequence DESC, kind, package_root", package_id
    )
    return [Release(*row) for row in rows]


def head(store: Store, package_id: str) -> list[Release]:
    """The releases of the newest sequence that is not revoked; raises RefusalError 404 where there is none."""
    valid = [item for item in releases(store, package_id) if item.revoked is None]
    if not valid:
        raise RefusalError(f"there is no package {package_id}", 404)
    return [item for item in valid if item.sequence == valid[0].sequence]


def release(store: Store, package_id: str, sequence: int, package_root: str | None = None) -> Release:
    """One release; the full one unless its root is given. Raises RefusalError 404, or 410 for a revoked one."""
    fitting = [item for item in releases(store, package_id) if item.sequence == sequence]
    if package_root is not None:
        fitting = [item for item in fitting if item.package_root == package_root]
    if not fitting:
        raise RefusalError(f"there is no release {sequence} of {package_id}", 404)
    valid = [item for item in fitting if item.revoked is None]
    if not valid:
        raise RefusalError(f"release {sequence} of {package_id} was revoked", 410)
    return min(valid, key=lambda item: (item.kind != FULL, item.size, item.package_root))


def manifest_of(store: Store, item: Release) -> tuple[bytes, bytes | None]:
    """(manifest, signature)."""
    row = store.db.row(
        "SELECT manifest, signature FROM release WHERE package_id = ? AND package_root = ? AND sequence = ?",
        *(item.package_id, item.package_root, item.sequence),
    )
    assert row is not None
    return bytes(row[0]), None if row[1] is None else bytes(row[1])


def models(store: Store, item: Release) -> list[tuple[str, str | None, str | None, int | None, str | None, Table]]:
    """(model_id, weights_root, base, chain, mode, management information) of each model."""
    rows = store.db.rows(
        "SELECT model_id, weights_root, base, chain, mode, info FROM model "
        "WHERE package_id = ? AND package_root = ? ORDER BY model_id",
        *(item.package_id, item.package_root),
    )
    return [(row[0], row[1], row[2], row[3], row[4], json.loads(row[5])) for row in rows]


# updates


@dataclass(frozen=True, slots=True)
class Step:
    """A residual update as an edge from weights to weights."""

    release: Release
    needs: frozenset[str]
    gives: frozenset[str]
    modes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Path:
    """Residual updates one after another."""

    steps: tuple[Step, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(step.release.size for step in self.steps)


@dataclass(slots=True)
class Route:
    """The ways from what a device has to a release."""

    target: Release
    full_bytes: int | None
    """Of the full package; None where only updates are published."""
    updates: tuple[Release, ...] = ()
    """The residual updates to apply in order; none where there are none, or where they cost more than the rest."""
    update_bytes: int | None = None
    chunk_bytes: int | None = None
    """Of the full package's chunks that the other release lacks; None where that is not known."""


def best_updates(store: Store, package_id: str, base: frozenset[str], modes: frozenset[str]) -> Path | None:
    """The chain of updates with the fewest bytes from weights `base` to the newest ones (Dijkstra)."""
    newest = head(store, package_id)
    goal = frozenset(root for item in newest for _, root, *_ in models(store, item) if root)
    steps = [step for step in _steps(store, package_id) if step.modes <= modes]
    open_paths: dict[frozenset[str], Path] = {base: Path()}
    closed: set[frozenset[str]] = set()
    while open_paths:
        here, path = min(open_paths.items(), key=lambda pair: pair[1].size)
        del open_paths[here]
        closed.add(here)
        if path.steps and goal <= here | path.steps[-1].gives and path.steps[-1].gives >= goal:
            return path
        for step in steps:
            if not step.needs <= here or step.gives in closed:
                continue
            longer = Path((*path.steps, step))
            if step.gives not in open_paths or longer.size < open_paths[step.gives].size:
                open_paths[step.gives] = longer
    return None


def _steps(store: Store, package_id: str) -> Iterator[Step]:
    for item in releases(store, package_id):
        if item.kind == UPDATE and item.revoked is None and not expired(item.expires_at):
            rows = models(store, item)
            yield Step(
                item,
                frozenset(base for _, _, base, _, _, _ in rows if base),
                frozenset(root for _, root, _, _, _, _ in rows if root),
                frozenset(mode for _, _, _, _, mode, _ in rows if mode),
            )


def transfer(store: Store, package_id: str, base: int, target: int, modes: frozenset[str]) -> Route:
    """What a device at sequence `base` would fetch to reach `target`."""
    goal = release(store, package_id, target)
    route = Route(goal, goal.size if goal.kind == FULL else None)
    start = release(store, package_id, base)
    if start.kind == goal.kind == FULL:
        have = chunk_sizes(store, start)
        route.chunk_bytes = sum(size for leaf, size in chunk_sizes(store, goal).items() if leaf not in have)
    roots = frozenset(root for _, root, *_ in models(store, start) if root)
    path = best_updates(store, package_id, roots, modes) if target == head(store, package_id)[0].sequence else None
    if path:
        route.updates = tuple(step.release for step in path.steps)
        route.update_bytes = path.size
    return route


def chunk_sizes(store: Store, item: Release) -> dict[bytes, int]:
    """Bytes of each distinct chunk of a release."""
    manifest = Manifest.parse(manifest_of(store, item)[0])
    found: dict[bytes, int] = {}
    for entry in manifest.files:
        blob = store.blob(entry.root)
        if blob is None:
            raise IntegrityError(entry.path, "the store has lost it")
        leaves = store.leaves(blob)
        assert tree_root(blob.hash, leaves).hex() == blob.root
        for number in range(blob.num_chunks):
            found[leaves[number * SIZE : (number + 1) * SIZE]] = blob.chunk_bytes(number)
    return found


# devices


def note_report(store: Store, device_id: str, package_id: str, sequence: int, state: str, root: str | None) -> None:
    """Keep the newest word of a device about a package."""
    store.db.run(
        "INSERT INTO report (device_id, package_id, sequence, state, weights_root, at) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (device_id, package_id) DO UPDATE SET sequence = excluded.sequence, state = excluded.state, "
        "weights_root = excluded.weights_root, at = excluded.at",
        *(device_id, package_id, sequence, state, root, int(time.time())),
    )


def reports(store: Store) -> list[Table]:
    """All devices' newest words."""
    names = ("device_id", "package_id", "sequence", "state", "weights_root", "at")
    rows = store.db.rows(f"SELECT {', '.join(names)} FROM report ORDER BY device_id, package_id")
    return [dict(zip(names, row, strict=True)) for row in rows]
