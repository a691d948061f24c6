"""Bring a device's package up to what its store offers, by the cheapest way, and switch to it.

    update(server, edge, guard) -> Outcome        watch(server, edge, guard, every_s) -> outcomes as they come

The ways: residual updates from the weights that are active, or the full package less the chunks that are here. An
update that does not fit or does not verify is dropped and the full package taken (R-8.2.6-4). The former version
stays active until the new one is whole, verified and on the disk.
"""

import contextlib
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlencode

from moestro.core.errors import Error, PackageError, RefusalError, RollbackError, ShipError, StorageError
from moestro.package.fields import Fields
from moestro.package.folder import Package
from moestro.package.hashing import SIZE
from moestro.package.manifest import Manifest
from moestro.package.residual import apply
from moestro.ship.catalogue import FULL
from moestro.ship.edge import COMPLETE, FETCHING, PATCHED, PLANNED, VERIFIED, Edge, State, Version
from moestro.ship.fetch import LocalChunks, Progress, Silent, Stage, Traffic
from moestro.ship.pull import Found, Guard, Offer, Pulled, StoppedError, find, offered, receive, stage_of
from moestro.ship.transport import Connection, Server

CURRENT, INSTALLED, HELD_BACK = "current", "installed", "held back"


@dataclass(frozen=True, kw_only=True, slots=True)
class How:
    """What an update may do."""

    modes: tuple[str, ...] = ("exact",)
    """Kinds of residual updates accepted; `qres` ones lose some bits."""
    again: bool = False
    """Also install a sequence that was rolled back."""
    device_id: str | None = None
    """Report to the store under this name."""
    stopped: Callable[[], bool] = lambda: False


@dataclass(slots=True)
class Outcome:
    """What an update did."""

    state: str
    """`current`, `installed` or `held back`."""
    sequence: int
    way: str = ""
    """`full` or `update`."""
    traffic: Traffic = field(default_factory=Traffic)
    full_bytes: int | None = None
    """Of the full package, for comparison."""
    dropped: str = ""
    """Why a residual update was not used, where one was tried."""
    folder: Path | None = None


def update(
    server: Server, edge: Edge, guard: Guard, how: How | None = None, progress: Progress | None = None
) -> Outcome:
    """Install the newest release where it is not active yet.

    raises   RollbackError for a replayed, expired or exchanged release, SignatureError, TransferError, StorageError;
             whatever is raised, the active version is as it was
    """
    how = how or How()
    with Connection(server) as connection, edge.locked():
        offers = offered(connection, edge.package_id)
        try:
            outcome = _Installer(server, connection, edge, guard, how, progress or Silent()).run(offers)
        except Error:
            _report(connection, edge, how, offers[0].sequence, "failed")
            raise
        if outcome.state == INSTALLED:
            _report(connection, edge, how, outcome.sequence, "active")
        return outcome


def _report(connection: Connection, edge: Edge, how: How, sequence: int, state: str) -> None:
    """Tell the store; a store that does not listen is no reason to fail."""
    if how.device_id is None or how.stopped():
        return
    table = {"package_id": edge.package_id, "sequence": sequence, "state": state}
    active = edge.state.active
    if active and active.sequence == sequence and len(active.weights) == 1:
        root = next(iter(active.weights.values()))
        table |= {"weights_root": root} if root else {}
    with contextlib.suppress(ShipError):
        connection.json("POST", f"/v1/devices/{how.device_id}/reports", table)


