"""What a packaged model file says about one model: tensors, segments, base, encryption (specification 8.2.2).

    Descriptor.parse(bytes) -> checked Descriptor        descriptor.public() / .private() -> canonical JSON tables

In an encrypted model everything that tells of the weights stands in the private part, inside the ciphertext.
A tensor's digest is H(0x00 | {"dtype","name","shape"} | 0x0A | root over its decoded pieces of 1 MiB); it names the
weights, not their packaging. `weights_root`, the tree over digests in order of names, is the identity of a model.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moestro.core.errors import FormatError, LimitExceeded
from moestro.package import canonical
from moestro.package.dtypes import DataType, checked_shape, data_type, num_bytes
from moestro.package.fields import HEX32, Fields
from moestro.package.hashing import check_hash, digest, tree_root
from moestro.package.layout import COMPACT, ENCRYPTED, RESIDUAL
from moestro.package.limits import (
    ALIGNMENT,
    CHUNK_BYTES,
    MAX_CHAIN,
    MAX_CHUNK_BYTES,
    MAX_DESCRIPTOR_BYTES,
    MAX_FILE_BYTES,
    MAX_NAME_BYTES,
    MAX_SEGMENT_BYTES,
    MAX_SEGMENTS,
    MAX_TENSORS,
    MIN_CHUNK_BYTES,
)
from moestro.package.paths import check_model_id, check_path

Table = dict[str, Any]
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
LOSSLESS = ("raw", "zstd", "bp-zstd")
"""Codecs that need no base."""
ON_BASE = ("copy", "xor-bp-zstd", "odiff-bp-zstd", "odiff-ctx", "sparse", "lowrank", "qres")
"""Codecs of residuals."""
SEGMENT_CODECS = ("raw", "zstd", "copy")
CP_KEYS = {"lowrank": {"rank", "factor_dtype", "exact"}, "qres": {"bits", "group"}, "copy": {"from"}}
"""Which parameters a codec takes."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: what it is, and where and how it is stored."""

    name: str
    dtype: DataType
    shape: tuple[int, ...]
    codec: str = "raw"
    offset: int = 0
    """From the start of the model's data."""
    length: int = 0
    """Stored bytes."""
    digest: str = ""
    cp: Mapping[str, int | str] = field(default_factory=dict)
    """Parameters of the codec."""

    @property
    def num_bytes(self) -> int:
        """Decoded bytes."""
        return num_bytes(self.dtype, self.shape)

    def table(self) -> Table:
        """As in the descriptor."""
        table: Table = {"name": self.name, "dtype": self.dtype.name, "shape": list(self.shape), "codec": self.codec}
        table |= {"offset": self.offset, "length": self.length, "digest": self.digest}
        return table | ({"cp": dict(self.cp)} if self.cp else {})


@dataclass(frozen=True, slots=True)
class SegmentEntry:
    """A payload that is no tensor: `config`, `tokenizer`, `source`, `file/...`; `graph` has its place here."""

    name: str
    offset: int = 0
    length: int = 0
    size: int = 0
    """Decoded bytes."""
    codec: str = "raw"
    digest: str = ""
    """Root over decoded pieces of 1 MiB."""

    def table(self) -> Table:
        """As in the descriptor."""
        table: Table = {"name": self.name, "offset": self.offset, "length": self.length, "size": self.size}
        return table | {"codec": self.codec, "digest": self.digest}


