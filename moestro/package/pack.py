"""Models to packages and back: the work behind `moestro pack`, `unpack`, `verify` and `sign`.

    pack(model folder, out) -> Packed        verify(folder) -> Findings        unpack(folder, out) -> paths

Every result is written aside, flushed and renamed: it is whole or absent. Nothing is ever overwritten.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError
from moestro.core.files import folder_aside, write_bytes
from moestro.package.build import Content, Release, build, shards_of
from moestro.package.codecs.registry import READERS
from moestro.package.describe import management_info, technical_info
from moestro.package.descriptor import TensorEntry
from moestro.package.encrypt import Keys, Recipient, Sealer
from moestro.package.folder import Findings, Package, open_stack
from moestro.package.keys import load_signing
from moestro.package.manifest import SIGNATURE, Manifest
from moestro.package.sign import Trust, sign
from moestro.package.sources import Source, gather
from moestro.package.spans import Progress, Span, Watched, ignore
from moestro.package.unpack import write_source
from moestro.package.writer import ModelSource, SegmentSource, TensorSource

COMPACT = "bp-zstd"
"""Codec of compact packages; it stores what does not compress as it is."""
SHARD_BYTES = 1 << 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a package is made."""

    release: Release
    compact: bool = False
    """Compress without loss; about two thirds of bfloat16 weights remain."""
    to: Sequence[Recipient] = ()
    """Encrypt for these; nobody: leave in clear."""
    suite: str = "A256GCM"
    program: Path | None = None
    """A folder that becomes Program/; copied, never run."""
    leave_out: Sequence[str] = ()
    """Patterns of files that stay behind."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """What managementinfo.json says beyond what is found: license, authors, description, parent ..."""
    shard_bytes: int = SHARD_BYTES
    """Decoded bytes of a model file, as a bound."""

    def seal(self) -> Callable[[str], Sealer] | None:
        """Makes the encryption of a model by its id."""
        return partial(Sealer, list(self.to), suite=self.suite) if self.to else None


@dataclass(frozen=True, slots=True)
class Packed:
    """What came of it."""

    manifest: Manifest
    left_out: list[str]
    """Files that were not packed."""


def pack(
    models: Path | Mapping[str, Path], out: Path, options: Options | None = None, progress: Progress = ignore
) -> Packed:
    """Make a package of one model, or of several by their ids.

    models    a safetensors file, a Hugging Face folder, a checkpoint or a run of ours
    progress  called with each number of bytes read
    raises    ConversionError naming what cannot be carried, ConfigError where `out` exists
    """
    if options is None:
        options = Options(release=Release(package_id=out.name))
    if isinstance(models, Path):
        models = {options.release.package_id: models}
    sources = {model_id: gather(path, options.leave_out) for model_id, path in models.items()}
    contents = [_content(model_id, source, options, progress) for model_id, source in sources.items()]
    manifest = build(out, contents, options.release, options.program, options.seal())
    return Packed(manifest, [path for source in sources.values() for path in source.left_out])


def _content(model_id: str, source: Source, options: Options, progress: Progress) -> Content:
    tensors = [
        tensor_source(tensor.name, tensor.dtype, tensor.shape, Watched(part, progress), options.compact)
        for tensor, part in source.tensors
    ]
    segments = [SegmentSource(name, data) for name, data in source.segments.items()]
    model = ModelSource(model_id, tensors, segments, hash=options.release.hash)
    parameters = sum(8 * tensor.length // tensor.dtype.bits for tensor, _ in source.tensors)
    given = {"created_at": options.release.created_at, **options.info}
    size = sum(part.length for _, part in source.tensors)
    readme = source.segments.get("file/README.md", b"")
    technical = technical_info(source.json("config"), int(options.compact), [])
    shards = shards_of(model, options.shard_bytes)
    return Content(shards, management_info(model_id, given, parameters, size, readme), technical)


def tensor_source(name: str, dtype: Any, shape: tuple[int, ...], span: Span, compact: bool) -> TensorSource:
    """A tensor to be stored as it is, or compressed."""
    if not compact or not span.length:
        return TensorSource(name, dtype, shape, span)
    entry = TensorEntry(name, dtype, shape, COMPACT)
    return TensorSource(name, dtype, shape, span, COMPACT, partial(READERS[COMPACT].encode, entry, span, None))


def verify(
    folder: Path,
    trust: Trust | None = None,
    keys: Keys | None = None,
    base: Sequence[Path] = (),
    progress: Progress = ignore,
) -> Findings:
    """Check everything there is: signature where a trust is given, every file, every tensor that can be decoded.

    base   what an update needs: a full package, then updates in order; without it only its stored bytes are checked
    raises an error of `PackageError` that names the file or tensor
    """
    with open_stack([*base, folder], trust, keys) as package:
        return package.verify(progress)


def unpack(
    folder: Path,
    out: Path,
    model_id: str | None = None,
    *,
    trust: Trust | None = None,
    keys: Keys | None = None,
    base: Sequence[Path] = (),
    progress: Progress = ignore,
) -> list[str]:
    """Write a model's files as they were before packing; returns their paths below `out`."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists already; models are never overwritten: choose another name")
    with open_stack([*base, folder], trust, keys) as package:
        weights, segments = package.weights(model_id), package.segments(model_id)
        secret = package.is_encrypted(model_id)
        with folder_aside(out) as aside:
            if secret:
                aside.chmod(0o700)
            return write_source(aside, weights, segments, 0o600 if secret else 0o644, package.sparing(progress))


def sign_package(folder: Path, key: Path) -> list[str]:
    """Add a signature to a package; returns the ids of all keys whose signatures it carries then."""
    with Package.open(folder) as package:
        envelope = sign(package.manifest_bytes, load_signing(key), package.envelope())
    write_bytes(folder / SIGNATURE, envelope)
    os.chmod(folder / SIGNATURE, 0o644)
    with Package.open(folder) as package:
        return package.claimed_signers()
