"""Open a packaged model file: check its whole outline, then read any one tensor without the rest.

    with ModelFile.open(path, keys) as file:  file.models[0].stored(entry) ...

Everything that R-8.2.2-1 forbids is refused here, before anything is allocated by a number from the file. Files are
mapped; verification of whole files reads instead (`sink.file_leaves`), so that a file cut short under our hands is an
error and not a crash.
"""

import mmap
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from moestro.core.errors import FormatError, IntegrityError
from moestro.package.codecs.compressor import decompress
from moestro.package.descriptor import Descriptor, SegmentEntry, TensorEntry
from moestro.package.encrypt import Keys, Opened, check_envelope
from moestro.package.hashing import digest, root_of
from moestro.package.layout import (
    DIGEST_BYTES,
    ENCRYPTED,
    FILE_HEADER,
    MODEL_HEADER,
    FileHeader,
    ModelHeader,
    data_start,
    model_start,
    parse_file_header,
    parse_model_header,
    round_up,
)
from moestro.package.limits import ALIGNMENT, MAX_DESCRIPTOR_BYTES, PIECE_BYTES
from moestro.package.paths import open_below, open_folder
from moestro.package.spans import Mapped, Part, Span


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One model of a file."""

    descriptor: Descriptor
    header: ModelHeader
    start: int
    """Where its data begins in the file."""
    data: Span
    """What offsets of tensors count in: stored data, or decrypted data after the private descriptor."""
    is_open: bool
    """False for an encrypted model without a fitting key: then only the public part of the descriptor is known."""
    opened: Opened | None = None
    """An encrypted model's data before and after decryption, where a key fits."""

    def stored(self, entry: TensorEntry | SegmentEntry) -> Span:
        """The stored bytes of a tensor or segment."""
        return Part(self.data, entry.offset, entry.length)

    def segment(self, entry: SegmentEntry, base: bytes | None = None) -> bytes:
        """The verified content of a segment; `base` is that of the base's segment of the same name."""
        where = f"segment {entry.name}"
        stored = self.stored(entry).read(0, entry.length)
        match entry.codec:
            case "raw":
                content = bytes(stored)
            case "zstd":
                content = decompress(stored, entry.size, where)
            case _ if base is None:
                raise FormatError(f"{where} is that of the base; give the base package")
            case _:
                content = base
        if len(content) != entry.size or root_of(self.descriptor.hash, content, PIECE_BYTES).hex() != entry.digest:
            raise IntegrityError(where, "its bytes are not those of its digest")
        return content