@dataclass(frozen=True, slots=True)
class Base:
    """What a residual must be added to (R-8.2.6-4)."""

    weights_root: str
    model_id: str
    chain: int = 1
    """How many residuals lie between the last full package and this result, this one included."""

    def table(self) -> Table:
        """As in the descriptor."""
        return {"weights_root": self.weights_root, "model_id": self.model_id, "chain": self.chain}


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a model that is split over files this one is."""

    index: int
    count: int
    set: str

    def table(self) -> Table:
        """As in the descriptor."""
        return {"index": self.index, "count": self.count, "set": self.set}


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Everything about one model in one file."""

    model_id: str
    hash: str = "sha256"
    chunk_size: int = CHUNK_BYTES
    data_root: str = ""
    weights_root: str = ""
    """Root over the tensors that the file gives once decoded; empty while an encrypted model is closed."""
    segments: tuple[SegmentEntry, ...] = ()
    tensors: tuple[TensorEntry, ...] = ()
    base: Base | None = None
    removed: tuple[str, ...] = ()
    """Tensors of the base that the result lacks; a base tensor named nowhere here is taken over as it is."""
    shard: Shard | None = None
    encryption: Table | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys that begin with x_; kept, never read."""

    @property
    def flags(self) -> int:
        """COMPACT, RESIDUAL and ENCRYPTED as the model header must have them."""
        compact = any(tensor.codec != "raw" for tensor in self.tensors)
        return compact * COMPACT | (self.base is not None) * RESIDUAL | (self.encryption is not None) * ENCRYPTED

    def private(self) -> Table:
        """What encryption hides."""
        table: Table = {
            "segments": [segment.table() for segment in self.segments],
            "tensors": [tensor.table() for tensor in self.tensors],
            "weights_root": self.weights_root,
        }
        if self.base is not None:
            table |= {"base": self.base.table(), "removed": list(self.removed)}
        return table

    def public(self) -> Table:
        """What stands in the file in clear."""
        table: Table = {"model_id": self.model_id, "hash": self.hash, "chunk_size": self.chunk_size}
        table |= {"data_root": self.data_root} | dict(self.extra)
        if self.shard is not None:
            table["shard"] = self.shard.table()
        return table | (self.private() if self.encryption is None else {"encryption": self.encryption})

    @classmethod
    def parse(cls, data: bytes, flags: int, data_bytes: int, where: str) -> "Descriptor":
        """Check every rule that needs only the descriptor.

        flags        of the model header, which must agree
        data_bytes   of stored data, which the ranges must cover without holes (R-8.2.2-5)
        """
        fields = Fields(canonical.loads(data, MAX_DESCRIPTOR_BYTES, where), where)
        found = cls(
            model_id=check_model_id(fields.text("model_id")),
            hash=check_hash(fields.any("hash")),
            chunk_size=_chunk_size(fields),
            data_root=fields.hex32("data_root"),
            shard=_shard(fields) if fields.has("shard") else None,
            encryption=fields.any("encryption") if fields.has("encryption") else None,
        )
        if bool(flags & ENCRYPTED) != (found.encryption is not None):
            raise FormatError(f"{where}: the flag ENCRYPTED and the descriptor disagree")
        if found.encryption is None:
            found = found._with_private(fields, data_bytes)
            if found.flags != flags:
                raise FormatError(f"{where}: model_flags are {flags:#x}, the descriptor says {found.flags:#x}")
        return replace(found, extra=fields.finish())

    def open_private(self, data: bytes, flags: int, data_bytes: int) -> "Descriptor":
        """The whole descriptor of an encrypted model from its decrypted private part."""
        where = f"private descriptor of {self.model_id}"
        fields = Fields(canonical.loads(data, MAX_DESCRIPTOR_BYTES, where), where)
        found = self._with_private(fields, data_bytes)
        fields.finish()
        if found.flags != flags:
            raise FormatError(f"{where}: model_flags are {flags:#x}, the descriptor says {found.flags:#x}")
        return found

    def _with_private(self, fields: Fields, data_bytes: int) -> "Descriptor":
        has_base = fields.has("base")
        found = replace(
            self,
            weights_root=fields.hex32("weights_root"),
            segments=tuple(map(_segment, fields.items("segments", MAX_SEGMENTS))),
            tensors=tuple(map(_tensor, fields.items("tensors", MAX_TENSORS))),
            base=_base(fields) if has_base else None,
            removed=tuple(map(_name, fields.items("removed", MAX_TENSORS))) if has_base else (),
        )
        found._check_names()
        _check_ranges([*found.segments, *found.tensors], data_bytes, self.chunk_size)
        return found

    def _check_names(self) -> None:
        _unique([tensor.name for tensor in self.tensors] + list(self.removed), "tensor")
        _unique([segment.name for segment in self.segments], "segment")
        offsets = [tensor.offset for tensor in self.tensors]
        if offsets != sorted(offsets):
            raise FormatError(f"the tensors of {self.model_id} are not in order of their offsets")
        if self.base is None:
            codecs = {tensor.codec for tensor in self.tensors} | {segment.codec for segment in self.segments}
            if codecs - set(LOSSLESS):
                raise FormatError(
                    f"codecs {sorted(codecs - set(LOSSLESS))} need a base, but {self.model_id} names none"
                )
            if weights_root(self.hash, self.tensors) != self.weights_root:
                raise FormatError(f"weights_root of {self.model_id} is not the root over its tensors")


def tensor_digest(hash_name: str, name: str, dtype: DataType, shape: Sequence[int], root: bytes) -> str:
    """The digest of a tensor from the root over its decoded pieces."""
    identity = canonical.dumps({"dtype": dtype.name, "name": name, "shape": list(shape)})
    return digest(hash_name, b"\0", identity, b"\n", root).hex()


def weights_root(hash_name: str, tensors: Iterable[TensorEntry]) -> str:
    """The identity of a model: the tree over its tensors' digests in order of names (UTF-8)."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name.encode())
    return tree_root(hash_name, b"".join(bytes.fromhex(tensor.digest) for tensor in ordered)).hex()


def _tensor(item: Any) -> TensorEntry:
    try:
        name, codec, digest_hex, cp = item["name"], item["codec"], item["digest"], item.get("cp", {})
        offset, length = item["offset"], item["length"]
        dtype, shape = data_type(item["dtype"]), checked_shape(item["shape"])
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"a tensor entry is not an object with all of its keys ({error})") from error
    if len(item) != 7 + ("cp" in item):
        raise FormatError(f"tensor {str(name)[:40]!r} has an unknown key")
    if type(digest_hex) is not str or not HEX32.fullmatch(digest_hex):
        raise FormatError(f"tensor {str(name)[:40]!r}: digest is not 64 lower-case hexadecimal digits")
    _check_span(name, offset, length)
    entry = TensorEntry(
        _name(name), dtype, shape, codec, offset, length, digest_hex, _codec_parameters(name, codec, cp)
    )
    _check_stored(entry)
    return entry


