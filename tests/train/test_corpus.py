"""Documents come from every kind of file; what is not text is counted, and a corpus without text is refused."""

import json
from pathlib import Path

import pytest

from moestro.core.errors import ConfigError, DataError
from moestro.train.corpus import read_corpus
from moestro.train.recipe import DataSpec


def names(spec: DataSpec) -> tuple[set[str], set[str]]:
    corpus = read_corpus(spec)
    return {d.name for d in corpus.train}, {d.name for d in corpus.heldout}


def test_the_standard_library_is_found_without_its_tests() -> None:
    train, heldout = names(DataSpec())
    assert len(train) > 300
    assert 5 < len(heldout) < len(train) / 5
    assert "dataclasses.py" in train | heldout
    assert not any("test" in Path(name).parts for name in train | heldout)


def test_a_file_keeps_its_side_when_others_come(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("text")
    spec = DataSpec(source=str(tmp_path), heldout_share=0.3)
    _, before = names(spec)
    (tmp_path / "new.txt").write_text("text")
    _, after = names(spec)
    assert before
    assert after - {"new.txt"} == before


def test_files_that_are_not_text_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "also.md").write_text("more")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.bin").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes("grüße".encode("latin-1"))
    corpus = read_corpus(DataSpec(source=str(tmp_path)))
    assert {d.name for d in corpus.train + corpus.heldout} == {"good.txt", "deep/also.md"}
    assert dict(corpus.left_out) == {"empty": 1, "binary": 1, "not UTF-8 text": 1}


def test_a_single_file_is_cut_and_its_end_held_out(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("0123456789" * 10)
    corpus = read_corpus(DataSpec(source=str(tmp_path / "one.txt"), heldout_share=0.1))
    assert (len(corpus.train[0].text), corpus.heldout[0].text) == (90, "0123456789")


def test_json_lines_and_parquet_give_a_document_a_record(tmp_path: Path) -> None:
    records = [{"text": f"record {i}", "other": 1} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    corpus = read_corpus(DataSpec(source=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet"))))
    assert sorted(d.text for d in corpus.train + corpus.heldout) == sorted(2 * [r["text"] for r in records])


def test_heldout_text_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("train")
    (tmp_path / "test.txt").write_text("test")
    spec = DataSpec(source=str(tmp_path / "train.txt"), heldout=str(tmp_path / "test.txt"))
    assert names(spec) == ({"train.txt"}, {"test.txt"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"holds no text \(1 empty\)"),
        (b"\xff\xfe\x00", r"holds no text \(1 not UTF-8 text\)"),
        (b"a\0b", r"holds no text \(1 binary\)"),
    ],
)
def test_a_corpus_without_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_corpus(DataSpec(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl line 2 is not JSON"),
        ('{"body": "x"}', r"a\.jsonl line 2 has no text under 'text' \(it has body\); set data\.text_field"),
        ("[1]", r"line 2 has no text under 'text' \(it has no object\)"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_corpus(DataSpec(source=str(tmp_path)))


def test_missing_paths_and_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; give stdlib, a file or a folder"):
        read_corpus(DataSpec(source=str(tmp_path / "absent")))
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has no column 'text' \(it has body\); set data\.text_field"):
        read_corpus(DataSpec(source=str(tmp_path / "a.parquet")))
    (tmp_path / "b.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="is not a Parquet file"):
        read_corpus(DataSpec(source=str(tmp_path / "b.parquet")))


def test_impossible_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"heldout_share is 1\.0"):
        DataSpec(heldout_share=1.0)
