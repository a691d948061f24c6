"""`core.tokens`: every text comes back from its tokens, and every token's bytes are known."""

from pathlib import Path

import pytest

from moestro.core.errors import ConfigError, DataError
from moestro.core.tokens import ByteTokenizer, Tokenizer, bpe_size, learn_bpe, load_tokenizer

TEXT = 'def grüße(x):\n    return "日本" + x  # 12345\n\n\tend\r\n'


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else learn_bpe([TEXT] * 3, 300)


def test_text_survives_and_bytes_add_up(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = tokenizer.encode(TEXT).tolist()
    assert tokenizer.decode(ids) == TEXT
    assert b"".join(tokenizer.token_bytes()[i] for i in ids) == TEXT.encode()
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.encode(TEXT).tolist() == ids
    assert (again.vocab_size, again.end_id) == (tokenizer.vocab_size, tokenizer.end_id)


def test_the_library_has_the_same_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    library = tokenizer.library()
    assert library.encode(TEXT).ids == tokenizer.encode(TEXT).tolist()
    assert library.decode(tokenizer.encode(TEXT).tolist()) == TEXT
    library.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.token_bytes() == tokenizer.token_bytes()
    assert (again.vocab_size, again.end_id) == (tokenizer.vocab_size, tokenizer.end_id)


def test_the_end_token_stands_for_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_id is not None
    assert tokenizer.token_bytes()[tokenizer.end_id] == b""


def test_pairs_never_cross_a_word_or_a_line() -> None:
    pieces = learn_bpe(["self.x = 1\n        self.y = 22\n"] * 50, 400).token_bytes()
    assert b"\n        " in pieces
    assert b"self" in pieces
    assert not any(b"self." in piece or b"22" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["bpe:12", "bpe:", "bpe:many"])
def test_a_vocabulary_smaller_than_the_bytes_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="N of 257 or more"):
        bpe_size(kind)


@pytest.mark.parametrize("content", ["", "not json", '{"model": 1}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
