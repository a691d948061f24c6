"""Documents from where text lies: the standard library, plain files, folders, .jsonl, .parquet.

    DataSpec -> read_corpus -> Corpus(train, heldout documents, what was left out and why)

A file that is not text is left out and counted; a corpus without text is an error. Held-out documents are whole
files (whole records of a .jsonl or .parquet), picked by a hash of their name: adding files moves none of them.
"""

import hashlib
import json
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moestro.core.errors import DataError
from moestro.train.recipe import STDLIB, DataSpec

STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}
"""Not the library's own source, absent from many distributions, or (pydoc_data) one large generated text."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the name it is known by."""

    name: str
    text: str


@dataclass(slots=True)
class Corpus:
    """Documents to learn from and to evaluate on."""

    train: list[Document]
    heldout: list[Document]
    left_out: Counter[str] = field(default_factory=Counter)
    """How many files were left out, by reason."""


def read_corpus(spec: DataSpec) -> Corpus:
    """Read and split; raises DataError when a path is missing or there is no text."""
    left_out: Counter[str] = Counter()
    documents = list(_documents(_as_tuple(spec.source), spec, left_out))
    if not documents:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "no files"
        raise DataError(f"data.source {spec.source!r} holds no text ({reasons}); give files or folders with UTF-8 text")
    heldout = list(_documents(_as_tuple(spec.heldout), spec, left_out)) if spec.heldout else []
    if not heldout:
        documents, heldout = split(documents, spec.heldout_share)
    return Corpus(documents, heldout, left_out)


def split(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """(train, heldout) by a hash of each name; a single document is cut, its end held out."""
    if len(documents) == 1:
        name, text = documents[0].name, documents[0].text
        cut = round(len(text) * (1 - share))
        return [Document(name, text[:cut])], [Document(name + " (end)", text[cut:])]
    place = {document.name: _place(document.name) for document in documents}
    bound = max(share, min(place.values()))  # at least one
    train = [document for document in documents if place[document.name] > bound]
    return train, [document for document in documents if place[document.name] <= bound]


def _place(name: str) -> float:
    """A number in 0..1 that depends on the name only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _as_tuple(source: str | tuple[str, ...]) -> tuple[str, ...]:
    return (source,) if isinstance(source, str) else source


def _documents(sources: tuple[str, ...], spec: DataSpec, left_out: Counter[str]) -> Iterator[Document]:
    for source in sources:
        if source == STDLIB:
            yield from _standard_library(left_out)
            continue
        path = Path(source)
        if not path.exists():
            raise DataError(f"data.source {source!r} does not exist; give {STDLIB}, a file or a folder")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and not file.name.startswith("."):
                name = str(file.relative_to(path)) if path.is_dir() else file.name
                yield from _file_documents(file, name, spec, left_out)


def _standard_library(left_out: Counter[str]) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if not STDLIB_LEFT_OUT.intersection(name.parts):
            yield from _plain_text(file, str(name), left_out)


def _file_documents(file: Path, name: str, spec: DataSpec, left_out: Counter[str]) -> Iterator[Document]:
    match file.suffix:
        case ".jsonl":
            return _json_lines(file, name, spec.text_field)
        case ".parquet":
            return _parquet(file, name, spec.text_field)
    return _plain_text(file, name, left_out)


def _plain_text(file: Path, name: str, left_out: Counter[str]) -> Iterator[Document]:
    content = file.read_bytes()
    if not content.strip():
        left_out["empty"] += 1
        return
    try:
        text = content.decode()
    except UnicodeDecodeError:
        left_out["not UTF-8 text"] += 1
        return
    if "\0" in text:
        left_out["binary"] += 1
        return
    yield Document(name, text)


def _json_lines(file: Path, name: str, text_field: str) -> Iterator[Document]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{file} line {number} is not JSON ({error.msg}); lines must be objects") from error
                yield Document(f"{name}:{number}", _text_of(record, text_field, f"{file} line {number}"))


def _text_of(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        keys = ", ".join(record) if isinstance(record, dict) else "no object"
        raise DataError(f"{where} has no text under '{text_field}' (it has {keys}); set data.text_field")
    return str(record[text_field])


def _parquet(file: Path, name: str, text_field: str) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{file} needs pyarrow; install it with pip install 'moestro[data]'") from error
    try:
        table = parquet.ParquetFile(file)
        columns = ", ".join(table.schema_arrow.names)
        if text_field not in table.schema_arrow.names:
            raise DataError(f"{file} has no column '{text_field}' (it has {columns}); set data.text_field")
        number = 0
        for batch in table.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                number += 1
                if text:
                    yield Document(f"{name}:{number}", str(text))
    except ArrowException as error:
        raise DataError(f"{file} is not a Parquet file ({error})") from error
