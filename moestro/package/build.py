"""Put a package together: model files, description files, chunk digests, manifest; whole or not at all.

    build(out, [Content, ...], release, program) -> Manifest

The folder is made aside, flushed and renamed. The same content and release give the same bytes anywhere: nothing
here reads a clock, a host name or the order of a directory.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError
from moestro.core.files import folder_aside
from moestro.package import canonical
from moestro.package.describe import check_management, check_technical, dumps
from moestro.package.descriptor import Shard, weights_root
from moestro.package.encrypt import Keys, Sealer
from moestro.package.fields import DATE
from moestro.package.folder import Package
from moestro.package.hashing import SIZE, check_hash, digest, tree_root
from moestro.package.layout import SUFFIX
from moestro.package.limits import CHUNK_BYTES, MAX_JSON_INT
from moestro.package.manifest import CHUNKS, MANIFEST, SIGNATURE, FileEntry, Manifest, ModelEntry, Update, sorted_files
from moestro.package.paths import check_model_id, list_below, open_below, open_folder
from moestro.package.resume import folder_resumed, former_of
from moestro.package.sink import Sink, file_leaves
from moestro.package.writer import ModelSource, SealedSource, TensorSource, WrittenFile, write_model_file

EPOCH = "1970-01-01T00:00:00Z"
"""created_at unless the user or SOURCE_DATE_EPOCH says otherwise: the same package twice has the same bytes."""


def release_time() -> str:
    """created_at from SOURCE_DATE_EPOCH (reproducible-builds.org), or EPOCH where that is not set."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "0")
    if not text.isdigit() or len(text) > 11:
        raise ConfigError(f"SOURCE_DATE_EPOCH is {text!r}; it must be seconds since 1970")
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(text)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """What a package says about itself as one of a row of releases."""

    package_id: str
    sequence: int = 1
    """Strictly rising within a package_id."""
    created_at: str = EPOCH
    expires_at: str | None = None
    hash: str = "sha256"

    def __post_init__(self) -> None:
        check_model_id(self.package_id, "package_id")
        check_hash(self.hash)
        if not 1 <= self.sequence <= MAX_JSON_INT:
            raise ConfigError(f"sequence is {self.sequence}; it must be in 1..2^53")
        for name, value in (("created_at", self.created_at), ("expires_at", self.expires_at)):
            if value is not None and not DATE.fullmatch(value):
                raise ConfigError(f"{name} is {value!r}; it must be a UTC time like 2026-11-21T00:00:00Z")


@dataclass(frozen=True, slots=True)
class Content:
    """One model and its descriptions."""

    shards: Sequence[ModelSource | SealedSource]
    """One per file, see `shards_of`."""
    management: dict[str, Any]
    technical: dict[str, Any]
    """Its `files` are filled in here."""
    update: Update | None = None


