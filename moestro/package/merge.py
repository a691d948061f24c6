"""Several updates of one base become one model: B* = A + sum of w_i (B_i - A) (R-8.2.6-7).

    merge([base], [update, ...], out, options) -> Manifest

Tensors are mixed one after another, piece by piece, so memory does not grow with the model. An element, or a whole
tensor, that is the same in all results keeps its bits: infinities, zeros with a sign and a single update of weight 1
come out as they were.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from math import fsum, isfinite
from pathlib import Path

import numpy as np

from moestro.core.errors import ConfigError, ConversionError, FormatError
from moestro.package.build import Content, build, shards_of
from moestro.package.codecs.numbers import from_float32, to_float32
from moestro.package.describe import check_management, check_technical
from moestro.package.dtypes import DataType
from moestro.package.encrypt import Keys
from moestro.package.folder import Package, open_stack
from moestro.package.manifest import Manifest
from moestro.package.pack import Options, tensor_source
from moestro.package.sign import Trust
from moestro.package.spans import Progress, Watched, as_bytes, ignore
from moestro.package.weights import Weights
from moestro.package.writer import ModelSource, SegmentSource, TensorSource

SUM_TOLERANCE = 1e-6
Part = tuple[Weights, float]
"""What an update leads to, and its weight."""


def merge(
    base: Sequence[Path],
    updates: Sequence[Path],
    out: Path,
    options: Options,
    *,
    weights: Sequence[float] | None = None,
    trust: Trust | None = None,
    keys: Keys | None = None,
    progress: Progress = ignore,
) -> Manifest:
    """Write the full package that is the weighted mean of what the updates lead to; all inputs stay as they are.

    base     a full package, then updates on it in order; configuration, tokenizer and programs come from the last one
    updates  each on that same base
    weights  one for each update, with sum 1, also negative; None: all the same. 0 leaves an update's numbers out
    options  release, compression, encryption and shards of the result; what managementinfo.json says anew
    trust    whose signatures on the updates count
    raises BaseMismatch for an update of another base, ConversionError for tensors that cannot be mixed, IntegrityError
    where any tensor differs from its promise

    Computed in float32 (float64 for float64), one update after another, each step rounded, no step fused; then rounded
    to nearest even to the tensor's type.
    """
    shares = _checked(weights, len(updates))
    if options.leave_out:
        raise ConfigError(f"leave_out is {list(options.leave_out)}; merge keeps every file of the base: give none")
    with open_stack(base, keys=keys) as below, ExitStack() as stack:
        packages = [stack.enter_context(Package.open(folder, trust, keys, below)) for folder in updates]
        for package in packages:
            progress = package.sparing(progress)
        named = [_by_base(package, below) for package in packages]
        contents = []
        for model in below.manifest.models:
            results = [package.weights(ids[model.model_id]) for package, ids in zip(packages, named, strict=True)]
            parts = list(zip(results, shares, strict=True))
            contents.append(_content(below, model.model_id, parts, options, progress))
        return build(out, contents, options.release, options.program or below, options.seal())


def _checked(weights: Sequence[float] | None, count: int) -> list[float]:
    if not count:
        raise ConfigError("there are 0 updates to merge; give at least 1")
    shares = [1 / count] * count if weights is None else [float(weight) for weight in weights]
    if len(shares) != count or not all(map(isfinite, shares)) or abs(fsum(shares) - 1) > SUM_TOLERANCE:
        total = fsum(shares) if all(map(isfinite, shares)) else "not finite"
        raise ConfigError(
            f"weights are {shares}, their sum is {total}; there must be {count} finite numbers, one for each update, "
            f"with sum 1 within {SUM_TOLERANCE}: divide them by their sum, or leave them out for equal ones"
        )
    return shares


def _by_base(package: Package, below: Package) -> dict[str, str]:
    """Ids of an update's models by the id of the base's model each stands on; all of the base's, and no other."""
    full = [model.model_id for model in package.manifest.models if model.update is None]
    if full:
        raise FormatError(f"{full[0]} of {package.folder} is a full model, no update; merge takes updates of one base")
    found = {below.model_below(model).model_id: model.model_id for model in package.manifest.models}
    ids = {model.model_id for model in below.manifest.models}
    if found.keys() != ids or len(found) != len(package.manifest.models):
        raise ConversionError(
            f"{package.folder} updates the models {sorted(found)}, the base has {sorted(ids)}; "
            "merge updates of all models of the base"
        )
    return found


