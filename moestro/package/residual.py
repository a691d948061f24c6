"""Updates: a package that says only what changed between two models, and the way back (specification 8.2.6).

    diff([base], target, out) -> Report        apply([base], update, out) -> Manifest

A base may be a full package followed by updates on it. An update names its base by `weights_root` and is refused
anywhere else. Tensors that did not change are not mentioned; of a stack of experts, those that did not change cost
eight bytes a block. What `apply` makes of an exact update is the target package again, to the byte, so that the
signature of the target, which the update carries, holds for it.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from moestro.core.errors import ConfigError, FormatError, LimitExceeded, SignatureError
from moestro.package import canonical
from moestro.package.build import Content, build
from moestro.package.codecs.choose import Coding, best
from moestro.package.codecs.lossy import Loss, Lossy, allowed_bits, quantisable
from moestro.package.codecs.numbers import to_float32
from moestro.package.codecs.registry import decoded
from moestro.package.describe import check_management, check_technical
from moestro.package.descriptor import Base, TensorEntry, tensor_digest
from moestro.package.encrypt import Keys, Recipient, Sealer
from moestro.package.folder import Package, open_stack
from moestro.package.limits import ALIGNMENT, ANCHOR_EVERY, MAX_CHAIN
from moestro.package.manifest import RESULT_SIGNATURE, Manifest, ModelEntry, Update
from moestro.package.reseal import release_of
from moestro.package.sign import MAX_ENVELOPE_BYTES, Trust, signed_payload
from moestro.package.spans import Bytes, Progress, Span, Watched, ignore
from moestro.package.weights import Weights
from moestro.package.writer import ModelSource, SegmentSource, TensorSource, span_root

RATE_TRIES = 4
HEAD_BYTES = 6 << 10
"""Of an update: headers, padding, manifest and descriptions, about."""
RATE_MARGIN = 0.002
"""Bits a weight that the next try saves beyond what the last one took too much."""
SAMPLED_ROWS = 128
"""Of each tensor, to find the step of a quantised update."""


@dataclass(slots=True)
class Report:
    """What an update is made of."""

    manifest: Manifest | None = None
    tensors: Counter[str] = field(default_factory=Counter)
    """How many tensors each codec stores; `unchanged` counts those that cost nothing."""
    stored: Counter[str] = field(default_factory=Counter)
    """Stored bytes by codec."""
    full_bytes: int = 0
    """Bytes of the target package."""
    loss: Loss = field(default_factory=Loss)
    """What quantising took away."""
    chain: int = 1
    weights: int = 0
    """Elements of the tensors that changed."""
    carried: int = 0
    """Bytes of configuration, tokenizer and programs, which no rate can change."""
    wanted_bits: float | None = None

    @property
    def bits_a_weight(self) -> float:
        """What the update takes for each weight of the tensors that changed, descriptions included."""
        return 8 * (self.update_bytes - self.carried) / self.weights if self.weights else 0.0

    @property
    def update_bytes(self) -> int:
        """Bytes of the update package."""
        return 0 if self.manifest is None else self.manifest.size

    def lines(self) -> list[str]:
        """For people."""
        rows = [f"{name:14} {count:6} tensors {self.stored[name]:14,} bytes" for name, count in self.tensors.items()]
        share = self.update_bytes / max(1, self.full_bytes)
        rows.append(f"update: {self.update_bytes:,} bytes, {share:.2%} of {self.full_bytes:,}")
        if self.loss.energy:
            rows.append(f"loss: {self.loss.relative:.4f} of the change's energy is not carried (quantised)")
        if self.wanted_bits is not None and self.bits_a_weight > self.wanted_bits:
            rows.append(
                f"the model is too small for {self.wanted_bits} bits a weight: it takes {self.bits_a_weight:.2f}"
            )
        if self.chain > ANCHOR_EVERY:
            rows.append(
                f"this is update {self.chain} since the last full package; publish a full one every {ANCHOR_EVERY}"
            )
        return rows


def diff(
    base: Sequence[Path],
    target: Path,
    out: Path,
    *,
    bits: float | None = None,
    to: Sequence[Recipient] = (),
    keys: Keys | None = None,
    progress: Progress = ignore,
) -> Report:
    """Write the update that leads from a base to a target.

    base   a full package, then updates on it in order
    bits   quantise changes so that the update takes so many bits a weight, 1 or 1.5 to 7; None keeps every bit
    to     encrypt the update for these
    raises FormatError where the two share no model, LimitExceeded for a chain above 64
    """
    wanted = None if bits is None else allowed_bits(bits)
    with open_stack(base, keys=keys) as old, Package.open(target, keys=keys) as new:
        less, tried = 0.0, None
        for tries_left in reversed(range(RATE_TRIES)):
            maker = _Maker(old, new, bits, less, progress)
            contents = [maker.content(model) for model in new.manifest.models]
            if not any(content.update for content in contents):
                raise FormatError(f"{base[-1]} and {target} share no model; ship the full package")
            report = maker.written(out, contents, to)
            excess = 0.0 if wanted is None else report.bits_a_weight - wanted
            if excess <= 0 or not tries_left or maker.lossy == tried:
                break
            shutil.rmtree(out)
            tried = maker.lossy
            less += excess + RATE_MARGIN
        report.wanted_bits = wanted
        return report


class _Maker:
    """Codes the models of one update."""

    def __init__(self, old: Package, new: Package, bits: float | None, less: float, progress: Progress) -> None:
        """`less` bits a weight than reckoned go to quantised tensors, because a first try took too much."""
        self.old, self.new, self.bits, self.less, self.progress = old, new, bits, less, progress
        self.lossy: Lossy | None = None
        self.report = Report()

    def written(self, out: Path, contents: list[Content], to: Sequence[Recipient]) -> Report:
        """Build the package; much is coded only now."""
        seal = partial(Sealer, list(to)) if to else None
        signature = self.new.envelope() if self.bits is None else None
        extra = {} if signature is None else {RESULT_SIGNATURE: signature}
        self.report.manifest = build(out, contents, release_of(self.new.manifest), self.new, seal, extra=extra)
        self.report.full_bytes = self.new.manifest.size
        programs = (entry.size for entry in self.report.manifest.files if entry.path.startswith("Program/"))
        self.report.carried += sum(programs)
        return self.report

    def _below(self, model: ModelEntry) -> Weights | None:
        """The weights of the base's model of the same id, or of the only one there is."""
        theirs = self.old.manifest.models
        alone = len(theirs) == len(self.new.manifest.models) == 1
        found = [entry for entry in theirs if alone or entry.model_id == model.model_id]
        return self.old.weights(found[0].model_id) if found else None

    def content(self, model: ModelEntry) -> Content:
        here = f"Meta-info/{model.model_id}"
        management = check_management(self.new.content(f"{here}/managementinfo.json"), model.model_id)
        technical = check_technical(self.new.content(f"{here}/technicalinfo.json"), model.model_id)
        below, weights = self._below(model), self.new.weights(model.model_id)
        if below is None:
            return Content([self._full(model, weights)], management, technical)
        if below.hash != weights.hash:
            raise ConfigError(
                f"base and target are packed with {below.hash} and {weights.hash}; pack both with one hash"
            )
        chain = self.report.chain = below.chain + 1
        if chain > MAX_CHAIN:
            raise LimitExceeded(
                f"this would be update {chain} in a row; at most {MAX_CHAIN} are allowed: ship it whole"
            )
        self.report.weights += sum(prod(entry.shape) for entry in _changed(below, weights))
        if self.bits is not None:
            self.lossy = Lossy.for_rate(self.bits, self._rate(self.bits, below, weights), _changes(below, weights))
        source = self._update(model, below, weights, chain)
        quantised = bool(self.report.tensors["left as it was"]) or any(
            tensor.codec == "qres" for tensor in source.tensors
        )
        if quantised:
            technical = technical | {"quantization": self.report.loss.table()}
        update = Update(below.root, chain, "qres" if quantised else "exact")
        return Content([source], management, technical | {"compact": 2}, update)

    def _rate(self, bits: float, below: Weights, weights: Weights) -> float:
        """Bits a weight for what is quantised, so that all of the update keeps to what is allowed."""
        changed = list(_changed(below, weights))
        coarse = sum(prod(entry.shape) for entry in changed if quantisable(entry))
        rest = HEAD_BYTES + sum(_described(entry) + (0 if quantisable(entry) else entry.num_bytes) for entry in changed)
        budget = (allowed_bits(bits) - self.less) * sum(prod(entry.shape) for entry in changed)
        return (budget - 8 * rest) / max(1, coarse)

    def _full(self, model: ModelEntry, weights: Weights) -> ModelSource:
        tensors = [self._tensor(weights.entries[name], None, weights.span(name)) for name in _ordered(weights)]
        segments = [SegmentSource(name, data) for name, data in self.new.segments(model.model_id).items()]
        return ModelSource(model.model_id, tensors, segments, hash=weights.hash)

    def _update(self, model: ModelEntry, below: Weights, weights: Weights, chain: int) -> ModelSource:
        tensors, inherited = [], []
        gone = {name: entry for name, entry in below.entries.items() if name not in weights.entries}
        for name in _ordered(weights):
            entry, former = weights.entries[name], below.entries.get(name)
            if former is not None and former.digest == entry.digest:
                inherited.append(former)
                self.report.tensors["unchanged"] += 1
                continue
            renamed = _renamed(entry, gone, below) if former is None else None
            alike = former is not None and (former.dtype, former.shape) == (entry.dtype, entry.shape)
            if former is not None and self._left(entry, below.span(name), weights.span(name)):
                self.report.tensors["left as it was"] += 1
                inherited.append(former)
                continue
            if renamed is not None:
                tensors.append(self._stored(entry, Coding("copy", tuple, {"from": renamed}), weights.span(name)))
            else:
                tensors.append(self._tensor(entry, below.span(name) if alike else None, weights.span(name)))
        return ModelSource(
            model.model_id,
            tensors,
            self._segments(model),
            base=Base(below.root, model.model_id, chain),
            removed=sorted(gone),
            inherited=inherited,
            hash=weights.hash,
        )

    def _left(self, entry: TensorEntry, base: Span, target: Span) -> bool:
        return self.lossy is not None and self.lossy.leave(entry, base, target, self.report.loss)

    def _segments(self, model: ModelEntry) -> list[SegmentSource]:
        """Files that are those of the base are taken over."""
        theirs = self.old.segments(self.old.model_below(model).model_id)
        entries = {s.name: s for part in self.new.stored(model.model_id) for s in part.descriptor.segments}
        found = [
            SegmentSource(name, data, entries[name] if theirs.get(name) == data else None)
            for name, data in self.new.segments(model.model_id).items()
        ]
        self.report.carried += sum(entries[new.name].length for new in found if new.copied is None)
        return found

    def _tensor(self, entry: TensorEntry, base: Span | None, target: Span) -> TensorSource:
        plain = replace(entry, codec="raw", cp={})
        target = Watched(target, self.progress)
        if self.lossy is not None and base is not None:
            quantised = self.lossy.coding(plain, base, target, self.report.loss)
            if quantised is not None:
                return self._quantised(plain, base, quantised)
        return self._stored(entry, best(plain, base, target), target)

    def _stored(self, entry: TensorEntry, coding: Coding, target: Span) -> TensorSource:
        def counted() -> Iterator[bytes | bytearray | memoryview]:
            for part in coding.encode():
                self.report.stored[coding.codec] += len(part)
                yield part

        self.report.tensors[coding.codec] += 1
        return TensorSource(
            entry.name, entry.dtype, entry.shape, target, coding.codec, counted, coding.cp, entry.digest
        )

    def _quantised(self, entry: TensorEntry, base: Span, coding: Coding) -> TensorSource:
        """What decodes is B', so digest and identity are those of B'."""
        stored = b"".join(coding.encode())
        coded = replace(entry, codec=coding.codec, cp=coding.cp, length=len(stored))
        result = decoded(coded, Bytes(stored), base)
        source = self._stored(coded, replace(coding, encode=lambda: [stored]), result)
        return replace(source, digest="")


