"""What is installed on a device: versions beside each other, one of them active, switched and rolled back atomically.

    HOME/PACKAGE/state.json     which version is active, which was before, what was refused: the only truth
                 active         a link to the active version, remade from state.json after a crash
                 versions/7/    whole verified packages
                 lock           one installer at a time

An installation is durable step by step: planned, fetching, complete, verified, patched, active. Until `active` is
written to state.json, in one rename, the former version is active; killed or without power at any instant, a device
holds the old version or the new one, never a mixture.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moestro.core.config import STRICT, build
from moestro.core.errors import ConfigError, PackageError, RefusalError, RollbackError, StorageError
from moestro.core.files import ASIDE, cannot_write, flush_path, write_text
from moestro.package import canonical
from moestro.package.folder import Package
from moestro.package.paths import check_model_id

SCHEMA = "moestro/edge/1"
STATE, ACTIVE, VERSIONS, LOCK = "state.json", "active", "versions", "lock"
PLANNED, FETCHING, COMPLETE, VERIFIED, PATCHED = "planned", "fetching", "complete", "verified", "patched"
MAX_STATE_BYTES = 1 << 20
STAGE = ".stage" + ASIDE
"""Ending of folders where files gather; they outlive a crash."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """One installed release."""

    __pydantic_config__ = STRICT
    sequence: int
    package_root: str
    """Of the package in `folder`."""
    folder: str
    """Below versions/."""
    weights: dict[str, str | None]
    """weights_root of each model by its id."""
    quantised: bool = False
    """True where an update that loses some bits led here; its package_root is then the device's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Installing:
    """An installation that has not ended."""

    __pydantic_config__ = STRICT
    sequence: int
    package_root: str
    state: str


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """All that a device remembers of a package."""

    __pydantic_config__ = STRICT
    schema: str = SCHEMA
    package_id: str
    active: Version | None = None
    previous: Version | None = None
    highest: int = 0
    """Highest sequence ever believed; lower ones are refused (R-8.2.7-2)."""
    held_back: tuple[int, ...] = ()
    """Sequences that were rolled back; not installed again by themselves."""
    installing: Installing | None = None


class Edge:
    """The versions of one package on this device."""

    def __init__(self, home: Path, package_id: str) -> None:
        self.package_id = check_model_id(package_id, "package_id")
        self.root = home / package_id

    @property
    def state(self) -> State:
        """Read anew; an empty one before the first installation."""
        path = self.root / STATE
        if not path.exists():
            return State(package_id=self.package_id)
        try:
            table = canonical.loads_loosely(path.read_bytes(), MAX_STATE_BYTES, str(path))
            state = build(State, table, str(path))
        except (OSError, PackageError, ConfigError) as error:
            raise StorageError(f"{path} cannot be read ({error}); remove {self.root} and install again") from error
        if state.schema != SCHEMA or state.package_id != self.package_id:
            raise StorageError(f"{path} is of {state.package_id} in {state.schema}; this moestro knows {SCHEMA}")
        return state

    def write(self, state: State) -> None:
        """The commit point: one rename."""
        write_text(self.root / STATE, json.dumps(_table(state), indent=1) + "\n")
        flush_path(self.root)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with this package; cleans up what a crash left."""
        try:
            (self.root / VERSIONS).mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise cannot_write(self.root, error) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"another moestro is installing {self.package_id} in {self.root}; wait") from error
            self.recover()
            yield
        finally:
            os.close(handle)

    def recover(self) -> None:
        """Make the link agree with the state; remove what neither a version nor an unfinished installation needs."""
        state = self.state
        self._link(state)
        kept = {version.folder for version in (state.active, state.previous) if version}
        new = state.installing
        patched = f"{new.sequence}-{new.package_root[:16]}{ASIDE}" if new else STAGE  # `apply` goes on with it
        for path in (self.root / VERSIONS).iterdir():
            half_written = path.name.endswith(ASIDE) and not path.name.endswith((STAGE, patched))
            if path.name not in kept and (state.installing is None or half_written):
                shutil.rmtree(path, ignore_errors=True)

    def _link(self, state: State) -> None:
        if state.active is None:
            return
        link, wanted = self.root / ACTIVE, f"{VERSIONS}/{state.active.folder}"
        if link.is_symlink() and os.readlink(link) == wanted:
            return
        aside = self.root / (ACTIVE + ASIDE)
        try:
            aside.unlink(missing_ok=True)
            aside.symlink_to(wanted)
            aside.rename(link)
            flush_path(self.root)
        except OSError as error:
            raise cannot_write(link, error) from error

    def folder(self, version: Version) -> Path:
        """Where a version lies."""
        return self.root / VERSIONS / version.folder

    def note(self, sequence: int, package_root: str, step: str) -> None:
        """Write down how far an installation is; beginning another one drops what the former had gathered."""
        state = self.state
        former = state.installing
        if former and (former.sequence, former.package_root) != (sequence, package_root):
            self.write(replace(state, installing=None))
            self.recover()
        self.write(replace(state, installing=Installing(sequence=sequence, package_root=package_root, state=step)))

    def switch(self, version: Version) -> State:
        """Make a version active that lies whole, verified and flushed in its folder."""
        assert self.folder(version).is_dir()
        before = self.state
        held_back = tuple(number for number in before.held_back if number != version.sequence)
        after = replace(
            before,
            active=version,
            previous=before.active,
            highest=max(before.highest, version.sequence),
            held_back=held_back,
            installing=None,
        )
        self.write(after)
        self.recover()
        return after

    def roll_back(self) -> State:
        """Make the former version active again, after verifying it; the other is not installed again by itself.

        raises   RefusalError where there is none, an error of PackageError where it is damaged
        """
        if not self.root.is_dir():
            raise RefusalError(f"{self.package_id} is not installed in {self.root.parent}", 404)
        with self.locked():
            state = self.state
            if state.previous is None or state.active is None:
                raise RefusalError(f"{self.package_id} has no former version here to roll back to", 409)
            with Package.open(self.folder(state.previous)) as package:
                package.verify()
                found = {model.model_id: model.weights_root for model in package.manifest.models}
            if found != state.previous.weights:
                raise RollbackError(f"{self.folder(state.previous)} holds other weights than were installed there")
            held_back = tuple(sorted({*state.held_back, state.active.sequence}))
            after = replace(state, active=state.previous, previous=state.active, held_back=held_back, installing=None)
            self.write(after)
            self.recover()
            return after


def _table(value: Any) -> Any:
    """Dataclasses as JSON."""
    match value:
        case Mapping():
            return {key: _table(item) for key, item in value.items()}
        case tuple() | list():
            return [_table(item) for item in value]
        case State() | Version() | Installing():
            return {name: _table(getattr(value, name)) for name in value.__dataclass_fields__}
    return value
