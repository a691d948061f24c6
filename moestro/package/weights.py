"""The tensors of a model by name: from one file or several shards, over a base where it is a residual.

    weights = Weights.of([model, ...], base=None)      weights.read("w")  verified      weights.span("w")  on demand

A residual is refused unless its base is exactly the one it was made for, and unless what comes out has the identity
that the residual promises; both are seen from digests alone, before a single tensor is decoded.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from moestro.core.errors import BaseMismatch, FormatError, IntegrityError
from moestro.package.codecs.registry import decoded
from moestro.package.descriptor import LOSSLESS, Descriptor, TensorEntry, tensor_digest, weights_root
from moestro.package.hashing import leaf_hashes, root_of, tree_root
from moestro.package.limits import PIECE_BYTES
from moestro.package.reader import StoredModel
from moestro.package.spans import OnDemand, Span, pieces
from moestro.package.writer import BATCH_BYTES, span_root

NUMPY_TYPES = {"bool": "?", "float16": "<f2", "float32": "<f4", "float64": "<f8", "complex64": "<c8"}
NUMPY_TYPES |= {f"{sign}int{bits}": f"<{sign[:1] or 'i'}{bits // 8}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


class Weights:
    """Tensors of one model."""

    def __init__(
        self, hash_name: str, entries: dict[str, TensorEntry], places: dict[str, StoredModel], root: str = ""
    ) -> None:
        self.hash, self.entries = hash_name, entries
        self.root = root or weights_root(hash_name, entries.values())
        """The identity of the model."""
        self.base: Weights | None = None
        self.chain = 0
        """Residuals since the last full package."""
        self._places = places
        """Where each tensor is stored; absent for one that is the base's."""

    @classmethod
    def of(cls, models: Sequence[StoredModel], base: "Weights | None" = None) -> "Weights":
        """Join shards, or put a residual on its base."""
        descriptors = [model.descriptor for model in models]
        if any(not model.is_open for model in models):
            raise FormatError(f"model {descriptors[0].model_id} is encrypted; give its key with --key")
        if descriptors[0].base is not None:
            return cls._on_base(models[0], base)
        _check_shards(descriptors)
        places = {tensor.name: model for model in models for tensor in model.descriptor.tensors}
        entries = {tensor.name: tensor for descriptor in descriptors for tensor in descriptor.tensors}
        if len(entries) != sum(len(descriptor.tensors) for descriptor in descriptors):
            raise FormatError(f"a tensor of {descriptors[0].model_id} lies in two shards")
        known = descriptors[0].weights_root if len(descriptors) == 1 else ""
        return cls(descriptors[0].hash, entries, places, known)

    @classmethod
    def _on_base(cls, model: StoredModel, base: "Weights | None") -> "Weights":
        descriptor = model.descriptor
        needed = descriptor.base
        assert needed is not None
        if base is None:
            raise BaseMismatch(f"{descriptor.model_id} is an update of {needed.weights_root[:16]}; give it with --base")
        if base.root != needed.weights_root or base.hash != descriptor.hash:
            raise BaseMismatch(
                f"{descriptor.model_id} is an update of {needed.weights_root[:16]}, the base here is {base.root[:16]}; "
                "take the full package"
            )
        own = {tensor.name: tensor for tensor in descriptor.tensors}
        unknown = [name for name in descriptor.removed if name not in base.entries]
        if unknown:
            raise FormatError(f"the update removes {unknown[0]!r}, which its base lacks")
        kept = {name: entry for name, entry in base.entries.items() if name not in own}
        for name in descriptor.removed:
            del kept[name]
        found = cls(descriptor.hash, kept | own, dict.fromkeys(own, model))
        found.base, found.chain = base, needed.chain
        if found.root != descriptor.weights_root:
            raise FormatError(f"{descriptor.model_id}: base and update do not make the model the update promises")
        return found

    def inherited(self, name: str) -> bool:
        """True where the tensor is taken over from the base."""
        return name not in self._places

    def span(self, name: str) -> Span:
        """Decoded bytes on demand, not verified; a decoder is there from the first read to that of the last byte.

        Of an empty tensor, of which nobody reads a byte, it is opened at once, so that what is stored is checked.
        """
        entry = self.entries[name]
        model = self._places.get(name)
        if model is None:
            assert self.base is not None
            return self.base.span(name)
        if entry.codec == "raw":
            return model.stored(entry)

        def opened() -> Span:
            return decoded(entry, model.stored(entry), self._base_span(entry))

        return OnDemand(opened, entry.num_bytes) if entry.num_bytes else opened()

    def _base_span(self, entry: TensorEntry) -> Span | None:
        source = str(entry.cp.get("from", entry.name)) if entry.codec == "copy" else entry.name
        if self.base is None or entry.codec in LOSSLESS or source not in self.base.entries:
            return None
        theirs = self.base.entries[source]
        if (theirs.dtype, theirs.shape) != (entry.dtype, entry.shape):
            raise FormatError(f"tensor {entry.name} is coded against a base tensor of another type or shape")
        return self.base.span(source)

    def check(self, name: str) -> None:
        """Decode and compare with the digest; raises IntegrityError."""
        self._compare(self.entries[name], span_root(self.span(name), self.hash))

    def _compare(self, entry: TensorEntry, root: bytes) -> None:
        if tensor_digest(self.hash, entry.name, entry.dtype, entry.shape, root) != entry.digest:
            raise IntegrityError(f"tensor {entry.name}", "its numbers are not those of its digest")

    def verified(self, name: str) -> Iterator[memoryview]:
        """Decoded bytes batch by batch; raises IntegrityError after the last one where the digest differs.

        For writing to a file that is removed then; whoever uses numbers at once takes `read`.
        """
        leaves = bytearray()
        for batch in pieces(self.span(name), BATCH_BYTES):
            leaves += leaf_hashes(self.hash, batch, PIECE_BYTES)
            yield batch
        self._compare(self.entries[name], tree_root(self.hash, leaves))

    def read(self, name: str) -> memoryview:
        """Decoded, verified bytes; nothing is copied where they are stored raw and in clear."""
        if name not in self.entries:
            raise FormatError(f"there is no tensor {name!r}; moestro inspect lists all")
        entry, span = self.entries[name], self.span(name)
        data = span.read(0, span.length)
        self._compare(entry, root_of(self.hash, data, PIECE_BYTES))
        return data

    def array(self, name: str) -> np.ndarray:
        """A verified NumPy array; types that NumPy lacks come as unsigned integers of their width."""
        entry = self.entries[name]
        kind = NUMPY_TYPES.get(entry.dtype.name, f"<u{entry.dtype.item_bytes}")
        flat = np.frombuffer(self.read(name), kind)
        return flat.reshape(entry.shape) if entry.dtype.bits >= 8 and entry.dtype.bits % 8 == 0 else flat


def _check_shards(descriptors: Sequence[Descriptor]) -> None:
    """All shards of one set, in order, none missing."""
    first = descriptors[0]
    if first.shard is None and len(descriptors) == 1:
        return
    for index, descriptor in enumerate(descriptors, 1):
        shard = descriptor.shard
        ours = (first.model_id, first.hash, first.shard.set if first.shard else "", len(descriptors))
        if (
            shard is None
            or shard.index != index
            or (descriptor.model_id, descriptor.hash, shard.set, shard.count) != ours
        ):
            raise FormatError(f"file {index} of {len(descriptors)} is not that shard of {first.model_id}")