@dataclass(slots=True)
class _Installer:
    server: Server
    connection: Connection
    edge: Edge
    guard: Guard
    how: How
    progress: Progress

    def run(self, offers: Sequence[Offer]) -> Outcome:
        state, sequence = self.edge.state, offers[0].sequence
        full = next((offer for offer in offers if offer.kind == FULL), None)
        outcome = Outcome(CURRENT, sequence, full_bytes=full.size if full else None)
        self._check_order(state, offers)
        if state.active and state.active.sequence == sequence:
            return outcome
        if sequence in state.held_back and not self.how.again:
            outcome.state = HELD_BACK
            return outcome
        version = self._by_updates(state, full, outcome) if state.active else None
        if version is None:
            version = self._by_full(state, sequence, outcome)
        self.edge.switch(version)
        outcome.state, outcome.folder = INSTALLED, self.edge.folder(version)
        return outcome

    def _check_order(self, state: State, offers: Sequence[Offer]) -> None:
        """R-8.2.7-2, before anything is fetched; the guard repeats it on the manifest itself."""
        sequence = offers[0].sequence
        if sequence < max(state.highest, self.guard.least_sequence):
            raise RollbackError(
                f"{self.edge.package_id} is offered at sequence {sequence}, but {state.highest} was here already; "
                "the server may be replaying an old release"
            )
        active = state.active
        if active is None or active.sequence != sequence or active.quantised:
            return
        roots = {offer.package_root for offer in offers if offer.kind == FULL}
        if roots and active.package_root not in roots:
            raise RollbackError(
                f"the server offers another release {sequence} of {self.edge.package_id} than the one that is here; "
                "two releases must not share a sequence"
            )

    def _guard(self, state: State) -> Guard:
        return replace(self.guard, least_sequence=max(state.highest, self.guard.least_sequence))

    def _known(self, state: State) -> list[Path]:
        return [self.edge.folder(version) for version in (state.active, state.previous) if version]

    # the full package

    def _by_full(self, state: State, sequence: int, outcome: Outcome) -> Version:
        found = find(self.connection, self.edge.package_id, sequence, self._guard(state))
        manifest = found.manifest
        self.edge.note(sequence, manifest.package_root, PLANNED)
        name = f"{sequence}-{manifest.package_root[:16]}"
        pulled = self._receive(found, name, self._known(state))
        outcome.way = FULL
        outcome.traffic.add(pulled.traffic)
        return _version(manifest, name)

    def _receive(self, found: Found, name: str, known: Sequence[Path]) -> Pulled:
        """A package below versions/, fetched unless a former try had got that far."""
        manifest, out = found.manifest, self.edge.root / "versions" / name
        target = self.edge.state.installing
        assert target
        if out.exists():
            with contextlib.suppress(PackageError), Package.open(out, self.guard.trust) as package:
                if package.manifest_bytes == found.data:
                    return Pulled(manifest, Traffic(resumed_bytes=manifest.size), package.verify(), out)
            shutil.rmtree(out)

        def note(step: str) -> None:
            self.edge.note(target.sequence, target.package_root, step)

        note(FETCHING)
        pulled = receive(
            self.server, self.connection, found, out, known, self.progress, self.how.stopped, lambda: note(COMPLETE)
        )
        note(VERIFIED)
        return pulled

    # residual updates

    def _by_updates(self, state: State, full: Offer | None, outcome: Outcome) -> Version | None:
        """None where there is no way by updates, it costs more, or it fails."""
        steps = self._steps(state)
        if not steps:
            return None
        size = sum(step.size for step in steps)
        if full is not None and size >= self._full_cost(state, full):
            outcome.dropped = "the full package's missing chunks are fewer bytes"
            return None
        try:
            version = self._patch(state, steps, outcome)
        except StoppedError:
            raise
        except PackageError as error:
            if full is None:
                raise
            outcome.dropped = str(error)
            return None
        outcome.way = "update"
        return version

    def _steps(self, state: State) -> list[Offer]:
        assert state.active
        roots = [root for root in state.active.weights.values() if root]
        query = urlencode([("base", root) for root in roots] + [("accept", ",".join(self.how.modes))])
        try:
            answer = self.connection.json("GET", f"/v1/updates/{self.edge.package_id}?{query}")
        except RefusalError as error:
            if error.status == 404:
                return []
            raise
        return [Offer.of(item) for item in Fields(answer, "the server's answer").items("steps", 64)]

    def _full_cost(self, state: State, full: Offer) -> int:
        """Bytes that the full package would take, chunks that are here left out."""
        found = find(self.connection, self.edge.package_id, full.sequence, self._guard(state))
        stage = Stage(stage_of(self.edge.root / "estimate"), found.manifest)
        stage.learn(self.connection)
        local = LocalChunks(self._known(state))
        missing: dict[bytes, int] = {}
        for root, blob in stage.blobs().items():
            leaves = stage.leaves[root]
            for number in range(blob.num_chunks):
                leaf = leaves[number * SIZE : (number + 1) * SIZE]
                if not local.knows(blob.hash, leaf):
                    missing[leaf] = blob.chunk_bytes(number)
        return sum(missing.values())

    def _patch(self, state: State, steps: Sequence[Offer], outcome: Outcome) -> Version:
        assert state.active
        target, chain = steps[-1], [self.edge.folder(state.active)]
        self.edge.note(target.sequence, target.package_root, PLANNED)
        manifest = None
        for step in steps:
            guard = self._guard(state) if step is target else replace(self.guard, least_sequence=0)
            found = find(self.connection, self.edge.package_id, step.sequence, guard, step.package_root)
            name = f"{step.sequence}-{step.package_root[:16]}.update"
            pulled = self._receive(found, name, self._known(state))
            outcome.traffic.add(pulled.traffic)
            chain.append(pulled.folder)
            manifest = found.manifest
        assert manifest
        name = f"{target.sequence}-{target.package_root[:16]}"
        out = self.edge.root / "versions" / name
        shutil.rmtree(out, ignore_errors=True)
        made = apply(chain[:-1], chain[-1], out, trust=self.guard.trust)
        promised = {model.model_id: model.weights_root for model in manifest.models}
        if {model.model_id: model.weights_root for model in made.models} != promised:
            raise StorageError(f"{out} does not hold the weights the update promised; was the disk changed meanwhile?")
        self.edge.note(target.sequence, target.package_root, PATCHED)
        quantised = any(model.update and model.update.mode != "exact" for model in manifest.models)
        return replace(_version(made, name), quantised=quantised)


def _version(manifest: Manifest, name: str) -> Version:
    weights = {model.model_id: model.weights_root for model in manifest.models}
    root = manifest.package_root
    return Version(sequence=manifest.sequence, package_root=root, folder=name, weights=weights)


def roll_back(edge: Edge, server: Server | None = None, how: How | None = None) -> State:
    """Switch to the former version; reports it where a server is given."""
    state = edge.roll_back()
    assert state.previous
    if server is not None:
        with Connection(server) as connection, contextlib.suppress(ShipError):
            _report(connection, edge, how or How(), state.previous.sequence, "rolled-back")
    return state


def watch(
    server: Server,
    edge: Edge,
    guard: Guard,
    how: How,
    every_s: float,
    progress: Progress | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[Outcome | Error]:
    """Update now and whenever the store has something new; yields what happened, errors included, until stopped.

    Asking costs one small request with an ETag; devices spread out by a random tenth of the interval.
    """
    etag = ""
    while not how.stopped():
        try:
            with Connection(server) as connection:
                headers = {"If-None-Match": etag} if etag else {}
                answer, _ = connection.call("GET", f"/v1/packages/{edge.package_id}", headers)
            if answer.status != 304:
                yield update(server, edge, guard, how, progress)
                etag = answer.header("ETag")
        except StoppedError:
            return
        except Error as error:
            etag = ""
            yield error
        sleep(every_s * random.uniform(0.9, 1.1))
