"""What can be packed: a safetensors file, a Hugging Face folder, a checkpoint of ours; and the way back.

    gather(path, leave_out) -> Source        restore(source_segment, content, tensors, out)

Weights become tensors; the header of each weight file and every other file become segments. `source`, a segment of
its own, says how to put the files together again, so that what comes out is bit for bit what went in. Nothing is left
out silently: what cannot be carried, or is left out by rule, is named.
"""

import fnmatch
import json
import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moestro.core.errors import ConversionError
from moestro.core.files import sha256_of
from moestro.package import canonical
from moestro.package.limits import MAX_SEGMENT_BYTES, MAX_SEGMENTS
from moestro.package.paths import check_paths
from moestro.package.safetensors import Header, HeaderTensor, read_header
from moestro.package.spans import Mapped, Part

CHECKPOINT = "moestro-checkpoint-1"
"""`format` in manifest.json of our checkpoints (`train.checkpoint`)."""
TRAINING_ONLY = ("optimizer.safetensors", "state.safetensors")
BY_RULE = (".git/*", ".cache/*", "*/__pycache__/*", "__pycache__/*", ".gitattributes", "*.partial")
"""Left out of any folder: traces of tools, no parts of a model."""
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")
"""Endings of weights in forms that can run code or that we do not read."""
SOURCE = "source"
SPECIAL = {"config.json": "config", "model.json": "config", "tokenizer.json": "tokenizer"}
SCHEMA = "moestro/source/1"


@dataclass(frozen=True, slots=True)
class Source:
    """A model as it lies on disk."""

    kind: str
    """safetensors, huggingface or checkpoint."""
    tensors: list[tuple[HeaderTensor, Part]] = field(default_factory=list)
    segments: dict[str, bytes] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def json(self, name: str) -> dict[str, object]:
        """A segment that is a JSON object; empty where it is not."""
        return _object(self.segments.get(name, b"{}"))


def gather(path: Path, leave_out: Sequence[str] = ()) -> Source:
    """Read what is there.

    leave_out   patterns of files below the folder that are not to be packed
    raises      ConversionError naming what cannot be carried
    """
    if path.is_file():
        return _joined("safetensors", path.parent, [path.name], [], {})
    if not path.is_dir():
        raise ConversionError(
            f"{path} does not exist; give a .safetensors file, a model folder, or a run of moestro train"
        )
    folder = _newest_checkpoint(path)
    files = check_paths(sorted(_files(folder, "")))
    if _is_checkpoint(folder):
        return _from_checkpoint(folder, files)
    dropped = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in (*BY_RULE, *leave_out))]
    kept = [file for file in files if file not in set(dropped)]
    _refuse_pickled(folder, kept)
    return _joined("huggingface", folder, kept, dropped, {})


def _newest_checkpoint(path: Path) -> Path:
    """Of a run, its newest checkpoint; else the folder itself."""
    steps = [entry for entry in path.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", entry.name)]
    return max(steps, key=lambda entry: int(entry.name.removeprefix("step-")), default=path)


def _files(folder: Path, prefix: str) -> list[str]:
    """Files below a folder; links to files are followed, as Hugging Face caches are made of them."""
    found: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found += _files(folder / entry.name, f"{prefix}{entry.name}/")
            elif entry.is_file():
                found.append(prefix + entry.name)
            else:
                raise ConversionError(f"{prefix}{entry.name} is no file and no folder; take it out of {folder}")
    return found


def _refuse_pickled(folder: Path, files: Sequence[str]) -> None:
    pickled = [file for file in files if file.endswith(PICKLED)]
    if pickled:
        raise ConversionError(
            f"{folder} holds {pickled[0]}, which is pickled or foreign; convert it to safetensors, or leave it behind "
            f"with --leave-out '*{Path(pickled[0]).suffix}'"
        )


def _object(text: bytes) -> dict[str, object]:
    """A JSON object, read leniently, as configurations hold whatever their writers liked; empty where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_checkpoint(folder: Path) -> bool:
    path = folder / "manifest.json"
    return path.is_file() and _object(_content(path, path.name)).get("format") == CHECKPOINT


def _from_checkpoint(folder: Path, files: Sequence[str]) -> Source:
    """Without what only training needs; the checkpoint's own manifest is rewritten to say so."""
    listed = _object(_content(folder / "manifest.json", "manifest.json")).get("sha256")
    if not isinstance(listed, dict):
        raise ConversionError(f"{folder} is damaged: its manifest.json lists no digests; use another checkpoint")
    digests = {name: value for name, value in listed.items() if name not in TRAINING_ONLY}
    damaged = [name for name, value in digests.items() if name not in files or sha256_of(folder / name) != value]
    if damaged:
        raise ConversionError(f"{folder} is damaged: {', '.join(damaged)} truncated or changed; use another checkpoint")
    unlisted = [name for name in files if name not in listed and name != "manifest.json"]
    if unlisted:
        raise ConversionError(f"{folder} holds {unlisted[0]}, which its manifest does not list; take it out")
    rewritten = json.dumps({"format": CHECKPOINT, "step": None, "sha256": digests}, indent=1).encode()
    dropped = [name for name in files if name in TRAINING_ONLY]
    return _joined("checkpoint", folder, sorted(digests), dropped, {"manifest.json": rewritten})


def _joined(kind: str, folder: Path, files: Sequence[str], dropped: list[str], given: dict[str, bytes]) -> Source:
    """Tensors and segments of these files, and of those whose content is given."""
    source = Source(kind, left_out=dropped)
    table: list[dict[str, object]] = []
    file_of: dict[str, str] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            source.segments[_segment_name(file)] = _content(folder / file, file)
            table.append({"path": file, "segment": _segment_name(file)})
            continue
        header, tensors = _weights(folder / file, file)
        for tensor, _ in tensors:
            if file_of.setdefault(tensor.name, file) != file:
                raise ConversionError(
                    f"{file_of[tensor.name]} and {file} both hold {tensor.name!r}; leave one behind with --leave-out"
                )
        source.tensors.extend(tensors)
        source.segments[f"header/{file}"] = header.text
        table.append({"path": file, "header": f"header/{file}"})
    for file, content in given.items():
        source.segments[_segment_name(file)] = content
        table.append({"path": file, "segment": _segment_name(file)})
    if not any("header" in entry for entry in table):
        raise ConversionError(f"{folder} holds no .safetensors file; there is nothing to pack")
    source.segments[SOURCE] = canonical.dumps({"schema": SCHEMA, "kind": kind, "files": table})
    if len(source.segments) > MAX_SEGMENTS:
        raise ConversionError(f"{folder} holds {len(files)} files; at most {MAX_SEGMENTS - 1} are allowed")
    return source


def _segment_name(file: str) -> str:
    return SPECIAL.get(file, f"file/{file}")


def _content(path: Path, file: str) -> bytes:
    size = path.stat().st_size
    if size > MAX_SEGMENT_BYTES:
        raise ConversionError(
            f"{file} has {size} bytes; files beside the weights may have {MAX_SEGMENT_BYTES}; leave it out"
        )
    return path.read_bytes()


def _weights(path: Path, file: str) -> tuple[Header, list[tuple[HeaderTensor, Part]]]:
    with path.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if not size:
            raise ConversionError(f"{file} is empty")
        mapped = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ)
    header = read_header(memoryview(mapped), file)
    whole = Mapped(mapped, 0, size)
    return header, [(t, Part(whole, header.data_start + t.start, t.length)) for t in header.tensors]
