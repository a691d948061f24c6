"""Write a model's files from its tensors and segments: what came from a folder goes back bit for bit.

    write_source(folder, weights, segments) -> paths

Without a `source` segment, as packages made from Python may be, one model.safetensors holds all tensors.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moestro.core.errors import ConversionError
from moestro.package import canonical
from moestro.package.bulk import write_all
from moestro.package.fields import Fields
from moestro.package.paths import check_path, check_paths, create_below, open_folder
from moestro.package.safetensors import Header, plain_header
from moestro.package.sources import SCHEMA, SOURCE
from moestro.package.spans import Progress, ignore
from moestro.package.weights import Weights


def write_source(
    folder: Path, weights: Weights, segments: Mapping[str, bytes], mode: int = 0o644, progress: Progress = ignore
) -> list[str]:
    """All files, below `folder` and nowhere else (R-8.3.2-1); each tensor is verified as it is written.

    mode   of the files; 0600 for what was encrypted
    """
    plan = _plan(weights, segments)
    paths = check_paths(path for path, _ in plan)
    handle = open_folder(folder)
    try:
        for path, content in plan:
            file = create_below(handle, path, mode)
            try:
                _write(file, folder / path, content, weights, progress)
            finally:
                os.close(file)
    finally:
        os.close(handle)
    return sorted(paths)


def _plan(weights: Weights, segments: Mapping[str, bytes]) -> list[tuple[str, bytes | Header]]:
    """(path, content or header of the weights) of each file."""
    if SOURCE not in segments:
        entries = [(entry.name, entry.dtype, entry.shape) for entry in weights.entries.values()]
        rest = [(name.removeprefix("file/"), data) for name, data in segments.items() if name.startswith("file/")]
        return [("model.safetensors", plain_header(entries)), *rest]
    fields = Fields(canonical.loads(segments[SOURCE], 64 << 20, "segment source"), "segment source")
    if fields.text("schema") != SCHEMA:
        raise ConversionError(f"segment source has schema {fields.text('schema')[:40]!r}; this moestro knows {SCHEMA}")
    plan = [_planned(item, weights, segments) for item in fields.items("files", 1_000_000)]
    check_paths(path for path, _ in plan)
    written = [tensor.name for _, content in plan if isinstance(content, Header) for tensor in content.tensors]
    if sorted(written) != sorted(weights.entries):
        raise ConversionError("the files to be written and the tensors of the package do not agree")
    return plan


def _planned(item: Any, weights: Weights, segments: Mapping[str, bytes]) -> tuple[str, bytes | Header]:
    fields = Fields(item, "a file of segment source")
    path = check_path(fields.any("path"))
    kind = "header" if fields.has("header") else "segment"
    name = fields.text(kind)
    fields.finish()
    if name not in segments:
        raise ConversionError(f"{path} needs the segment {name[:60]!r}, which the package lacks")
    return path, _header(path, segments[name], weights) if kind == "header" else segments[name]


def _header(path: str, text: bytes, weights: Weights) -> Header:
    """The header of a weight file, whose tensors must be those of the package."""
    total = sum(entry.num_bytes for entry in weights.entries.values())
    table = canonical.loads_loosely(text, 100_000_000, path)
    names = [name for name in table if name != "__metadata__"] if isinstance(table, dict) else []
    missing = [name for name in names if name not in weights.entries]
    if missing:
        raise ConversionError(f"{path} needs the tensor {missing[0]!r}, which the package lacks")
    size = sum(weights.entries[name].num_bytes for name in names)
    assert size <= total
    header = Header.parse(text, size, path)
    for tensor in header.tensors:
        entry = weights.entries[tensor.name]
        if (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
            raise ConversionError(f"{path}: tensor {tensor.name!r} is {entry.dtype.name} {list(entry.shape)} here")
    return header


def _write(handle: int, path: Path, content: bytes | Header, weights: Weights, progress: Progress) -> None:
    if isinstance(content, bytes):
        write_all(handle, content, path)
        return
    write_all(handle, len(content.text).to_bytes(8, "little") + content.text, path)
    for tensor in content.tensors:
        for batch in weights.verified(tensor.name):
            write_all(handle, batch, path)
            progress(len(batch))