def _content(below: Package, model_id: str, parts: Sequence[Part], options: Options, progress: Progress) -> Content:
    here = f"Meta-info/{model_id}"
    management = check_management(below.content(f"{here}/managementinfo.json"), model_id)
    technical = check_technical(below.content(f"{here}/technicalinfo.json"), model_id)
    base = below.weights(model_id)
    for weights, _ in parts:
        _check_alike(base, weights)
    counted = [(weights, share) for weights, share in parts if share]
    tensors = [_tensor(name, base, counted, options.compact, progress) for name in sorted(base.entries, key=str.encode)]
    segments = [SegmentSource(name, data) for name, data in below.segments(model_id).items()]
    source = ModelSource(model_id, tensors, segments, hash=options.release.hash)
    shards = shards_of(source, options.shard_bytes)
    given = {"created_at": options.release.created_at, **options.info}
    management |= {key: value for key, value in given.items() if value not in (None, "", [])}
    return Content(shards, management, technical | {"compact": int(options.compact)})


def _check_alike(base: Weights, weights: Weights) -> None:
    """The update changes numbers only."""
    for name in sorted(base.entries.keys() ^ weights.entries.keys()):
        does = "adds" if name in weights.entries else "removes"
        raise ConversionError(f"an update {does} tensor {name!r}; only updates that keep all tensors can be merged")
    for name, old in base.entries.items():
        new = weights.entries[name]
        if (new.dtype, new.shape) != (old.dtype, old.shape):
            raise ConversionError(
                f"an update makes tensor {name!r} {new.dtype.name} {list(new.shape)}, in the base it is "
                f"{old.dtype.name} {list(old.shape)}; only updates that keep types and shapes can be merged"
            )


def _tensor(name: str, base: Weights, parts: Sequence[Part], compact: bool, progress: Progress) -> TensorSource:
    entry = base.entries[name]
    if len({weights.entries[name].digest for weights, _ in parts}) == 1:
        mixture = Mixture(name, parts[:1])
    elif entry.dtype.kind == "float":
        mixture = Mixture(name, parts, base)
    else:
        raise ConversionError(
            f"updates make different numbers of tensor {name!r}, which is {entry.dtype.name} and cannot be averaged; "
            "merge updates that agree on it"
        )
    return tensor_source(name, entry.dtype, entry.shape, Watched(mixture, progress), compact)


class Mixture:
    """A tensor of the result, verified, decoded and mixed as it is read; without a base, the one part as it is."""

    def __init__(self, name: str, parts: Sequence[Part], base: Weights | None = None) -> None:
        self.name, self.base = name, base
        self.sources = [weights for weights, _ in parts]
        self.shares = [share for _, share in parts]
        self.entry = self.sources[0].entries[name]
        self._verified = False
        self._spans = [weights.span(name) for weights in self._read_from()]

    @property
    def length(self) -> int:
        return self.entry.num_bytes

    def read(self, start: int, count: int) -> memoryview:
        if not self._verified:
            for weights in self._read_from():
                weights.check(self.name)
            self._verified = True
        if self.base is None:
            return self._spans[0].read(start, count)
        item = self.entry.dtype.item_bytes
        first = start // item * item
        wide = -(-(start + count) // item) * item - first
        base, *results = (span.read(first, wide) for span in self._spans)
        return mixed(base, results, self.shares, self.entry.dtype)[start - first : start - first + count]

    def _read_from(self) -> list[Weights]:
        return self.sources if self.base is None else [self.base, *self.sources]


def mixed(base: memoryview, results: Sequence[memoryview], shares: Sequence[float], dtype: DataType) -> memoryview:
    """round(A + sum of w_i (B_i - A)); an element that is the same in all results keeps its bits."""
    bits = [np.frombuffer(result, f"<u{dtype.item_bytes}") for result in results]
    same = np.ones(len(bits[0]), bool)
    for other in bits[1:]:
        same &= other == bits[0]
    start = _numbers(base, dtype)
    change = np.zeros_like(start)
    with np.errstate(over="ignore", invalid="ignore"):
        for result, share in zip(results, shares, strict=True):
            change += start.dtype.type(share) * (_numbers(result, dtype) - start)
        total = start + change
    return as_bytes(np.where(same, bits[0], _rounded(total, dtype)))


def _numbers(data: memoryview, dtype: DataType) -> np.ndarray:
    return np.frombuffer(data, "<f8") if dtype.name == "float64" else to_float32(data, dtype)


def _rounded(values: np.ndarray, dtype: DataType) -> np.ndarray:
    """Bit patterns, NaN as in `from_float32`."""
    if dtype.name == "float64":
        return np.where(np.isnan(values), np.uint64(0x7FF8 << 48), values.view(np.uint64))
    return from_float32(values, dtype)
