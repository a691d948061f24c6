"""Text to token ids and back.

    bytes      256 byte values, nothing to learn, any input
    bpe:N      byte-pair encoding with N entries, learned from the training files (Sennrich 2016, on bytes)
    PATH       a `tokenizer.json` of the `tokenizers` library, as Hugging Face models carry

Whatever the kind, a tokenizer is saved as `tokenizer.json` beside the weights, so that a checkpoint is complete.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from moestro.core.errors import ConfigError, DataError
from moestro.core.files import write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

END = "<|end|>"
"""The token between documents."""

ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>")
"""Names of that token in vocabularies we meet, ours first."""

WORDS = r"\r?\n[ \t]*| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]+"
"""Where byte-pair merges may not cross: a line break with its indentation, a word, a digit, a run of signs."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    end_id: int | None
    """The token between documents, where there is one."""

    def encode(self, text: str) -> NDArray[np.int64]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self) -> list[bytes]:
        """What each token stands for; b'' for a special token."""
        ...

    def save(self, path: Path) -> None: ...
    def library(self) -> "Library":
        """The same tokens as an object of the `tokenizers` library, for other people's programs."""
        ...


class ByteTokenizer:
    """Token i is byte i; 256 ends a document."""

    vocab_size = 257
    end_id: int | None = 256

    def encode(self, text: str) -> NDArray[np.int64]:
        """UTF-8 bytes of a text; lone surrogates become '?'."""
        return np.frombuffer(text.encode(errors="replace"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes; invalid sequences become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        """One byte each, and nothing for the end of a document."""
        return [bytes([value]) for value in range(256)] + [b""]

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        write_text(path, json.dumps({"moestro": "bytes"}))

    def library(self) -> "Library":
        """Byte-pair encoding without merges over the bytes' stand-ins, each at its byte's value."""
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers

        library = Library(models.BPE(vocab=_byte_alphabet(), merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens([END])
        return library


class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, library: "Library") -> None:
        self._library = library
        self.vocab_size = library.get_vocab_size(with_added_tokens=True)
        ends = (library.token_to_id(name) for name in ENDS)
        self.end_id: int | None = next((end for end in ends if end is not None), None)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids without special tokens."""
        return np.array(self._library.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text, special tokens left out."""
        return str(self._library.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self) -> list[bytes]:
        """Bytes of every token, exact for byte-level vocabularies; others give the token's own UTF-8."""
        special = {i for i, token in self._library.get_added_tokens_decoder().items() if token.special}
        pieces = (self._library.id_to_token(i) or "" for i in range(self.vocab_size))
        return [b"" if i in special else _bytes_of_piece(piece) for i, piece in enumerate(pieces)]

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        write_text(path, self._library.to_str(pretty=False))

    def library(self) -> "Library":
        """The one inside."""
        return self._library


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`, ours or the library's."""
    try:
        text = path.read_text(encoding="utf-8")
        kind = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a tokenizer.json ({error}); give data.tokenizer bytes, bpe:N or a path"
        ) from error
    if kind == {"moestro": "bytes"}:
        return ByteTokenizer()
    from tokenizers import Tokenizer as Library  # deferred: bytes need no library

    try:
        return LibraryTokenizer(Library.from_str(text))
    except Exception as error:  # the library raises bare Exception for any bad file
        raise DataError(
            f"{path} is not a tokenizer.json ({error}); give data.tokenizer bytes, bpe:N or a path"
        ) from error


def bpe_size(kind: str) -> int:
    """The N of 'bpe:N'; raises ConfigError where it is none or too small for the 256 bytes and the end token."""
    digits = kind.removeprefix("bpe:")
    if not digits.isdigit() or int(digits) < 257:
        raise ConfigError(
            f"data.tokenizer is {kind!r}; it must be bytes, bpe:N with N of 257 or more, or a tokenizer.json"
        )
    return int(digits)


def learn_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair merges learned from texts; the end token is the first id after the bytes' alphabet."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return LibraryTokenizer(library)


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of every byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}


_BYTE_OF_LETTER = _byte_alphabet()


def _bytes_of_piece(piece: str) -> bytes:
    if all(letter in _BYTE_OF_LETTER for letter in piece):
        return bytes(_BYTE_OF_LETTER[letter] for letter in piece)
    return piece.replace("▁", " ").encode()
