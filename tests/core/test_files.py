"""`core.files`: a file or folder is whole under its name or not there, and what was there stays on failure."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from moestro.core.errors import StorageError
from moestro.core.files import folder_aside, write_text

FullDisk = Callable[[int], AbstractContextManager[None]]


def test_a_file_appears_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "note.txt", "hello")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["note.txt"]


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path, full_disk: FullDisk) -> None:
    target = tmp_path / "note.txt"
    write_text(target, "old")
    said = r"note\.txt cannot be written: File too large .*nothing was overwritten"
    with pytest.raises(StorageError, match=said), full_disk(1024):
        write_text(target, "x" * 5000)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, full_disk: FullDisk) -> None:
    target = tmp_path / "model"
    with folder_aside(target) as aside:
        (aside / "weights").write_text("old")
    with pytest.raises(StorageError, match="free some space"), full_disk(1024), folder_aside(target) as aside:
        (aside / "weights").write_text("x" * 5000)
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_inside_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), folder_aside(tmp_path / "model"):
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with folder_aside(tmp_path / "model") as aside:
            (aside / text).write_text(text)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["second"]
