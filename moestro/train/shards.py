"""Tensors of a checkpoint in several files: every rank writes what it holds, any mesh reads what it needs.

    model.safetensors                            one rank: whole tensors
    model-00000.safetensors model-00001...       several: parts of tensors; the header says where they belong

    write_parts(path, [(name, shape, box, numbers), ...])        Shards(folder, "model").read(name, box)

A part is a box: (start, stop) in every dimension. Reading copies whatever boxes overlap the one that is asked for, so a
checkpoint of 4 x ep loads under 2 x ep, on one rank, or under tensor parallel. Plain safetensors throughout: unlike the
pickled metadata of torch's distributed checkpoint, nothing here can run code when it is read.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moestro.core.errors import CheckpointError

Box = tuple[tuple[int, int], ...]
Part = tuple[str, tuple[int, ...], Box, Tensor]
"""(name, shape of the whole, box, numbers)."""
HEADER = "moestro.parts"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a part lies."""

    path: Path
    key: str
    box: Box


def write_parts(path: Path, parts: Iterable[Part]) -> None:
    """Write parts to one file, read them back and compare; raises CheckpointError or OSError."""
    tensors: dict[str, Tensor] = {}
    header: dict[str, object] = {}
    for number, (name, shape, box, part) in enumerate(parts):
        key = f"{number}:{name}"
        tensors[key] = part.detach().cpu().contiguous()
        header[key] = {"name": name, "shape": shape, "box": box}
    save_checked(path, tensors, {HEADER: json.dumps(header)})


def save_checked(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and compare it with what it should hold."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata)
        with safe_open(path, framework="pt") as written:
            wrong = [name for name, tensor in plain.items() if not _same_bytes(written.get_tensor(name), tensor)]
    except SafetensorError as error:
        raise _as_os_error(error) from error
    if wrong:
        raise CheckpointError(f"{path} does not read back as written ({', '.join(wrong[:3])}); check the disk")


def _as_os_error(error: SafetensorError) -> OSError:
    """The library wraps the system's error in text: '... (os error 28) ...'."""
    text = str(error)
    number = text.partition("os error ")[2].partition(")")[0]
    return OSError(int(number) if number.isdigit() else 5, text)


def _same_bytes(left: Tensor, right: Tensor) -> bool:
    flat = (tensor.reshape(-1).view(torch.uint8) for tensor in (left, right))
    return left.shape == right.shape and torch.equal(*flat)


class Shards:
    """All tensors of one kind (model, optimizer, state) of a checkpoint, wherever their parts are."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, list[_Place]] = {}
        paths = sorted(folder.glob(f"{kind}-*.safetensors")) or [folder / f"{kind}.safetensors"]
        for path in paths:
            self._index(path)

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    part, fact = file.get_slice(key), header.get(key, {})
                    shape = tuple(fact.get("shape", part.get_shape()))
                    box = tuple((a, b) for a, b in fact.get("box", [(0, size) for size in shape]))
                    name = fact.get("name", key)
                    self.shapes[name] = shape
                    self._dtypes[name] = DTYPES[part.get_dtype()]
                    self._places.setdefault(name, []).append(_Place(path, key, box))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); use an earlier checkpoint") from error

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """The numbers of a box, or of the whole tensor; raises CheckpointError where some of them are nowhere."""
        box = tuple((0, size) for size in self.shapes[name]) if box is None else box
        out = torch.empty([stop - start for start, stop in box], dtype=self._dtypes[name])
        found = 0
        for place in self._places[name]:
            shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, place.box, strict=True))
            if all(start < stop for start, stop in shared):
                out[_within(shared, box)] = self._slice(place, _within(shared, place.box))
                found += out[_within(shared, box)].numel()
        if found < out.numel():
            raise CheckpointError(
                f"{self.folder} holds {found} of {out.numel()} numbers of {name}; use an earlier checkpoint"
            )
        return out

    def _slice(self, place: _Place, inner: tuple[slice, ...]) -> Tensor:
        with safe_open(place.path, framework="pt") as file:
            if not inner:
                return file.get_tensor(place.key)
            part: Tensor = file.get_slice(place.key)[inner]
            return part

    def all(self) -> dict[str, Tensor]:
        """Every tensor, whole."""
        return {name: self.read(name) for name in self.shapes}


def _within(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Slices that pick `inner` from a tensor that holds `outer`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(inner, outer, strict=True))
