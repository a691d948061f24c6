"""Tokens on disk and the batches cut from them.

    Corpus -> prepare -> data/train.tokens, data/heldout.tokens, data/tokenizer.json, data/data.json
    open_tokens -> Batches.at(step) -> token_BS (length + 1 tokens each: inputs and targets)

Which windows a step reads is a function of the seed and the step alone, so a resumed run sees exactly what an
undisturbed one would. The tokens are kept in the run's folder: a corpus that changes later does not change the run.
"""

import bisect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moestro.core.errors import ConfigError, DataError
from moestro.core.files import folder_aside
from moestro.core.tokens import ByteTokenizer, Tokenizer, bpe_size, learn_bpe, load_tokenizer
from moestro.train.corpus import Corpus, Document, read_corpus
from moestro.train.recipe import DataSpec


@dataclass(frozen=True, slots=True)
class TokenFile:
    """Documents as one row of tokens, each followed by the end token."""

    token_N: NDArray[np.integer]
    text_bytes: int
    """UTF-8 bytes of the text, end tokens not counted."""
    names: list[str]
    starts: list[int]
    """Where each document begins."""

    def document_at(self, token: int) -> str:
        """The name of the document that holds this token."""
        return self.names[bisect.bisect_right(self.starts, token) - 1]


@dataclass(frozen=True, slots=True)
class TokenData:
    """What `prepare` left in a folder."""

    train: TokenFile
    heldout: TokenFile
    tokenizer: Tokenizer
    left_out: dict[str, int]


def make_tokenizer(spec: DataSpec, corpus: Corpus) -> Tokenizer:
    """The tokenizer a recipe names; byte pairs are learned from training documents only."""
    if spec.tokenizer == "bytes":
        return ByteTokenizer()
    if spec.tokenizer.startswith("bpe:"):
        return learn_bpe((document.text for document in corpus.train), bpe_size(spec.tokenizer))
    return load_tokenizer(Path(spec.tokenizer))


def prepare(spec: DataSpec, folder: Path) -> None:
    """Read the corpus and leave tokens in `folder`, whole or not at all."""
    corpus = read_corpus(spec)
    tokenizer = make_tokenizer(spec, corpus)
    with folder_aside(folder) as aside:
        tokenizer.save(aside / "tokenizer.json")
        facts: dict[str, Any] = {"left_out": dict(corpus.left_out)}
        for name, documents in (("train", corpus.train), ("heldout", corpus.heldout)):
            facts[name] = _write_tokens(aside / f"{name}.tokens", documents, tokenizer)
        (aside / "data.json").write_text(json.dumps(facts))


def encode_files(sources: tuple[str, ...], tokenizer: Tokenizer, folder: Path) -> TokenFile:
    """Tokens of some files and folders, all of them; `folder` holds them while they are used."""
    corpus = read_corpus(DataSpec(source=sources, heldout=sources))
    fact = _write_tokens(folder / "text.tokens", corpus.heldout, tokenizer)
    return _open_tokens(folder / "text.tokens", fact)


def _write_tokens(path: Path, documents: list[Document], tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    starts, total, text_bytes = [], 0, 0
    with path.open("wb") as file:
        for document in documents:
            ids = np.concatenate([tokenizer.encode(document.text), end]).astype(dtype)
            starts.append(total)
            total += len(ids)
            text_bytes += len(document.text.encode(errors="replace"))
            file.write(ids.tobytes())
    names = [document.name for document in documents]
    return {"dtype": np.dtype(dtype).name, "tokens": total, "text_bytes": text_bytes, "names": names, "starts": starts}


def open_data(folder: Path) -> TokenData:
    """Map the tokens that `prepare` left; raises DataError where they are missing or cut short."""
    try:
        facts = json.loads((folder / "data.json").read_text())
        files = {name: _open_tokens(folder / f"{name}.tokens", facts[name]) for name in ("train", "heldout")}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder} holds no prepared tokens ({error}); start the run anew with moestro train"
        ) from error
    return TokenData(files["train"], files["heldout"], load_tokenizer(folder / "tokenizer.json"), facts["left_out"])


def _open_tokens(path: Path, fact: dict[str, Any]) -> TokenFile:
    token_N = np.memmap(path, dtype=fact["dtype"], mode="r")
    if len(token_N) != fact["tokens"]:
        raise ValueError(f"{path.name} has {len(token_N)} tokens, not {fact['tokens']}")
    return TokenFile(token_N, fact["text_bytes"], fact["names"], fact["starts"])


class Batches:
    """Windows of length + 1 tokens, each training token once per epoch, in an order drawn anew every epoch."""

    def __init__(self, tokens: TokenFile, *, length: int, sequences: int, seed: int) -> None:
        self.tokens, self.length, self.sequences, self.seed = tokens, length, sequences, seed
        self.windows = (len(tokens.token_N) - 1) // length
        if self.windows < 1:
            raise ConfigError(
                f"train.length is {length} but the corpus has {len(tokens.token_N)} tokens; give more text"
            )
        self._epoch, self._order, self._shift = -1, np.empty(0, dtype=np.int64), 0

    def starts(self, step: int) -> list[int]:
        """First token of every window of a step."""
        first = step * self.sequences
        return [self._start(index) for index in range(first, first + self.sequences)]

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self.windows)
        if epoch != self._epoch:
            draw = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, draw.permutation(self.windows)
            spare = len(self.tokens.token_N) - 1 - self.windows * self.length
            self._shift = int(draw.integers(0, spare + 1))
        return int(self._order[place]) * self.length + self._shift

    def at(self, step: int) -> Tensor:
        """token_BS int64 [sequences, length + 1]."""
        return windows(self.tokens, self.starts(step), self.length)


class Streams(Batches):
    """For segment recurrence: sequence b of a step goes on where sequence b of the step before ended."""

    def starts(self, step: int) -> list[int]:
        """First token of every window of a step."""
        per_stream = max(self.windows // self.sequences, 1)
        return [(row * per_stream + step % per_stream) % self.windows * self.length for row in range(self.sequences)]


def windows(tokens: TokenFile, starts: list[int], length: int) -> Tensor:
    """token_BS int64 [len(starts), length + 1]."""
    return torch.from_numpy(np.stack([tokens.token_N[start : start + length + 1] for start in starts]).astype(np.int64))
