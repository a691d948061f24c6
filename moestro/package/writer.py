"""Write packaged model files: the same model and options give the same bytes on every machine.

    write_model_file(path, [ModelSource, ...], seal=None) -> WrittenFile

Data is written while it is hashed; the descriptor comes before it in the file but is known only after it, so room for
it is reserved. Where it turns out so much shorter that the data would begin earlier, a key `x_pad` fills it up.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from moestro.core.errors import ConfigError, DecryptionError, IntegrityError
from moestro.core.files import cannot_write
from moestro.package import canonical
from moestro.package.bulk import write_all
from moestro.package.codecs.compressor import compress
from moestro.package.descriptor import Base, Descriptor, SegmentEntry, Shard, TensorEntry, tensor_digest, weights_root
from moestro.package.dtypes import DataType, num_bytes
from moestro.package.encrypt import Keys, Place, Sealer, stored_bytes
from moestro.package.hashing import Buffer, digest, leaf_hashes, root_of, tree_root
from moestro.package.layout import FILE_HEADER, FileHeader, ModelHeader, data_start, model_start, round_up
from moestro.package.limits import ALIGNMENT, CHUNK_BYTES, MAX_FILE_BYTES, MAX_JSON_INT, PIECE_BYTES
from moestro.package.placement import place
from moestro.package.resume import Find, Leftover, create, reopen, set_aside
from moestro.package.sink import Sink, file_leaves
from moestro.package.spans import Span, pieces

BATCH_BYTES = 6 * PIECE_BYTES
"""SHA-256 runs three pieces at once; the whole stays in the third cache."""
UNKNOWN_DIGEST = "0" * 64
LARGE_ALIGN = 20
LARGE_BYTES = 64 << 20
"""From this much data on, data begins at a multiple of 1 MiB, so that chunks of file and data are the same."""
LARGE_UPDATE_BYTES = 1 << 30
"""The same for updates, by their decoded bytes: below, the MiB would be more than a thousandth of the whole model."""


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A tensor to be written."""

    name: str
    dtype: DataType
    shape: tuple[int, ...]
    span: Span
    """The bytes that decoding will give."""
    codec: str = "raw"
    encode: Callable[[], Iterable[Buffer]] | None = None
    """The stored form; None stores `span` as it is."""
    cp: Mapping[str, int | str] = field(default_factory=dict)
    digest: str = ""
    """Where it is known; else it is computed from `span`."""
    promised: str = ""
    """The digest of bytes that a former try may have written already; what is written is hashed all the same."""