class ModelFile:
    """An open, mapped, checked file."""

    def __init__(self, handle: int, name: str, keys: Keys | None = None) -> None:
        """Takes over the handle; `name` is for messages."""
        self.handle, self.name, self.keys = handle, name, keys or Keys()
        self._map: mmap.mmap | None = None
        try:
            self.size = os.fstat(handle).st_size
            if self.size < FILE_HEADER.size:
                raise FormatError(f"the file has {self.size} bytes; a header has {FILE_HEADER.size}", 0, name)
            self._map = mmap.mmap(handle, self.size, access=mmap.ACCESS_READ)
            self.view = memoryview(self._map)
            self.header: FileHeader = parse_file_header(bytes(self.view[: FILE_HEADER.size]))
            self.models = self._models()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path, keys: Keys | None = None) -> "ModelFile":
        """Open by path; a link or anything that is no regular file is refused."""
        folder = open_folder(path.parent)
        try:
            return cls(open_below(folder, path.name), path.name, keys)
        finally:
            os.close(folder)

    def _models(self) -> list[StoredModel]:
        found: list[StoredModel] = []
        end, flags = FILE_HEADER.size, 0
        for index in range(self.header.model_count):
            offset = model_start(end)
            self._check_zero(end, min(offset, self.size))
            model = self._model(index, offset)
            found.append(model)
            end = model.start + model.header.data_bytes
            flags |= model.header.flags
        if end != self.size:
            raise FormatError(f"the last model ends at {end} of {self.size} bytes", end, self.name)
        if flags != self.header.any_flags:
            raise FormatError(f"the file's flags {self.header.any_flags:#x} are not those of its models {flags:#x}", 12)
        return found

    def _model(self, index: int, offset: int) -> StoredModel:
        header = parse_model_header(bytes(self.view[offset : offset + MODEL_HEADER.size]), index, offset, self.size)
        at = offset + MODEL_HEADER.size
        text_end = at + header.descriptor_bytes
        start = data_start(offset, header.descriptor_bytes, self.header.align_log2)
        if start + header.data_bytes > self.size:
            raise FormatError(f"model {index} ends at {start + header.data_bytes} of {self.size} bytes", at, self.name)
        text = bytes(self.view[at:text_end])
        heads = (bytes(self.view[: FILE_HEADER.size]), bytes(self.view[offset:at]))
        if digest("sha256", *heads, text) != bytes(self.view[text_end : text_end + DIGEST_BYTES]):
            raise IntegrityError(self.name, f"the descriptor of model {index} does not have its digest")
        self._check_zero(text_end + DIGEST_BYTES, start)
        descriptor = Descriptor.parse(text, header.flags, header.data_bytes, f"descriptor {index} of {self.name}")
        assert self._map is not None
        stored = Mapped(self._map, start, header.data_bytes)
        if not header.flags & ENCRYPTED:
            return StoredModel(descriptor, header, start, stored, is_open=True)
        envelope = check_envelope(descriptor.encryption, header.data_bytes)
        descriptor = replace(descriptor, encryption=envelope)
        if not self.keys:
            return StoredModel(descriptor, header, start, stored, is_open=False)
        return _decrypted(descriptor, header, start, Opened.of(stored, envelope, descriptor.model_id, self.keys))

    def _check_zero(self, start: int, end: int) -> None:
        padding = bytes(self.view[start:end])
        if padding.count(0) != len(padding):
            raise FormatError("padding is not zero", start, self.name)

    def check_gaps(self) -> None:
        """Bytes between the ranges of a model must be zero; reads no tensor."""
        for model in self.models:
            entries: list[TensorEntry | SegmentEntry] = []
            if model.is_open:
                entries = [*model.descriptor.segments, *model.descriptor.tensors]
            end = 0
            for entry in sorted(entries, key=lambda entry: entry.offset):
                gap = bytes(model.data.read(end, max(0, entry.offset - end)))
                if gap.count(0) != len(gap):
                    raise FormatError(f"bytes before {entry.name!r} are not zero", model.start + end, self.name)
                end = max(end, entry.offset + entry.length)

    def forget(self) -> None:
        """Give mapped pages back; who reads them again gets them from the page cache, or from the disk."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Give the handle back; spans that are still used keep the mapping alive."""
        self.models = []
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def __enter__(self) -> "ModelFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _decrypted(descriptor: Descriptor, header: ModelHeader, start: int, plain: Opened) -> StoredModel:
    """Read the private descriptor at the front of the plaintext."""
    where = f"private descriptor of {descriptor.model_id}"
    length = int.from_bytes(plain.read(0, min(8, plain.length)), "little")
    head_bytes = round_up(8 + length, ALIGNMENT)
    if length > MAX_DESCRIPTOR_BYTES or head_bytes > plain.length:
        raise FormatError(f"{length} bytes do not fit into {plain.length}", where=where)
    padding = bytes(plain.read(8 + length, head_bytes - 8 - length))
    if padding.count(0) != len(padding):
        raise FormatError("padding is not zero", where=where)
    text = bytes(plain.read(8, length))
    opened = descriptor.open_private(text, header.flags, plain.length - head_bytes)
    data = Part(plain, head_bytes, plain.length - head_bytes)
    return StoredModel(opened, header, start, data, is_open=True, opened=plain)
