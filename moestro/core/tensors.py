"""Safetensors on disk, in one file or in shards, as Hugging Face folders have them.

    stored_tensors(folder) -> {name: Stored}     from headers only; every shard is opened, nothing is loaded
    write_tensors(folder, entries, content)      streamed: one tensor in memory at a time

A folder has `model.safetensors`, or `model.safetensors.index.json` with a map from tensors to shards. Format: 8 bytes
of header length, a JSON header of types, shapes and offsets, the numbers (huggingface/safetensors, README). Torch-free.

Headers are read here by the safetensors library; `package.safetensors` reads them once more by itself, because a
package must give back the very bytes of a header, and refuse what is hostile with its own errors.
"""

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from moestro.core.errors import FamilyError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Floating types a model may be stored in."""
SHARD_BYTES = 5 * 10**9
"""Largest weight file, as Hugging Face folders have it."""
ALIGNMENT = 8
"""Bytes; the data begins at a multiple of it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor is and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: F32, BF16 ..."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Bytes of its numbers."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder; raises FamilyError where shards are missing, truncated or not what the index says."""
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        kind = f"only pickled weights ({', '.join(pickled[:3])}), which can run code" if pickled else "no weights"
        raise FamilyError(f"{folder} has {kind}; it must have {SINGLE}, or {INDEX} and its shards")
    place_of = _weight_map(folder / INDEX)
    shards = sorted(set(place_of.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise FamilyError(f"{folder} lacks {len(missing)} of {len(shards)} shards: {shown(missing)}; download them")
    stored: dict[str, Stored] = {}
    for name in shards:
        here = _header(folder / name)
        promised = {tensor for tensor, shard in place_of.items() if shard == name}
        wrong = sorted(promised ^ here.keys())
        if wrong:
            raise FamilyError(f"{folder / name} and {INDEX} disagree on {len(wrong)} tensors: {shown(wrong)}")
        stored |= here
    return stored


def _weight_map(index: Path) -> dict[str, str]:
    try:
        place_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FamilyError(f"{index} is not an index of shards ({error!r}); download it again") from error
    if not isinstance(place_of, dict) or not all(_plain_name(name) for name in place_of.values()):
        raise FamilyError(f"{index} has a weight_map that does not name files beside it; download it again")
    return place_of


def _plain_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            return {name: Stored(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise FamilyError(f"{file} is truncated or not a safetensors file ({error}); download it again") from error


def shown(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def shards_of(entries: Sequence[Entry], limit_bytes: int) -> list[list[Entry]]:
    """Cut in order so that no shard is above the limit, except for a tensor that is larger by itself."""
    shards: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if shards[-1] and held + entry.size_bytes > limit_bytes:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry.size_bytes
    return shards


def write_tensors(
    folder: Path, entries: Sequence[Entry], content: Callable[[str], memoryview], limit_bytes: int
) -> list[str]:
    """Write model.safetensors, or shards and their index.

    content   the numbers of a tensor by name, in the entry's type, little end first
    returns   the names of the weight files
    """
    shards = shards_of(entries, limit_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        place_of = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.size_bytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place_of.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            _write_shard(file, shard, content)
    return names


def _write_shard(file: BinaryIO, entries: Sequence[Entry], content: Callable[[str], memoryview]) -> None:
    """Wider types first, so that every tensor starts at a multiple of its item size."""
    ordered = sorted(entries, key=lambda entry: (-ITEM_BYTES[entry.dtype], entry.name))
    text = header_text([(entry.name, entry.dtype, entry.shape, entry.size_bytes) for entry in ordered])
    file.write(struct.pack("<Q", len(text)) + text)
    for entry in ordered:
        data = content(entry.name)
        assert data.nbytes == entry.size_bytes, entry.name
        file.write(data)


def header_text(ordered: Sequence[tuple[str, str, Sequence[int], int]]) -> bytes:
    """The JSON header of a file, padded.

    ordered   name, type as safetensors names it, shape and bytes of each tensor, in order of their data
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, dtype, shape, size_bytes in ordered:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size_bytes]}
        start += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % ALIGNMENT)