@dataclass(frozen=True, slots=True)
class SegmentSource:
    """A payload that is no tensor."""

    name: str
    data: bytes
    copied: SegmentEntry | None = None
    """The entry of the base's segment where that is the same; then nothing is stored."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to be written into one file."""

    model_id: str
    tensors: Sequence[TensorSource]
    segments: Sequence[SegmentSource] = ()
    base: Base | None = None
    removed: Sequence[str] = ()
    inherited: Sequence[TensorEntry] = ()
    """Tensors taken over from the base, for the result's weights_root."""
    shard: Shard | None = None
    hash: str = "sha256"
    weights_root: str = ""
    """Where it is known; else it is computed."""
    promised_root: str = ""
    """What must come out; IntegrityError where it does not."""

    @property
    def num_bytes(self) -> int:
        """Of the tensors, decoded."""
        return sum(num_bytes(tensor.dtype, tensor.shape) for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class SealedSource:
    """A model that is encrypted already: its ciphertext is copied, under another envelope."""

    descriptor: Descriptor
    data: Span

    @property
    def model_id(self) -> str:
        """As in the descriptor."""
        return self.descriptor.model_id

    @property
    def hash(self) -> str:
        """As in the descriptor."""
        return self.descriptor.hash

    @property
    def base(self) -> Base | None:
        """As in the descriptor."""
        return self.descriptor.base

    @property
    def num_bytes(self) -> int:
        """Of the ciphertext."""
        return self.data.length


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What a manifest needs to know."""

    size: int
    leaves: bytes
    """Leaf hashes of the file's chunks of 1 MiB."""
    descriptors: list[Descriptor]


class DataSink(Protocol):
    """What tensors are written to: the file itself, or an encrypting stream before it."""

    length: int

    def write(self, data: Buffer, leaves: bytes | None = None) -> None: ...
    def pad_to(self, length: int) -> None: ...
    def at_chunk_start(self) -> bool: ...


def write_model_file(
    path: Path,
    models: Sequence[ModelSource | SealedSource],
    seal: Callable[[str], Sealer] | None = None,
    align_log2: int | None = None,
    resume: Keys | None = None,
) -> WrittenFile:
    """Write one file whole; the caller removes what a failure leaves.

    seal         makes the encryption of a model by its id; None leaves models in clear
    align_log2   model data begins at multiples of 2^align_log2; None: 1 MiB for large models and updates, else 4 KiB
    resume       of a file that is there tensors are kept, up to the first that is not what was promised; what was
                 encrypted is opened with these keys
    """
    if align_log2 is None:
        total = sum(model.num_bytes for model in models)
        large = LARGE_UPDATE_BYTES if models[0].base is not None else LARGE_BYTES
        align_log2 = LARGE_ALIGN if total >= large else 12
    secret = seal is not None or any(isinstance(model, SealedSource) for model in models)
    mode = 0o600 if secret else 0o644
    try:
        with ExitStack() as stack:
            left = None
            if resume is None:
                handle = create(path, mode)
            elif secret:
                left = stack.enter_context(set_aside(path, mode, resume))
                handle = create(path, mode)
            else:
                left = reopen(path, mode)
                handle = left.handle
            stack.callback(os.close, handle)
            return _FileWriter(handle, path, align_log2, models[0].hash, left).write(models, seal)
    except OSError as error:
        raise cannot_write(path, error) from error


class _FileWriter:
    """One open file."""

    def __init__(self, handle: int, path: Path, align_log2: int, hash_name: str, left: Leftover | None) -> None:
        """`left` by a former try; None where neither that nor a next one matters."""
        self.handle, self.path, self.align_log2, self.hash = handle, path, align_log2, hash_name
        self.left = left
        self.end = FILE_HEADER.size
        self.heads: list[tuple[int, int, Descriptor, int]] = []
        """(header offset, data offset, descriptor, data bytes) of each model."""
        self.data_leaves: list[bytes] = []

    def write(self, models: Sequence[ModelSource | SealedSource], seal: Callable[[str], Sealer] | None) -> WrittenFile:
        for model in models:
            if isinstance(model, SealedSource):
                self._copy_model(model)
            else:
                self._write_model(model, None if seal is None else seal(model.model_id))
        if self.end > MAX_FILE_BYTES:
            raise ConfigError(f"{self.path} has {self.end} bytes; at most 2^53 are allowed")
        flags = 0
        for head in self.heads:
            flags |= head[2].flags
        file_header = FileHeader(len(models), self.align_log2, flags).pack()
        os.pwrite(self.handle, file_header, 0)
        for index, (offset, _, descriptor, data_bytes) in enumerate(self.heads):
            header = _head(index, descriptor, data_bytes)
            os.pwrite(self.handle, header + digest("sha256", file_header, header), offset)
        os.ftruncate(self.handle, self.end)
        return WrittenFile(self.end, self._file_leaves(), [head[2] for head in self.heads])

    def _file_leaves(self) -> bytes:
        """Known from the data where file and data share their grid, else read back."""
        start = self.heads[0][1]
        if len(self.heads) == 1 and start % CHUNK_BYTES == 0:
            return file_leaves(self.handle, self.hash, CHUNK_BYTES, 0, start) + self.data_leaves[0]
        return file_leaves(self.handle, self.hash, CHUNK_BYTES)

    def _write_model(self, model: ModelSource, seal: Sealer | None) -> None:
        segments = [_packed(segment, model.hash) for segment in model.segments]
        draft = _draft(model, segments)
        if seal is not None:
            draft = replace(draft, encryption=seal.envelope(MAX_JSON_INT))
        header_offset = model_start(self.end)
        reserved = len(canonical.dumps(draft.public()))
        start = data_start(header_offset, reserved, self.align_log2)
        payloads = [payload for _, payload in segments]
        if seal is None:
            final, leaves, length = self._write_plain(model, draft, payloads, start)
        else:
            final, leaves, length = self._write_sealed(model, draft, payloads, start, seal)
        final = replace(final, data_root=tree_root(model.hash, leaves).hex())
        self._end_model(header_offset, start, self._padded(final, header_offset, start), leaves, length)

    def _end_model(self, header_offset: int, start: int, final: Descriptor, leaves: bytes, length: int) -> None:
        self.heads.append((header_offset, start, final, length))
        self.data_leaves.append(leaves)
        self.end = start + length

    def _copy_model(self, model: SealedSource) -> None:
        """Ciphertext as it is, compared with the root that its descriptor promises."""
        descriptor, header_offset = model.descriptor, model_start(self.end)
        start = data_start(header_offset, len(canonical.dumps(descriptor.public())), self.align_log2)
        os.lseek(self.handle, start, os.SEEK_SET)
        sink = Sink(self.handle, self.path, model.hash, CHUNK_BYTES, direct=self.align_log2 >= LARGE_ALIGN)
        for batch in pieces(model.data, BATCH_BYTES):
            sink.write(batch)
        leaves = sink.finish()
        if tree_root(model.hash, leaves).hex() != descriptor.data_root:
            raise IntegrityError(model.model_id, "its encrypted data does not have its data_root")
        self._end_model(header_offset, start, descriptor, leaves, sink.length)

    def _write_plain(
        self, model: ModelSource, draft: Descriptor, payloads: list[bytes], start: int
    ) -> tuple[Descriptor, bytes, int]:
        if self.left is not None:
            os.lseek(self.handle, self.end, os.SEEK_SET)
            write_all(self.handle, bytes(start - self.end), self.path)
            model = _resumed(model, draft, self.left.in_clear(start))
        os.lseek(self.handle, start, os.SEEK_SET)
        sink = Sink(self.handle, self.path, model.hash, CHUNK_BYTES, direct=self.align_log2 >= LARGE_ALIGN)
        final = _write_data(sink, model, draft, payloads)
        return final, sink.finish(), sink.length

    def _write_sealed(
        self, model: ModelSource, draft: Descriptor, payloads: list[bytes], start: int, seal: Sealer
    ) -> tuple[Descriptor, bytes, int]:
        """Plaintext: u64 length, private descriptor, padding to 64, data."""
        head_bytes = round_up(8 + len(canonical.dumps(draft.private())), ALIGNMENT)
        if self.left is not None:
            at = model_start(self.end)
            model = _resumed(model, draft, self.left.sealed(at, self.align_log2, model.model_id, head_bytes))
            begun = _head(len(self.heads), draft, stored_bytes(MAX_JSON_INT))
            os.pwrite(self.handle, begun, at)  # for a next try; the head of the end, with its digest, is longer
        stream = seal.stream(Place(self.handle, self.path, start, model.hash), head_bytes)
        final = _write_data(stream, model, draft, payloads)
        length, leaves = stream.close(_private_head(final, head_bytes))
        return replace(final, encryption=seal.envelope(head_bytes + stream.length)), leaves, length

    def _padded(self, descriptor: Descriptor, header_offset: int, start: int) -> Descriptor:
        """The descriptor with as much `x_pad` as its reserved place needs, which mostly is none."""
        length = len(canonical.dumps(descriptor.public()))
        missing = start - (1 << self.align_log2) + 1 - data_start(header_offset, length, 0)
        if missing <= 0:
            return descriptor
        return replace(descriptor, extra={"x_pad": "0" * max(0, missing - len('"x_pad":"",'))})


def _head(index: int, descriptor: Descriptor, data_bytes: int) -> bytes:
    text = canonical.dumps(descriptor.public())
    return ModelHeader(index, descriptor.flags, len(text), data_bytes).pack() + text


def _resumed(model: ModelSource, draft: Descriptor, find: Find) -> ModelSource:
    """In the order of the file; tensors that a former try left come from there, up to the first with another digest."""
    source_of = {tensor.name: tensor for tensor in model.tensors}
    tensors = [source_of[entry.name] for entry in draft.tensors]
    for index, (entry, source) in enumerate(zip(draft.tensors, tensors, strict=True)):
        there = find(entry.offset, entry.length) if source.encode is None and source.promised else None
        if there is None:
            continue
        try:
            root = span_root(there, model.hash)
        except DecryptionError:
            break
        if tensor_digest(model.hash, entry.name, entry.dtype, entry.shape, root) != source.promised:
            break
        tensors[index] = replace(source, span=there)
    return replace(model, tensors=tensors)


def _private_head(descriptor: Descriptor, head_bytes: int) -> bytes:
    table = descriptor.private()
    missing = head_bytes - ALIGNMENT + 1 - 8 - len(canonical.dumps(table))
    if missing > 0:
        table["x_pad"] = "0" * max(0, missing - len('"x_pad":"",'))
    text = canonical.dumps(table)
    return (len(text).to_bytes(8, "little") + text).ljust(head_bytes, b"\0")


def _packed(segment: SegmentSource, hash_name: str) -> tuple[SegmentEntry, bytes]:
    """The entry, still without offset, and what is stored."""
    if segment.copied is not None:
        return SegmentEntry(segment.name, 0, 0, segment.copied.size, "copy", segment.copied.digest), b""
    root = root_of(hash_name, segment.data, PIECE_BYTES).hex()
    frame = compress(segment.data)
    codec, payload = ("zstd", frame) if len(frame) < len(segment.data) else ("raw", segment.data)
    return SegmentEntry(segment.name, 0, len(payload), len(segment.data), codec, root), payload


def _draft(model: ModelSource, segments: list[tuple[SegmentEntry, bytes]]) -> Descriptor:
    """The descriptor with every place that is known, and the longest numbers where it is not."""
    entries, at = [], 0
    for entry, payload in segments:
        offset = round_up(at, ALIGNMENT) if payload else 0
        entries.append(replace(entry, offset=offset))
        at = max(at, offset + len(payload))
    plain = [tensor for tensor in model.tensors if tensor.encode is None]
    coded = [tensor for tensor in model.tensors if tensor.encode is not None]
    lengths = [num_bytes(tensor.dtype, tensor.shape) for tensor in plain]
    tensors = [
        TensorEntry(tensor.name, tensor.dtype, tensor.shape, "raw", offset, length, UNKNOWN_DIGEST)
        for tensor, offset, length in zip(plain, place(lengths, at, CHUNK_BYTES), lengths, strict=True)
    ]
    tensors.sort(key=lambda entry: (entry.offset, entry.length, entry.name))
    unknown = MAX_FILE_BYTES
    tensors += [
        TensorEntry(tensor.name, tensor.dtype, tensor.shape, tensor.codec, unknown, unknown, UNKNOWN_DIGEST, tensor.cp)
        for tensor in coded
    ]
    return Descriptor(
        model_id=model.model_id,
        hash=model.hash,
        data_root=UNKNOWN_DIGEST,
        weights_root=UNKNOWN_DIGEST,
        segments=tuple(entries),
        tensors=tuple(tensors),
        base=model.base,
        removed=tuple(sorted(model.removed)),
        shard=model.shard,
    )


def _write_data(sink: DataSink, model: ModelSource, draft: Descriptor, payloads: list[bytes]) -> Descriptor:
    """Segments, then tensors in the order of the draft; returns the descriptor with what is known now."""
    for segment, payload in zip(draft.segments, payloads, strict=True):
        if payload:
            sink.pad_to(segment.offset)
            sink.write(payload)
    source_of = {tensor.name: tensor for tensor in model.tensors}
    written = [_write_tensor(sink, entry, source_of[entry.name], model.hash) for entry in draft.tensors]
    written.sort(key=lambda entry: entry.offset)
    identity = model.weights_root or weights_root(model.hash, [*written, *model.inherited])
    if model.promised_root not in ("", identity):
        raise IntegrityError(model.model_id, "its weights are not those that were promised")
    return replace(draft, tensors=tuple(written), weights_root=identity)


def _write_tensor(sink: DataSink, entry: TensorEntry, source: TensorSource, hash_name: str) -> TensorEntry:
    if source.encode is None:
        if entry.length:
            sink.pad_to(entry.offset)
        root = _write_raw(sink, source, hash_name)
    else:
        offset = round_up(sink.length, ALIGNMENT)
        for part in source.encode():
            sink.pad_to(max(offset, sink.length))
            sink.write(part)
        length = max(0, sink.length - offset)
        entry = replace(entry, offset=offset if length else 0, length=length)
        root = b"" if source.digest else span_root(source.span, hash_name)
    known = source.digest or tensor_digest(hash_name, entry.name, entry.dtype, entry.shape, root)
    return replace(entry, digest=known)


def _write_raw(sink: DataSink, source: TensorSource, hash_name: str) -> bytes:
    """Write and hash in one pass; returns the root over the pieces."""
    shared = sink.at_chunk_start()
    leaves = bytearray()
    for batch in pieces(source.span, BATCH_BYTES):
        if source.digest and not shared:
            sink.write(batch)
            continue
        new = leaf_hashes(hash_name, batch, PIECE_BYTES)
        sink.write(batch, new if shared else None)
        leaves += new
    return tree_root(hash_name, leaves)


def span_root(span: Span, hash_name: str) -> bytes:
    """Root over the pieces of decoded bytes."""
    return tree_root(
        hash_name, b"".join(leaf_hashes(hash_name, batch, PIECE_BYTES) for batch in pieces(span, BATCH_BYTES))
    )
