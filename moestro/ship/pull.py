"""Get a release from a store: believe its manifest first, then fetch its files, then verify the whole.

    offered(server, package_id) -> Head          find(server, release, guard) -> Manifest and its bytes
    pull(server, package_id, out, guard) -> Pulled

A *guard* is what a receiver insists on: whose signatures, which least sequence, no expired manifest. Nothing of a
package that fails it is written.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError, FormatError, RefusalError, RollbackError, SignatureError
from moestro.core.files import ASIDE, flush_path, write_bytes
from moestro.package.fields import Fields
from moestro.package.folder import Findings, Package
from moestro.package.limits import MAX_JSON_INT
from moestro.package.manifest import MANIFEST, SIGNATURE, Manifest
from moestro.package.paths import check_model_id
from moestro.package.sign import Trust
from moestro.ship.catalogue import FULL, expired, kind_of
from moestro.ship.edge import STAGE
from moestro.ship.fetch import LocalChunks, Progress, Silent, Stage, Traffic, fetch, flush_tree
from moestro.ship.transport import Connection, Server


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """What a receiver insists on."""

    trust: Trust | None
    """None accepts unsigned packages; the commands ask for --allow-unsigned then."""
    least_sequence: int = 0
    """Lower ones are replays."""
    allow_expired: bool = False
    max_bytes: int | None = None
    """Largest package."""

    def check(self, manifest: Manifest, data: bytes, envelope: bytes | None, package_id: str, sequence: int) -> None:
        """Raise unless the manifest is the one asked for, trusted, recent and not too large."""
        if self.trust is not None:
            self.trust.check(data, envelope)
        if (manifest.package_id, manifest.sequence) != (package_id, sequence):
            raise RollbackError(
                f"the server gave release {manifest.sequence} of {manifest.package_id} "
                f"where release {sequence} of {package_id} was asked for"
            )
        if manifest.sequence < self.least_sequence:
            raise RollbackError(
                f"{package_id} is offered at sequence {manifest.sequence}, but {self.least_sequence} was here already; "
                "the server may be replaying an old release"
            )
        if expired(manifest.expires_at) and not self.allow_expired:
            raise RollbackError(
                f"release {manifest.sequence} of {package_id} has expired at {manifest.expires_at}; "
                "the server may be withholding a newer one"
            )
        if self.max_bytes is not None and manifest.size > self.max_bytes:
            raise RefusalError(
                f"{package_id} has {manifest.size} bytes; at most {self.max_bytes} are allowed here", 413
            )


@dataclass(frozen=True, slots=True)
class Offer:
    """A release as the server lists it; believed only once its manifest is checked."""

    sequence: int
    package_root: str
    kind: str
    size: int

    @classmethod
    def of(cls, item: Any) -> "Offer":
        """From the server's JSON."""
        fields = Fields(item, "the server's answer")
        return cls(
            fields.whole("sequence", 1, MAX_JSON_INT),
            fields.hex32("package_root"),
            fields.text("kind", 16),
            fields.whole("size", 0, MAX_JSON_INT),
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A manifest that passed the guard."""

    manifest: Manifest
    data: bytes
    envelope: bytes | None


@dataclass(slots=True)
class Pulled:
    """A package that is here now."""

    manifest: Manifest
    traffic: Traffic
    findings: Findings
    folder: Path = field(default_factory=Path)


def offered(connection: Connection, package_id: str) -> list[Offer]:
    """The releases of a package's newest sequence."""
    check_model_id(package_id, "package_id")
    answer = connection.json("GET", f"/v1/packages/{package_id}")
    items = Fields(answer, "the server's answer").items("releases", 1000)
    offers = [Offer.of(item) for item in items]
    if not offers or len({offer.sequence for offer in offers}) != 1:
        raise FormatError("the server's answer lists no release, or of several sequences")
    return offers


def find(
    connection: Connection, package_id: str, sequence: int, guard: Guard, package_root: str | None = None
) -> Found:
    """Fetch and check a manifest; the full package's unless a root is given."""
    path = f"/v1/packages/{package_id}/{sequence}/manifest"
    query = f"?root={package_root}" if package_root else ""
    _, data = connection.call("GET", path + query)
    envelope = None
    try:
        _, envelope = connection.call("GET", f"{path}.sig{query}")
    except RefusalError as error:
        if error.status != 404:
            raise
    if guard.trust is not None and envelope is None:
        raise SignatureError(f"release {sequence} of {package_id} is not signed; see --trust and --allow-unsigned")
    manifest = Manifest.parse(data)
    guard.check(manifest, data, envelope, package_id, sequence)
    if package_root is not None and manifest.package_root != package_root:
        raise FormatError(f"the server gave another manifest than {package_root[:16]}")
    return Found(manifest, data, envelope)


def stage_of(out: Path) -> Path:
    """Where the files of `out` gather."""
    return out.with_name(out.name + STAGE)


def receive(
    server: Server,
    connection: Connection,
    found: Found,
    out: Path,
    known: Sequence[Path] = (),
    progress: Progress | None = None,
    stopped: Callable[[], bool] = lambda: False,
    complete: Callable[[], None] = lambda: None,
) -> Pulled:
    """Fetch the files of a manifest and put the package at `out`, whole and verified or not at all.

    known      packages that are here, whose chunks are used
    complete   called once every chunk is here, before the package is put together
    """
    progress = progress or Silent()
    aside = out.with_name(out.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    stage = Stage(stage_of(out), found.manifest)
    stage.learn(connection)
    progress.begin(f"{found.manifest.package_id} {found.manifest.sequence}", found.manifest.size)
    traffic = stage.look(LocalChunks(known), progress)
    traffic.add(fetch(server, stage, progress, stopped=stopped))
    if stopped():
        raise StoppedError("stopped; what was fetched stays and is used next time")
    complete()
    try:
        stage.place(aside)
        write_bytes(aside / MANIFEST, found.data)
        if found.envelope is not None:
            write_bytes(aside / SIGNATURE, found.envelope)
        flush_tree(aside)
        with Package.open(aside) as package:
            findings = package.verify()
        aside.rename(out)
        flush_path(out.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    stage.drop()
    return Pulled(found.manifest, traffic, findings, out)


class StoppedError(ConfigError):
    """The user asked for an end."""


def pull(
    server: Server,
    package_id: str,
    out: Path,
    guard: Guard,
    sequence: int | None = None,
    known: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Pulled:
    """The full package of a release, by default the newest, as a folder `out` that must not exist."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists already; packages are never overwritten: choose another name")
    with Connection(server) as connection:
        number = sequence or offered(connection, package_id)[0].sequence
        found = find(connection, package_id, number, guard)
        if kind_of(found.manifest) != FULL:
            raise RefusalError(
                f"release {number} of {package_id} is only published as an update; install it with moestro update"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        return receive(server, connection, found, out, known, progress)
