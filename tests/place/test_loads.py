"""`place.loads`: counts come back as written; torn and replaced records do not."""

from pathlib import Path

import numpy as np
import pytest

from moestro.core.errors import CheckpointError, DataError
from moestro.place.loads import LoadWriter, read_loads


def write(path: Path, *steps: int) -> None:
    writer = LoadWriter(path, num_layers=2, num_experts=3)
    for step in steps:
        writer.append(step, np.full((2, 3), step))
    writer.close()


def test_counts_read_back(tmp_path: Path) -> None:
    write(tmp_path / "loads.trace", 1, 2)
    step_N, count_NLE = read_loads(tmp_path / "loads.trace")
    assert step_N.tolist() == [1, 2]
    assert count_NLE.shape == (2, 2, 3)
    assert count_NLE[1].tolist() == [[2, 2, 2], [2, 2, 2]]


def test_a_torn_record_is_dropped_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "loads.trace"
    write(path, 1, 2)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5)
    assert read_loads(path)[0].tolist() == [1]
    write(path, 2, 3)
    assert read_loads(path)[0].tolist() == [1, 2, 3]


def test_a_resumed_run_replaces_what_it_went_back_over(tmp_path: Path) -> None:
    path = tmp_path / "loads.trace"
    write(path, 1, 2, 3, 4)
    write(path, 3)
    assert read_loads(path)[0].tolist() == [1, 2, 3]


def test_a_trace_of_another_model_is_not_continued(tmp_path: Path) -> None:
    write(tmp_path / "loads.trace", 1)
    with pytest.raises(CheckpointError, match="a trace of another model"):
        LoadWriter(tmp_path / "loads.trace", num_layers=2, num_experts=4)


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello\n")
    with pytest.raises(DataError, match="is not a load trace"):
        read_loads(tmp_path / "x")
