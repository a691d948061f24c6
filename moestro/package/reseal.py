"""The same package with its models encrypted, for other recipients, or in clear again.

    encrypt(folder, out, recipients)        rewrap(folder, out, keys, recipients)        decrypt(folder, out, keys)

Tensors go over in their stored form, so nothing is compressed twice, and a package that is encrypted and decrypted has
its old bytes again. Re-wrapping copies ciphertext and changes the envelope alone (8.2.5, 8): whoever could read the old
package still holds the data key and can read the new one, so it adds readers, and takes none away from what they have.
Signatures cover the stored bytes, so the new package must be signed anew.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from moestro.core.errors import DecryptionError, FormatError
from moestro.package.build import Content, Release, build
from moestro.package.describe import check_management, check_technical
from moestro.package.descriptor import TensorEntry
from moestro.package.encrypt import FAILED, Keys, Recipient, Sealer
from moestro.package.folder import Package
from moestro.package.limits import CHUNK_BYTES
from moestro.package.manifest import RESULT_SIGNATURE, Manifest, ModelEntry
from moestro.package.reader import StoredModel
from moestro.package.sign import MAX_ENVELOPE_BYTES
from moestro.package.spans import Progress, Watched, ignore, pieces
from moestro.package.writer import BATCH_BYTES, ModelSource, SealedSource, SegmentSource, TensorSource


def encrypt(
    folder: Path, out: Path, to: Sequence[Recipient], suite: str = "A256GCM", progress: Progress = ignore
) -> Manifest:
    """A new package whose models only the recipients can read; the old one is verified first and stays as it is."""
    with Package.open(folder) as package:
        closed = [model.model_id for model in package.manifest.models if package.is_encrypted(model.model_id)]
        if closed:
            raise FormatError(f"{closed[0]} is encrypted already; decrypt it first, or start from the clear package")
        return _rebuilt(package, out, partial(Sealer, list(to), suite=suite), progress)


def decrypt(folder: Path, out: Path, keys: Keys, progress: Progress = ignore) -> Manifest:
    """A new package in clear; raises DecryptionError where no key fits or the bytes were changed."""
    if not keys:
        raise DecryptionError("no key given; give --key or --password")
    with Package.open(folder, keys=keys) as package:
        for model in package.manifest.models:
            if not all(part.is_open for part in package.stored(model.model_id)):
                raise DecryptionError(f"{model.model_id}: {FAILED}")
        return _rebuilt(package, out, None, progress)


def rewrap(folder: Path, out: Path, keys: Keys, to: Sequence[Recipient], progress: Progress = ignore) -> Manifest:
    """A new package with the same ciphertext for other recipients; raises DecryptionError where no key fits."""
    with Package.open(folder, keys=keys) as package:
        package.check_listing()
        contents = []
        for model in package.manifest.models:
            parts = package.stored(model.model_id)
            if not package.is_encrypted(model.model_id):
                raise FormatError(f"{model.model_id} is not encrypted; encrypt it first")
            contents.append(_content(package, model, [_wrapped(part, to, progress) for part in parts]))
        return _built(package, out, contents, None)


def _wrapped(model: StoredModel, to: Sequence[Recipient], progress: Progress) -> SealedSource:
    """The data key of a model, wrapped for others."""
    opened, envelope = model.opened, model.descriptor.encryption
    if opened is None or envelope is None:
        raise DecryptionError(f"{model.descriptor.model_id}: {FAILED}")
    if model.descriptor.chunk_size != CHUNK_BYTES:
        raise FormatError(f"digests are over chunks of {model.descriptor.chunk_size} bytes; encrypt the model anew")
    salt = bytes.fromhex(envelope["salt"])
    sealer = Sealer(to, model.descriptor.model_id, envelope["suite"], opened.dek, salt)
    new = replace(model.descriptor, encryption=sealer.envelope(opened.length), extra={})
    return SealedSource(new, Watched(opened.stored, progress))


def _rebuilt(package: Package, out: Path, seal: Callable[[str], Sealer] | None, progress: Progress) -> Manifest:
    package.verify()
    contents = []
    for model in package.manifest.models:
        shards = [_source(part, progress) for part in package.stored(model.model_id)]
        contents.append(_content(package, model, shards))
    return _built(package, out, contents, seal)


def _built(package: Package, out: Path, contents: Sequence[Content], seal: Callable[[str], Sealer] | None) -> Manifest:
    """With what lies beside the models."""
    listed = {entry.path for entry in package.manifest.files}
    extra = {path: package.content(path, MAX_ENVELOPE_BYTES) for path in listed & {RESULT_SIGNATURE}}
    return build(out, contents, release_of(package.manifest), package, seal, extra=extra)


def release_of(manifest: Manifest) -> Release:
    """What a package says about itself."""
    return Release(
        package_id=manifest.package_id,
        sequence=manifest.sequence,
        created_at=manifest.created_at,
        expires_at=manifest.expires_at,
        hash=manifest.hash,
    )


def _content(package: Package, model: ModelEntry, shards: Sequence[ModelSource | SealedSource]) -> Content:
    here = f"Meta-info/{model.model_id}"
    management = check_management(package.content(f"{here}/managementinfo.json"), model.model_id)
    technical = check_technical(package.content(f"{here}/technicalinfo.json"), model.model_id)
    return Content(shards, management, technical, model.update)


def _source(model: StoredModel, progress: Progress) -> ModelSource:
    descriptor = model.descriptor
    ordered = sorted(descriptor.tensors, key=lambda tensor: tensor.name.encode())
    segments = [
        SegmentSource(entry.name, b"", entry)
        if entry.codec == "copy"
        else SegmentSource(entry.name, model.segment(entry))
        for entry in descriptor.segments
    ]
    return ModelSource(
        descriptor.model_id,
        [_tensor(model, entry, progress) for entry in ordered],
        segments,
        base=descriptor.base,
        removed=descriptor.removed,
        shard=descriptor.shard,
        hash=descriptor.hash,
        weights_root=descriptor.weights_root,
    )


def _tensor(model: StoredModel, entry: TensorEntry, progress: Progress) -> TensorSource:
    stored = Watched(model.stored(entry), progress)
    encode = None if entry.codec == "raw" else partial(pieces, stored, BATCH_BYTES)
    return TensorSource(entry.name, entry.dtype, entry.shape, stored, entry.codec, encode, entry.cp, entry.digest)