def _ordered(weights: Weights) -> list[str]:
    return sorted(weights.entries, key=str.encode)


def _changed(below: Weights, weights: Weights) -> Iterator[TensorEntry]:
    """Tensors of the target that are not those of the base."""
    for name in _ordered(weights):
        former = below.entries.get(name)
        if former is None or former.digest != weights.entries[name].digest:
            yield weights.entries[name]


def _described(entry: TensorEntry) -> int:
    """Bytes of a tensor's entry in the descriptor and of the padding behind it, about."""
    return len(canonical.dumps(entry.table())) + ALIGNMENT // 2


def _changes(below: Weights, weights: Weights) -> Iterator[tuple[TensorEntry, np.ndarray]]:
    """Every tensor that may be quantised, and some rows of its differences."""
    for entry in filter(quantisable, _changed(below, weights)):
        name, former = entry.name, below.entries.get(entry.name)
        if former is not None and (former.dtype, former.shape) == (entry.dtype, entry.shape):
            row = entry.shape[-1] * entry.dtype.item_bytes
            step = max(entry.num_bytes // row // SAMPLED_ROWS, 1) * row
            old, new = (
                to_float32(memoryview(b"".join(span.read(at, row) for at in range(0, span.length, step))), entry.dtype)
                for span in (below.span(name), weights.span(name))
            )
            change = (new - old).reshape(-1, entry.shape[-1])
            if np.isfinite(change).all():
                yield entry, change


def _renamed(entry: TensorEntry, gone: dict[str, TensorEntry], below: Weights) -> str | None:
    """The tensor of the base that is this one under a name that is no longer there."""
    for name, theirs in gone.items():
        if (theirs.dtype, theirs.shape) == (entry.dtype, entry.shape):
            root = span_root(below.span(name), below.hash)
            if tensor_digest(below.hash, entry.name, entry.dtype, entry.shape, root) == entry.digest:
                return name
    return None


def apply(
    base: Sequence[Path],
    update: Path,
    out: Path,
    *,
    trust: Trust | None = None,
    keys: Keys | None = None,
    to: Sequence[Recipient] = (),
    progress: Progress = ignore,
) -> Manifest:
    """Write the full package that an update leads to; base and update stay as they are.

    After a kill the next call with the same `out` goes on at the first tensor whose digest does not verify.

    base   the full package, and further updates in order, if the last one is not based on the first
    trust  whose signatures on the update count
    to     encrypt the result for these; after a kill it is gone on with where one of `keys` opens it, else begun anew
    raises BaseMismatch where the base is another one, IntegrityError where any tensor differs from its promise
    """
    with open_stack([*base, update], trust, keys) as package:
        if not any(model.update for model in package.manifest.models):
            raise FormatError(f"{update} is a full package, no update; install it as it is")
        contents = [_result(package, model, package.sparing(progress)) for model in package.manifest.models]
        listed = {entry.path for entry in package.manifest.files}
        carried = package.content(RESULT_SIGNATURE, MAX_ENVELOPE_BYTES) if RESULT_SIGNATURE in listed else None

        def envelope(manifest: bytes) -> bytes | None:
            return carried if carried is not None and _fits(carried, manifest) else None

        seal = partial(Sealer, list(to)) if to else None
        return build(out, contents, release_of(package.manifest), package, seal, envelope, resume=keys or Keys())


def _fits(envelope: bytes, manifest: bytes) -> bool:
    try:
        return signed_payload(envelope) == manifest
    except (FormatError, SignatureError):
        return False


def _result(package: Package, model: ModelEntry, progress: Progress) -> Content:
    here = f"Meta-info/{model.model_id}"
    management = check_management(package.content(f"{here}/managementinfo.json"), model.model_id)
    technical = check_technical(package.content(f"{here}/technicalinfo.json"), model.model_id)
    weights = package.weights(model.model_id)
    segments = [SegmentSource(name, data) for name, data in package.segments(model.model_id).items()]
    tensors = [
        TensorSource(name, entry.dtype, entry.shape, Watched(weights.span(name), progress), promised=entry.digest)
        for name in _ordered(weights)
        for entry in [weights.entries[name]]
    ]
    source = ModelSource(model.model_id, tensors, segments, hash=weights.hash, promised_root=weights.root)
    return Content([source], management, technical | {"compact": 0})