def _check_stored(entry: TensorEntry) -> None:
    decoded = entry.num_bytes
    if entry.codec == "raw" and entry.length != decoded:
        raise FormatError(f"tensor {entry.name!r} is raw with {entry.length} bytes; its shape has {decoded}")
    if entry.codec == "copy" and entry.length:
        raise FormatError(f"tensor {entry.name!r} is a copy with {entry.length} stored bytes; it must have none")


def _codec_parameters(name: str, codec: Any, cp: Any) -> dict[str, int | str]:
    if type(codec) is not str or codec not in LOSSLESS + ON_BASE:
        raise FormatError(
            f"tensor {str(name)[:40]!r} has the codec {str(codec)[:20]!r}; known are {LOSSLESS + ON_BASE}"
        )
    if cp == {} and type(cp) is dict:
        return cp
    if type(cp) is not dict or any(type(value) not in (int, str) for value in cp.values()):
        raise FormatError(f"tensor {str(name)[:40]!r}: cp must hold whole numbers and texts")
    unknown = cp.keys() - CP_KEYS.get(codec, set())
    if unknown:
        raise FormatError(f"tensor {str(name)[:40]!r}: codec {codec} has no parameter {min(unknown)[:20]!r}")
    return cp


def _name(name: Any) -> str:
    if type(name) is not str or not 1 <= len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES:
        raise FormatError(f"a tensor's name is {str(name)[:40]!r}; it must be text of 1 to {MAX_NAME_BYTES} bytes")
    if CONTROL.search(name):
        raise FormatError(f"a tensor's name holds a control character: {name[:40]!r}")
    return name


def _segment(item: Any) -> SegmentEntry:
    fields = Fields(item, "a segment")
    entry = SegmentEntry(
        name=check_path(fields.any("name")),
        offset=fields.any("offset"),
        length=fields.any("length"),
        size=fields.whole("size", 0, MAX_SEGMENT_BYTES),
        codec=fields.text("codec"),
        digest=fields.hex32("digest"),
    )
    fields.finish()
    _check_span(entry.name, entry.offset, entry.length)
    if entry.codec not in SEGMENT_CODECS:
        raise FormatError(f"segment {entry.name} has the codec {entry.codec[:20]!r}; known are {SEGMENT_CODECS}")
    if (entry.codec == "raw" and entry.length != entry.size) or (entry.codec == "copy" and entry.length):
        raise FormatError(f"segment {entry.name} has {entry.length} stored bytes for {entry.size} as {entry.codec}")
    return entry


def _base(fields: Fields) -> Base:
    inner = Fields(fields.any("base"), "base")
    if type(inner.any("chain")) is int and inner.any("chain") > MAX_CHAIN:
        raise LimitExceeded(f"the chain of residuals has {inner.any('chain')} links; at most {MAX_CHAIN} are allowed")
    found = Base(
        inner.hex32("weights_root"), check_model_id(inner.text("model_id")), inner.whole("chain", 1, MAX_CHAIN)
    )
    inner.finish()
    return found


def _shard(fields: Fields) -> Shard:
    inner = Fields(fields.any("shard"), "shard")
    count = inner.whole("count", 1, 99_999)
    found = Shard(inner.whole("index", 1, count), count, inner.hex32("set"))
    inner.finish()
    return found


def _chunk_size(fields: Fields) -> int:
    size = fields.whole("chunk_size", MIN_CHUNK_BYTES, MAX_CHUNK_BYTES)
    if size & (size - 1):
        raise FormatError(f"chunk_size is {size}; it must be a power of two")
    return size


def _unique(names: list[str], what: str) -> None:
    if len(set(names)) != len(names):
        once = sorted(names)
        twice = next(a for a, b in itertools.pairwise(once) if a == b)
        raise FormatError(f"{what} {twice[:40]!r} is listed twice")


def _check_span(name: object, offset: Any, length: Any) -> None:
    if type(offset) is not int or type(length) is not int or not 0 <= offset <= MAX_FILE_BYTES >= length >= 0:
        raise FormatError(f"{str(name)[:40]!r}: offset and length must be whole numbers in 0..2^53")


def _check_ranges(entries: Sequence[TensorEntry | SegmentEntry], data_bytes: int, chunk_size: int) -> None:
    """R-8.2.2-5: in order, without overlap; gaps only up to the next multiple of 64, or of a chunk."""
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.length)):
        gap = entry.offset - end
        if entry.offset % ALIGNMENT or gap < 0:
            raise FormatError(f"the range of {entry.name!r} overlaps another or is not at a multiple of {ALIGNMENT}")
        if gap >= (chunk_size if entry.offset % chunk_size == 0 else ALIGNMENT):
            raise FormatError(f"{gap} unused bytes lie before {entry.name!r}")
        end = entry.offset + entry.length
    if end != data_bytes:
        raise FormatError(f"the ranges end at {end}, the data at {data_bytes}")
