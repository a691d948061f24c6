"""`place.loads`: counts come back as written, by source and by pair; torn and replaced records do not."""

from pathlib import Path

import numpy as np
import pytest

from moestro.core.errors import CheckpointError, DataError
from moestro.place.loads import LoadWriter, read_loads, read_trace


def write(path: Path, *steps: int, sources: int = 1, most: int = 1) -> None:
    writer = LoadWriter(path, num_layers=2, num_experts=3)
    for step in steps:
        writer.append(step, np.full((2, sources, 3), step * most))
    writer.close()


def test_counts_read_back(tmp_path: Path) -> None:
    write(tmp_path / "loads.trace", 1, 2)
    step_N, count_NLE = read_loads(tmp_path / "loads.trace")
    assert step_N.tolist() == [1, 2]
    assert count_NLE.shape == (2, 2, 3)
    assert count_NLE[1].tolist() == [[2, 2, 2], [2, 2, 2]]


def test_sources_and_the_pairs_of_some_steps_read_back(tmp_path: Path) -> None:
    writer = LoadWriter(tmp_path / "t", num_layers=1, num_experts=3, merges=True)
    writer.append(7, np.array([[[1, 2, 3], [4, 5, 6]]]), np.array([[10, 20, 30]]))
    writer.append(8, np.array([[[1, 0, 0], [0, 0, 9]]]))
    writer.close()
    trace = read_trace(tmp_path / "t")
    assert trace.count_NLE.tolist() == [[[5, 7, 9]], [[1, 0, 9]]]
    assert trace.source_MLSE[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert trace.pair_step_P.tolist() == [7]
    assert trace.pair_PLX.tolist() == [[[10, 20, 30]]]
    assert trace.merges


def test_counts_beyond_two_bytes_take_four(tmp_path: Path) -> None:
    write(tmp_path / "small", 1)
    write(tmp_path / "large", 1, most=1 << 16)
    assert read_loads(tmp_path / "large")[1].tolist() == [[[1 << 16] * 3] * 2]
    sizes = [(tmp_path / name).stat().st_size for name in ("small", "large")]
    assert sizes[1] - sizes[0] == 2 * 3 * 2


def test_a_torn_record_is_dropped_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "loads.trace"
    write(path, 1, 2)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5)
    assert read_loads(path)[0].tolist() == [1]
    write(path, 2, 3)
    assert read_loads(path)[0].tolist() == [1, 2, 3]


def test_zeros_that_a_loss_of_power_left_are_written_over(tmp_path: Path) -> None:
    path = tmp_path / "loads.trace"
    write(path, 1)
    with path.open("ab") as file:
        file.write(bytes(100))
    assert read_loads(path)[0].tolist() == [1]
    write(path, 2)
    assert read_loads(path)[0].tolist() == [1, 2]


def test_a_resumed_run_replaces_what_it_went_back_over(tmp_path: Path) -> None:
    path = tmp_path / "loads.trace"
    write(path, 1, 2, 3, 4)
    write(path, 3)
    assert read_loads(path)[0].tolist() == [1, 2, 3]


def test_a_run_may_go_on_with_other_sources(tmp_path: Path) -> None:
    path = tmp_path / "loads.trace"
    write(path, 1, 2, sources=4)
    write(path, 3, 4, 5, sources=2)
    trace = read_trace(path)
    assert trace.count_NLE[:, 0, 0].tolist() == [4, 8, 6, 8, 10]
    assert trace.source_MLSE[:, 0, :, 0].tolist() == [[3, 3], [4, 4], [5, 5]]


def test_a_trace_without_records_is_empty(tmp_path: Path) -> None:
    write(tmp_path / "loads.trace")
    trace = read_trace(tmp_path / "loads.trace")
    assert trace.count_NLE.shape == (0, 2, 3)
    assert trace.pair_PLX.shape == (0, 2, 3)


def test_a_trace_of_another_model_is_not_continued(tmp_path: Path) -> None:
    write(tmp_path / "loads.trace", 1)
    with pytest.raises(CheckpointError, match="a trace of another model"):
        LoadWriter(tmp_path / "loads.trace", num_layers=2, num_experts=4)


def test_a_foreign_file_is_named_and_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"format": "other"}\n')
    with pytest.raises(DataError, match="is not a load trace"):
        read_loads(tmp_path / "x")
    with pytest.raises(CheckpointError, match="is not a load trace"):
        LoadWriter(tmp_path / "x", 2, 3)
