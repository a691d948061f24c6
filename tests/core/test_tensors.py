"""`core.tensors` writes what the safetensors library reads, and says what is wrong with a folder."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from moestro.core.errors import FamilyError
from moestro.core.tensors import INDEX, SINGLE, Entry, shards_of, shown, stored_tensors, write_tensors

ENTRIES = [Entry("a", (2, 3), "F32"), Entry("b", (3,), "BF16"), Entry("c", (5,), "F32")]


def content(name: str) -> memoryview:
    sizes = {entry.name: entry.size_bytes for entry in ENTRIES}
    return memoryview(bytes(range(sizes[name])))


def test_a_written_file_is_what_the_library_reads(tmp_path: Path) -> None:
    assert write_tensors(tmp_path, ENTRIES, content, limit_bytes=1000) == [SINGLE]
    with safe_open(tmp_path / SINGLE, framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert opened.get_tensor("a").tobytes() == bytes(range(24))
        assert opened.get_tensor("c").tobytes() == bytes(range(20))
    assert {name: (s.shape, s.dtype) for name, s in stored_tensors(tmp_path).items()} == {
        entry.name: (entry.shape, entry.dtype) for entry in ENTRIES
    }


def test_shards_stay_below_the_limit_and_have_an_index(tmp_path: Path) -> None:
    assert [[e.name for e in shard] for shard in shards_of(ENTRIES, 30)] == [["a", "b"], ["c"]]
    assert [[e.name for e in shard] for shard in shards_of(ENTRIES, 1)] == [["a"], ["b"], ["c"]]
    names = write_tensors(tmp_path, ENTRIES, content, limit_bytes=30)
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {"metadata": {"total_size": 50}, "weight_map": {"a": names[0], "b": names[0], "c": names[1]}}
    assert {stored.file.name for stored in stored_tensors(tmp_path).values()} == set(names)


def test_wide_types_come_first_so_that_all_are_aligned(tmp_path: Path) -> None:
    odd = [Entry("b", (3,), "BF16"), Entry("c", (5,), "F32")]
    write_tensors(tmp_path, odd, content, limit_bytes=1000)
    raw = (tmp_path / SINGLE).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert size % 8 == 0
    assert json.loads(raw[8 : 8 + size])["c"]["data_offsets"] == [0, 20]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    names = write_tensors(tmp_path, ENTRIES, content, limit_bytes=1)
    (tmp_path / names[1]).unlink()
    with pytest.raises(FamilyError, match=r"lacks 1 of 3 shards: model-00002-of-00003.safetensors; download"):
        stored_tensors(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path, ENTRIES, content, limit_bytes=1000)
    file = tmp_path / SINGLE
    for kept in (file.stat().st_size - 1, 20, 0):
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(FamilyError, match=r"model.safetensors is truncated or not a safetensors file"):
            stored_tensors(tmp_path)


def test_an_index_must_say_what_shards_hold(tmp_path: Path) -> None:
    names = write_tensors(tmp_path, ENTRIES, content, limit_bytes=30)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["b"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(FamilyError, match=rf"{names[0]} and {INDEX} disagree on 1 tensors: b"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": "../../etc/passwd"}}', '{"weight_map": {"a": 1}}'])
def test_a_bad_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FamilyError, match="download it again"):
        stored_tensors(tmp_path)


def test_a_folder_without_safetensors_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match=r"has no weights; it must have model.safetensors"):
        stored_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FamilyError, match=r"has only pickled weights \(pytorch_model.bin\), which can run code"):
        stored_tensors(tmp_path)


def test_long_lists_are_cut() -> None:
    assert shown(["a", "b"]) == "a, b"
    assert shown(["a", "b", "c"], most=2) == "a, b and 1 more"
