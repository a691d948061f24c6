"""A package as a folder: Model/, Program/, Meta-info/ (specification 8.2.1); open it, verify it, read from it.

    package = Package.open(folder, trust, keys)      package.verify() -> Findings      package.weights(id) -> Weights

`open` checks manifest and signature; the header and descriptor of a model file are compared with the manifest before
they are used, and each tensor against its digest when it is read, so that one tensor can be had, verified,
without reading the rest. `verify` reads everything. Nothing below Program/ is ever run.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from moestro.core.errors import BaseMismatch, FormatError, IntegrityError, UnsafePath
from moestro.package.describe import check_management, check_technical
from moestro.package.descriptor import TensorEntry, tensor_digest
from moestro.package.encrypt import Keys
from moestro.package.hashing import SIZE, leaf_hashes, root_of, tree_root
from moestro.package.limits import MAX_DESCRIPTION_BYTES, MAX_MANIFEST_BYTES, PIECE_BYTES
from moestro.package.manifest import MANIFEST, SIGNATURE, FileEntry, Manifest, ModelEntry
from moestro.package.paths import list_below, open_below, open_folder
from moestro.package.reader import ModelFile, StoredModel
from moestro.package.sign import MAX_ENVELOPE_BYTES, Trust, signers
from moestro.package.sink import file_leaves
from moestro.package.spans import Progress, ignore
from moestro.package.weights import Weights

FORGET_BYTES = 8 << 20
"""How much is read from mapped files before their pages are given back."""


@dataclass(slots=True)
class Findings:
    """What a verification covered."""

    files: int = 0
    num_bytes: int = 0
    tensors: int = 0
    unread: list[str] = field(default_factory=list)
    """Models whose tensors were not decoded, and why: no key, no base."""
    signed_by: list[str] = field(default_factory=list)


class Package:
    """An opened package folder; close it, or use it as a context manager."""

    def __init__(self, folder: Path, keys: Keys | None = None, base: "Package | None" = None) -> None:
        self.folder, self.keys, self.base = folder, keys or Keys(), base
        self.signed_by: list[str] = []
        """Ids of trusted keys that signed; empty where no trust was given."""
        self._stack = ExitStack()
        self.handle = open_folder(folder)
        self._stack.callback(os.close, self.handle)
        self._files: dict[str, ModelFile] = {}
        try:
            self.manifest_bytes = self.read(MANIFEST, MAX_MANIFEST_BYTES)
            self.manifest = Manifest.parse(self.manifest_bytes)
        except BaseException as error:
            self.close()
            if isinstance(error, UnsafePath):
                raise FormatError(f"{folder} is not a package: {error}") from error
            raise

    @classmethod
    def open(
        cls, folder: Path, trust: Trust | None = None, keys: Keys | None = None, base: "Package | None" = None
    ) -> "Package":
        """Check manifest and, where there is a trust, signature.

        base   what an update needs below it; the caller keeps it open
        """
        package = cls(folder, keys, base)
        try:
            if trust is not None:
                package.signed_by = trust.check(package.manifest_bytes, package.envelope())
        except BaseException:
            package.close()
            raise
        return package

    def envelope(self) -> bytes | None:
        """The signature's bytes, or None."""
        try:
            return self.read(SIGNATURE, MAX_ENVELOPE_BYTES)
        except UnsafePath:
            if (self.folder / SIGNATURE).is_symlink() or (self.folder / SIGNATURE).exists():
                raise
            return None

    def read(self, path: str, limit_bytes: int) -> bytes:
        """A file below the folder, unverified."""
        with os.fdopen(open_below(self.handle, path), "rb") as file:
            room = min(os.fstat(file.fileno()).st_size, limit_bytes)  # `read` takes memory for all that is asked for
            data = file.read(room + 1)
        if len(data) > limit_bytes:
            raise FormatError(f"{path} has more than {limit_bytes} bytes")
        return data

    def content(self, path: str, limit_bytes: int = MAX_DESCRIPTION_BYTES) -> bytes:
        """A listed file, compared with its digest."""
        entry = self.manifest.entry(path)
        data = self.read(path, limit_bytes)
        if len(data) != entry.size or self._root(data).hex() != entry.root:
            raise IntegrityError(path, "its bytes are not those of the manifest")
        return data

    def _root(self, data: bytes) -> bytes:
        return root_of(self.manifest.hash, data, self.manifest.chunk_size)

    def model(self, model_id: str | None = None) -> ModelEntry:
        """A model by id; None stands for the only one."""
        models = self.manifest.models
        found = [model for model in models if model_id in (None, model.model_id)]
        if len(found) != 1:
            names = ", ".join(model.model_id for model in models)
            raise FormatError(f"the package holds the models {names}; name one of them")
        return found[0]

    def stored(self, model_id: str | None = None) -> list[StoredModel]:
        """The shards of a model, opened; outlines are checked against the manifest first."""
        entry = self.model(model_id)
        found = []
        for path in entry.files:
            inside = [model for model in self._file(path).models if model.descriptor.model_id == entry.model_id]
            if len(inside) != 1:
                raise FormatError(f"{path} holds {len(inside)} models named {entry.model_id}")
            found += inside
        return found

    def _file(self, path: str) -> ModelFile:
        if path not in self._files:
            handle = open_below(self.handle, path)
            file = ModelFile(handle, path, self.keys)
            self._stack.callback(file.close)
            self._check_outline(file, self.manifest.entry(path))
            self._files[path] = file
        return self._files[path]

    def _check_outline(self, file: ModelFile, entry: FileEntry) -> None:
        """Compare what lies before the last model's data with the manifest; for small files, everything."""
        chunk, name = self.manifest.chunk_size, self.manifest.hash
        if file.size != entry.size:
            raise IntegrityError(entry.path, f"it has {file.size} bytes, the manifest says {entry.size}")
        if entry.chunks is None:
            if tree_root(name, leaf_hashes(name, file.view, chunk)).hex() != entry.root:
                raise IntegrityError(entry.path, "its bytes are not those of the manifest")
            return
        leaves = self.content(entry.chunks, MAX_MANIFEST_BYTES)
        if tree_root(name, leaves).hex() != entry.root:
            raise IntegrityError(entry.chunks, f"its digests do not make the root of {entry.path}")
        end = -(-max(model.start for model in file.models) // chunk) * chunk
        for index, found in enumerate(_cut(leaf_hashes(name, file.view[:end], chunk))):
            if found != leaves[index * SIZE : (index + 1) * SIZE]:
                raise IntegrityError(entry.path, "its header is not that of the manifest", index)

    def weights(self, model_id: str | None = None) -> Weights:
        """The tensors of a model; those of an update lie on its base's."""
        entry = self.model(model_id)
        stored = self.stored(entry.model_id)
        needs_base = stored[0].descriptor.base is not None and self.base is not None
        weights = Weights.of(stored, self._base_weights(entry) if needs_base else None)
        if entry.weights_root not in (None, weights.root):
            raise IntegrityError(entry.model_id, "its weights are not those of the manifest")
        return weights

    def _base_weights(self, update: ModelEntry) -> Weights:
        assert self.base is not None
        return self.base.weights(self.base.model_below(update).model_id)

    def segments(self, model_id: str | None = None) -> dict[str, bytes]:
        """All segments of a model, verified."""
        models, entry = self.stored(model_id), self.model(model_id)
        theirs = {}
        if any(segment.codec == "copy" for model in models for segment in model.descriptor.segments):
            if self.base is None:
                raise BaseMismatch(f"{entry.model_id} takes files over from its base; give it with --base")
            theirs = self.base.segments(self.base.model_below(entry).model_id)
        return {
            segment.name: model.segment(segment, theirs.get(segment.name))
            for model in models
            for segment in model.descriptor.segments
        }

    def model_below(self, update: ModelEntry) -> ModelEntry:
        """The model here that an update of another package is based on; the only one where roots are hidden."""
        wanted = update.update.base if update.update else None
        fitting = [model for model in self.manifest.models if model.weights_root == wanted]
        return fitting[0] if fitting else self.model(None if len(self.manifest.models) == 1 else update.model_id)

    def sparing(self, progress: Progress) -> Progress:
        """A progress that also gives mapped pages back, here and in the base, so that streaming takes no more memory
        for a larger package."""
        read = 0

        def watched(count: int) -> None:
            nonlocal read
            read += count
            if read >= FORGET_BYTES:
                read = 0
                self._forget()
            progress(count)

        return watched

    def _forget(self) -> None:
        for file in self._files.values():
            file.forget()
        if self.base is not None:
            self.base._forget()

    def is_encrypted(self, model_id: str | None = None) -> bool:
        """True where the model's data is encrypted, whether or not a key fits."""
        return any(model.descriptor.encryption is not None for model in self.stored(model_id))

    def claimed_signers(self) -> list[str]:
        """Key ids the signature file names, unchecked; for display."""
        envelope = self.envelope()
        return [] if envelope is None else signers(self.manifest_bytes, envelope)

    def verify(self, progress: Progress = ignore) -> Findings:
        """R-8.2.7-1: every listed file, none missing, none beside them, every tensor that can be decoded here."""
        findings = Findings(signed_by=self.signed_by)
        self.check_listing()
        for entry in self.manifest.files:
            leaves = self._verify_file(entry)
            findings.files, findings.num_bytes = findings.files + 1, findings.num_bytes + entry.size
            progress(entry.size)
            if entry.path.startswith("Model/"):
                findings.tensors += self._verify_tensors(entry, leaves)
        for model in self.manifest.models:
            self._verify_model(model, findings)
        return findings

    def check_listing(self) -> None:
        """No listed file is missing, and none lies beside them."""
        listed = {entry.path for entry in self.manifest.files} | {MANIFEST, SIGNATURE}
        there = set(list_below(self.folder))
        extra, missing = sorted(there - listed), sorted(listed - there - {SIGNATURE})
        if missing:
            raise IntegrityError(missing[0], f"listed in the manifest but missing ({len(missing)} in all)")
        if extra:
            raise IntegrityError(extra[0], f"not listed in the manifest ({len(extra)} in all)")

    def _verify_file(self, entry: FileEntry) -> bytes:
        """Leaf hashes of a file that is what the manifest says."""
        handle = open_below(self.handle, entry.path)
        try:
            size = os.fstat(handle).st_size
            leaves = file_leaves(handle, self.manifest.hash, self.manifest.chunk_size) if size == entry.size else b""
        finally:
            os.close(handle)
        self.check_leaves(entry, size, leaves)
        if entry.chunks is not None and self.read(entry.chunks, MAX_MANIFEST_BYTES) != leaves:
            raise IntegrityError(entry.chunks, f"its digests are not those of {entry.path}")
        return leaves

    def check_leaves(self, entry: FileEntry, size: int, leaves: bytes) -> None:
        """Compare what was read of a file, or copied of it, with the manifest."""
        if size != entry.size:
            raise IntegrityError(entry.path, f"it has {size} bytes, the manifest says {entry.size}")
        if tree_root(self.manifest.hash, leaves).hex() != entry.root:
            raise IntegrityError(entry.path, "its bytes are not those of the manifest", self._bad_chunk(entry, leaves))

    def _bad_chunk(self, entry: FileEntry, leaves: bytes) -> int | None:
        """The first chunk that differs, where the package says what chunks should be."""
        try:
            right = self.content(entry.chunks, MAX_MANIFEST_BYTES) if entry.chunks else b""
        except (IntegrityError, UnsafePath):
            return None
        pairs = zip(_cut(right), _cut(leaves), strict=False)
        return next((index for index, (a, b) in enumerate(pairs) if a != b), None)

    def _verify_tensors(self, entry: FileEntry, leaves: bytes) -> int:
        """Padding, data roots, and all tensors that need no base."""
        file = self._file(entry.path)
        file.check_gaps()
        for model in file.models:
            self._check_data_root(file, model, leaves)
        complete = [model for model in file.models if model.is_open and not model.descriptor.base]
        return sum(self._check_tensors(model, leaves) for model in complete)

    def _shares_leaves(self, model: StoredModel) -> bool:
        """True where the leaves of the file serve the model too."""
        descriptor, manifest = model.descriptor, self.manifest
        alike = (descriptor.hash, descriptor.chunk_size) == (manifest.hash, manifest.chunk_size)
        return alike and model.start % manifest.chunk_size == 0

    def _check_data_root(self, file: ModelFile, model: StoredModel, leaves: bytes) -> None:
        """The tree over the stored data; from the file's leaves where both are cut alike."""
        descriptor, end = model.descriptor, model.start + model.header.data_bytes
        if self._shares_leaves(model) and end == file.size:
            own = leaves[model.start // descriptor.chunk_size * SIZE :]
        else:
            own = file_leaves(file.handle, descriptor.hash, descriptor.chunk_size, model.start, end)
        if tree_root(descriptor.hash, own).hex() != descriptor.data_root:
            raise IntegrityError(file.name, f"the data of {descriptor.model_id} does not have its data_root")

    def _check_tensors(self, model: StoredModel, leaves: bytes) -> int:
        """All tensors of a model without base; those that lie on whole chunks are known from the file's leaves."""
        descriptor = model.descriptor
        weights = _alone(model)
        shared = self._shares_leaves(model) and descriptor.chunk_size == PIECE_BYTES and descriptor.encryption is None
        for tensor in descriptor.tensors:
            at = model.start + tensor.offset
            if shared and tensor.codec == "raw" and at % PIECE_BYTES == 0:
                root = _root_from_leaves(model, tensor, leaves[at // PIECE_BYTES * SIZE :])
                if tensor_digest(descriptor.hash, tensor.name, tensor.dtype, tensor.shape, root) != tensor.digest:
                    raise IntegrityError(f"tensor {tensor.name}", "its numbers are not those of its digest")
            else:
                weights.check(tensor.name)
        return len(descriptor.tensors)

    def _verify_model(self, model: ModelEntry, findings: Findings) -> None:
        check_management(self.content(f"Meta-info/{model.model_id}/managementinfo.json"), model.model_id)
        technical = check_technical(self.content(f"Meta-info/{model.model_id}/technicalinfo.json"), model.model_id)
        if [file["path"] for file in technical["files"]] != list(model.files):
            raise FormatError(f"technicalinfo.json of {model.model_id} lists other files than the manifest")
        stored = self.stored(model.model_id)
        if not all(part.is_open for part in stored):
            findings.unread.append(f"{model.model_id}: encrypted, no key given")
        elif stored[0].descriptor.base is None:
            self.weights(model.model_id)
            self.segments(model.model_id)
        elif self.base is None:
            findings.unread.append(f"{model.model_id}: an update, no base given")
        else:
            weights = self.weights(model.model_id)
            for tensor in stored[0].descriptor.tensors:
                weights.check(tensor.name)
            self.segments(model.model_id)
            findings.tensors += len(stored[0].descriptor.tensors)

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def __enter__(self) -> "Package":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut(leaves: bytes) -> list[bytes]:
    return [leaves[at : at + SIZE] for at in range(0, len(leaves), SIZE)]


def _alone(model: StoredModel) -> Weights:
    """One shard, looked at without the others."""
    entries = {tensor.name: tensor for tensor in model.descriptor.tensors}
    return Weights(model.descriptor.hash, entries, dict.fromkeys(entries, model))


def _root_from_leaves(model: StoredModel, tensor: TensorEntry, leaves: bytes) -> bytes:
    whole = tensor.length // PIECE_BYTES
    rest = model.data.read(tensor.offset + whole * PIECE_BYTES, tensor.length % PIECE_BYTES)
    own = leaves[: whole * SIZE] + leaf_hashes(model.descriptor.hash, rest, PIECE_BYTES)
    return tree_root(model.descriptor.hash, own)


@contextmanager
def open_stack(folders: Sequence[Path], trust: Trust | None = None, keys: Keys | None = None) -> Iterator[Package]:
    """The last package, on those before it: a full one, then updates in order.

    trust   must hold for the last one; it names the base by its digest, so the base needs no signature
    """
    with ExitStack() as stack:
        package: Package | None = None
        for folder in folders:
            last = folder is folders[-1]
            package = stack.enter_context(Package.open(folder, trust if last else None, keys, package))
        assert package is not None
        yield package