def build(
    out: Path,
    contents: Sequence[Content],
    release: Release,
    program: Path | Package | None = None,
    seal: Callable[[str], Sealer] | None = None,
    envelope: Callable[[bytes], bytes | None] | None = None,
    extra: Mapping[str, bytes] | None = None,
    resume: Keys | None = None,
) -> Manifest:
    """Write a package folder.

    out      must not exist
    program  a folder that becomes Program/, or a package whose own is taken over, compared with its digests on the way;
             copied, never run
    seal     makes the encryption of a model by its id
    envelope gives manifest.sig for the bytes of manifest.json, or None
    extra    further files by path
    resume   go on with what a killed process left of the model files, as far as digests hold, and these keys where it
             is encrypted; one process at a time
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists already; packages are never overwritten: choose another name")
    keep = [path for content in contents for path in _model_paths(content)]
    keep += [str(former_of(Path(path))) for path in keep] if seal is not None else []
    with folder_aside(out) if resume is None else folder_resumed(out, keep) as aside:
        builder = _Builder(aside, release, resume)
        for folder in ("Model", "Program", "Meta-info"):  # R-8.2.1-1
            (aside / folder).mkdir(exist_ok=resume is not None)
        models = [builder.add_model(content, seal) for content in contents]
        if program is not None:
            builder.add_program(program)
        for path, content_bytes in (extra or {}).items():
            builder.add_bytes(path, content_bytes)
        return builder.finish(models, envelope)


class _Builder:
    """A package folder that grows."""

    def __init__(self, root: Path, release: Release, resume: Keys | None) -> None:
        self.root, self.release, self.resume = root, release, resume
        self.files: list[FileEntry] = []

    def add_model(self, content: Content, seal: Callable[[str], Sealer] | None) -> ModelEntry:
        shards = content.shards
        model_id = shards[0].model_id
        (self.root / "Model" / model_id).mkdir(exist_ok=self.resume is not None)
        paths = _model_paths(content)
        written = [
            write_model_file(self.root / path, [shard], seal, resume=self.resume)
            for path, shard in zip(paths, shards, strict=True)
        ]
        for path, file in zip(paths, written, strict=True):
            self._add_large(path, file)
        technical = content.technical | {"files": [{"path": p, "shard": i} for i, p in enumerate(paths, 1)]}
        described = dumps(content.management), dumps(technical)
        check_management(described[0], model_id)  # what we write, we read
        check_technical(described[1], model_id)
        self.add_bytes(f"Meta-info/{model_id}/managementinfo.json", described[0])
        self.add_bytes(f"Meta-info/{model_id}/technicalinfo.json", described[1])
        is_clear = written[0].descriptors[0].encryption is None
        root = _model_root(shards[0].hash, written) if is_clear else None
        return ModelEntry(model_id, root, tuple(paths), content.update)

    def add_program(self, program: Path | Package) -> None:
        if isinstance(program, Package):
            for entry in program.manifest.files:
                if entry.path.startswith("Program/"):
                    self._take_over(program, entry)
            return
        folder = open_folder(program)
        try:
            for path in list_below(program):
                self._copy(open_below(folder, path), f"Program/{path}")
        finally:
            os.close(folder)

    def _take_over(self, package: Package, entry: FileEntry) -> None:
        """Copy a file of another package and compare what was copied with its digest there; first, its size."""
        source = open_below(package.handle, entry.path)
        if (size := os.fstat(source).st_size) != entry.size:
            os.close(source)
            package.check_leaves(entry, size, b"")
        file = self._copy(source, entry.path)
        theirs, leaves = package.manifest, file.leaves
        if (theirs.hash, theirs.chunk_size) != (self.release.hash, CHUNK_BYTES):
            with (self.root / entry.path).open("rb") as copy:
                leaves = file_leaves(copy.fileno(), theirs.hash, theirs.chunk_size)
        package.check_leaves(entry, file.size, leaves)

    def _copy(self, source: int, path: str) -> WrittenFile:
        """Takes over the handle."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(source, "rb", buffering=0) as file, target.open("xb") as out:
            os.fchmod(out.fileno(), 0o644)
            sink = Sink(out.fileno(), target, self.release.hash, CHUNK_BYTES)
            buffer = memoryview(bytearray(CHUNK_BYTES))
            while count := file.readinto(buffer):
                sink.write(buffer[:count])
            written = WrittenFile(sink.length, sink.finish(), [])
        self._add_large(path, written)
        return written

    def _add_large(self, path: str, file: WrittenFile) -> None:
        """With its chunk digests, where it has more than one chunk."""
        chunks = None
        if len(file.leaves) > SIZE:
            number = sum(entry.chunks is not None for entry in self.files)
            chunks = f"{CHUNKS}{number:04d}.bin"
            self.add_bytes(chunks, file.leaves)
        root = tree_root(self.release.hash, file.leaves).hex()
        self.files.append(FileEntry(path, file.size, root, chunks=chunks))

    def add_bytes(self, path: str, content: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        self.files.append(FileEntry(path, len(content), _bytes_root(self.release.hash, content)))

    def finish(self, models: Sequence[ModelEntry], envelope: Callable[[bytes], bytes | None] | None = None) -> Manifest:
        release = self.release
        manifest = Manifest(
            package_id=release.package_id,
            sequence=release.sequence,
            created_at=release.created_at,
            expires_at=release.expires_at,
            hash=release.hash,
            models=tuple(models),
            files=sorted_files(self.files),
        )
        data = manifest.dumps()
        Manifest.parse(data)
        (self.root / MANIFEST).write_bytes(data)
        signature = None if envelope is None else envelope(data)
        if signature is not None:
            (self.root / SIGNATURE).write_bytes(signature)
        return manifest


def _model_root(hash_name: str, written: list[WrittenFile]) -> str:
    if len(written) == 1:
        return written[0].descriptors[0].weights_root
    return weights_root(hash_name, [tensor for file in written for tensor in file.descriptors[0].tensors])


def _bytes_root(hash_name: str, content: bytes) -> str:
    leaves = [digest(hash_name, b"\0", content[at : at + CHUNK_BYTES]) for at in range(0, len(content), CHUNK_BYTES)]
    return tree_root(hash_name, b"".join(leaves)).hex()


def _model_paths(content: Content) -> list[str]:
    """The files of a model, one for each shard."""
    count = len(content.shards)
    names = [f"-{index:05d}-of-{count:05d}" if count > 1 else "" for index in range(1, count + 1)]
    return [f"Model/{content.shards[0].model_id}/model{name}{SUFFIX}" for name in names]


def shards_of(model: ModelSource, limit_bytes: int) -> list[ModelSource]:
    """Cut in order of names so that decoded bytes of a file stay below the limit; segments lie in the first."""
    groups: list[list[TensorSource]] = [[]]
    held = 0
    ordered = sorted(model.tensors, key=lambda tensor: tensor.name.encode())
    for tensor in ordered:
        if groups[-1] and held + tensor.span.length > limit_bytes:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.span.length
    if len(groups) == 1 or model.base is not None:
        return [replace(model, tensors=ordered)]
    outline = [[tensor.name, tensor.dtype.name, list(tensor.shape)] for tensor in ordered]
    set_id = digest("sha256", canonical.dumps({"model_id": model.model_id, "tensors": outline})).hex()
    return [
        replace(
            model,
            tensors=group,
            segments=model.segments if index == 1 else (),
            shard=Shard(index, len(groups), set_id),
        )
        for index, group in enumerate(groups, 1)
    ]
