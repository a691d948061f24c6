"""`manifest.json`: every file of a package with its size and digest, and the identities of its models (8.2.7).

    Manifest.parse(bytes) -> checked        manifest.dumps() -> canonical bytes, which are what is signed

`package_root`, the tree over the entries of `files`, is the content address of the package. `sequence` only ever
rises within a `package_id`, which names the channel of releases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moestro.core.errors import FormatError
from moestro.package import canonical
from moestro.package.fields import Fields
from moestro.package.hashing import SIZE, check_hash, digest, tree_root
from moestro.package.limits import (
    CHUNK_BYTES,
    MAX_CHAIN,
    MAX_CHUNK_BYTES,
    MAX_FILE_BYTES,
    MAX_JSON_INT,
    MAX_MANIFEST_BYTES,
    MAX_MANIFEST_FILES,
    MAX_MODELS,
    MIN_CHUNK_BYTES,
)
from moestro.package.paths import check_model_id, check_path, check_paths

Table = dict[str, Any]
SCHEMA = "gbt42382.2/manifest/1"
MANIFEST = "Meta-info/manifest.json"
SIGNATURE = "Meta-info/manifest.sig"
RESULT_SIGNATURE = "Meta-info/result.sig"
"""The target's manifest.sig, in an update that leads to exactly the target."""
CHUNKS = "Meta-info/chunks/"
MODES = ("exact", "qres")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the package."""

    path: str
    size: int
    root: str
    """Tree over its chunks."""
    sha256: str | None = None
    """Of the whole file, where an OCI export needs it."""
    chunks: str | None = None
    """Path of the file with its leaf hashes."""

    def table(self) -> Table:
        """As in the manifest."""
        table: Table = {"path": self.path, "size": self.size, "root": self.root}
        table |= {"sha256": self.sha256} if self.sha256 else {}
        return table | ({"chunks": self.chunks} if self.chunks else {})


@dataclass(frozen=True, slots=True)
class Update:
    """That a model is a residual, for stores that must not open it. Our addition."""

    base: str
    """weights_root of the base."""
    chain: int
    mode: str
    """`exact`, or `qres` where some tensors are quantised."""

    def table(self) -> Table:
        """As in the manifest."""
        return {"base": self.base, "chain": self.chain, "mode": self.mode}


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model of the package."""

    model_id: str
    weights_root: str | None
    """None for an encrypted model."""
    files: tuple[str, ...]
    """Its packaged model files in order of shards."""
    update: Update | None = None

    def table(self) -> Table:
        """As in the manifest."""
        table: Table = {"model_id": self.model_id, "weights_root": self.weights_root, "files": list(self.files)}
        return table | ({"update": self.update.table()} if self.update else {})


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole."""

    package_id: str
    sequence: int
    created_at: str
    models: tuple[ModelEntry, ...]
    files: tuple[FileEntry, ...]
    hash: str = "sha256"
    chunk_size: int = CHUNK_BYTES
    expires_at: str | None = None

    @property
    def package_root(self) -> str:
        """Tree over the canonical JSON of each entry of `files`."""
        leaves = b"".join(digest(self.hash, b"\0", canonical.dumps(entry.table())) for entry in self.files)
        return tree_root(self.hash, leaves).hex()

    @property
    def size(self) -> int:
        """Bytes of all files, the manifest itself not counted."""
        return sum(entry.size for entry in self.files)

    def entry(self, path: str) -> FileEntry:
        """The entry of a path; raises FormatError where there is none."""
        for entry in self.files:
            if entry.path == path:
                return entry
        raise FormatError(f"the manifest lists no file {path}")

    def dumps(self) -> bytes:
        """Canonical bytes."""
        table: Table = {"schema": SCHEMA, "package_id": self.package_id, "sequence": self.sequence}
        table |= {"created_at": self.created_at, "hash": self.hash, "chunk_size": self.chunk_size}
        table |= {"models": [model.table() for model in self.models], "files": [file.table() for file in self.files]}
        table |= {"expires_at": self.expires_at} if self.expires_at else {}
        return canonical.dumps(table | {"package_root": self.package_root})

    @classmethod
    def parse(cls, data: bytes) -> "Manifest":
        """Check every rule that needs only the manifest."""
        fields = Fields(canonical.loads(data, MAX_MANIFEST_BYTES, "manifest.json"), "manifest.json")
        if fields.text("schema") != SCHEMA:
            raise FormatError(f"manifest.json has schema {fields.text('schema')[:40]!r}, not {SCHEMA}")
        found = cls(
            package_id=check_model_id(fields.text("package_id"), "package_id"),
            sequence=fields.whole("sequence", 1, MAX_JSON_INT),
            created_at=fields.date("created_at"),
            expires_at=fields.date("expires_at") if fields.has("expires_at") else None,
            hash=check_hash(fields.any("hash")),
            chunk_size=fields.whole("chunk_size", MIN_CHUNK_BYTES, MAX_CHUNK_BYTES),
            models=tuple(map(_model, fields.items("models", MAX_MODELS))),
            files=tuple(map(_file, fields.items("files", MAX_MANIFEST_FILES))),
        )
        root = fields.hex32("package_root")
        fields.finish()
        found._check()
        if root != found.package_root:
            raise FormatError("manifest.json: package_root is not the root over its files")
        return found

    def _check(self) -> None:
        if self.chunk_size & (self.chunk_size - 1):
            raise FormatError(f"manifest.json: chunk_size is {self.chunk_size}; it must be a power of two")
        paths = check_paths(entry.path for entry in self.files)
        if paths != sorted(paths):
            raise FormatError("manifest.json: files are not sorted by path")
        listed = {entry.path: entry for entry in self.files}
        if MANIFEST in listed or SIGNATURE in listed:
            raise FormatError("manifest.json lists itself or its signature")
        self._check_chunk_files(listed)
        self._check_models(listed)

    def _check_chunk_files(self, listed: dict[str, FileEntry]) -> None:
        for entry in self.files:
            if entry.chunks is None:
                continue
            leaves = -(-entry.size // self.chunk_size)
            if not entry.chunks.startswith(CHUNKS) or entry.chunks not in listed:
                raise FormatError(
                    f"manifest.json: {entry.path} has its chunks in {entry.chunks!r}, which is not listed"
                )
            if listed[entry.chunks].size != leaves * SIZE:
                raise FormatError(f"manifest.json: {entry.chunks} must have {leaves * SIZE} bytes for {entry.path}")

    def _check_models(self, listed: dict[str, FileEntry]) -> None:
        """R-8.2.1-2: each model has files below Model/ and a description below Meta-info/."""
        ids = [model.model_id for model in self.models]
        if not ids or len(set(ids)) != len(ids):
            raise FormatError("manifest.json: models are missing or listed twice")
        named = {path for model in self.models for path in model.files}
        stored = {path for path in listed if path.startswith("Model/")}
        if named != stored or len(named) != sum(len(model.files) for model in self.models):
            raise FormatError("manifest.json: models and the files below Model/ do not agree")
        for model in self.models:
            if not model.files or any(path.split("/")[1] != model.model_id for path in model.files):
                raise FormatError(f"manifest.json: {model.model_id} has files of another model, or none")
            for name in ("managementinfo", "technicalinfo"):
                if f"Meta-info/{model.model_id}/{name}.json" not in listed:
                    raise FormatError(f"manifest.json: {model.model_id} lacks Meta-info/{model.model_id}/{name}.json")


def _file(item: Any) -> FileEntry:
    fields = Fields(item, "an entry of files")
    entry = FileEntry(
        path=check_path(fields.any("path")),
        size=fields.whole("size", 0, MAX_FILE_BYTES),
        root=fields.hex32("root"),
        sha256=fields.hex32("sha256") if fields.has("sha256") else None,
        chunks=check_path(fields.any("chunks")) if fields.has("chunks") else None,
    )
    fields.finish()
    return entry


def _model(item: Any) -> ModelEntry:
    fields = Fields(item, "an entry of models")
    model = ModelEntry(
        model_id=check_model_id(fields.text("model_id")),
        weights_root=None if fields.any("weights_root") is None else fields.hex32("weights_root"),
        files=tuple(map(check_path, fields.items("files", MAX_MANIFEST_FILES))),
        update=_update(fields.any("update")) if fields.has("update") else None,
    )
    fields.finish()
    return model


def _update(item: Any) -> Update:
    fields = Fields(item, "an update")
    mode = fields.text("mode")
    if mode not in MODES:
        raise FormatError(f"an update has mode {mode[:20]!r}; it must be one of {MODES}")
    update = Update(fields.hex32("base"), fields.whole("chain", 1, MAX_CHAIN), mode)
    fields.finish()
    return update


def sorted_files(entries: Sequence[FileEntry]) -> tuple[FileEntry, ...]:
    """In the order that the manifest wants."""
    return tuple(sorted(entries, key=lambda entry: entry.path))
