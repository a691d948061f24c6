"""Tokens on disk are the text, and a step's batch is a function of the seed and the step alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moestro.core.errors import ConfigError, DataError
from moestro.train.data import Batches, Streams, TokenFile, open_data, prepare
from moestro.train.recipe import DataSpec


def token_file(number: int) -> TokenFile:
    return TokenFile(np.arange(number, dtype=np.uint16), number, ["a", "b"], [0, 50])


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_prepared_tokens_are_the_documents(corpus: Path, tmp_path: Path, tokenizer: str) -> None:
    prepare(DataSpec(source=str(corpus), tokenizer=tokenizer, heldout_share=0.2), tmp_path / "data")
    data = open_data(tmp_path / "data")
    texts = [(corpus / name).read_text() for name in data.train.names]
    starts = [*data.train.starts, len(data.train.token_N)]
    for text, start, stop in zip(texts, starts[:-1], starts[1:], strict=True):
        ids = data.train.token_N[start:stop].tolist()
        assert ids[-1] == data.tokenizer.end_id
        assert data.tokenizer.decode(ids[:-1]) == text
    assert data.train.text_bytes == sum(len(text.encode()) for text in texts)
    assert set(data.train.names) | set(data.heldout.names) == {path.name for path in corpus.iterdir()}


def test_byte_pairs_are_learned_from_training_text_only(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abab " * 100)
    (tmp_path / "held.txt").write_text("xyxy " * 100)
    spec = DataSpec(source=str(tmp_path / "train.txt"), heldout=str(tmp_path / "held.txt"), tokenizer="bpe:300")
    prepare(spec, tmp_path / "data")
    pieces = open_data(tmp_path / "data").tokenizer.token_bytes()
    assert b"ab" in pieces
    assert b"xy" not in pieces


def test_tokens_cut_short_are_noticed(corpus: Path, tmp_path: Path) -> None:
    prepare(DataSpec(source=str(corpus)), tmp_path / "data")
    path = tmp_path / "data" / "train.tokens"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"holds no prepared tokens .*train.tokens has"):
        open_data(tmp_path / "data")


def test_an_epoch_reads_every_window_once() -> None:
    batches = Batches(token_file(101), length=10, sequences=2, seed=0)
    seen = torch.cat([batches.at(step) for step in range(5)])
    assert sorted(seen[:, 0].tolist()) == list(range(int(seen[:, 0].min()), 100, 10))
    assert (seen[:, 1:] == seen[:, :-1] + 1).all()
    following = torch.cat([batches.at(step) for step in range(5, 10)])
    assert following[:, 0].tolist() != seen[:, 0].tolist()


def test_a_batch_depends_on_seed_and_step_only() -> None:
    one, two = (Batches(token_file(101), length=10, sequences=2, seed=7) for _ in range(2))
    for step in (0, 3, 12, 5):  # any order
        one.at(step)
    assert torch.equal(one.at(12), two.at(12))
    other = Batches(token_file(101), length=10, sequences=2, seed=8)
    assert any(not torch.equal(one.at(step), other.at(step)) for step in range(3))


def test_streams_go_on_where_they_ended() -> None:
    streams = Streams(token_file(101), length=10, sequences=2, seed=0)
    first, second = streams.at(0), streams.at(1)
    assert second[:, 0].tolist() == first[:, -1].tolist()
    assert torch.equal(streams.at(5), first)  # five windows a stream, then anew


def test_a_token_is_in_the_document_it_came_from() -> None:
    tokens = token_file(101)
    assert [tokens.document_at(i) for i in (0, 49, 50, 100)] == ["a", "a", "b", "b"]


def test_a_corpus_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.length is 200 but the corpus has 101 tokens"):
        Batches(token_file(101), length=200, sequences=2, seed=0)
