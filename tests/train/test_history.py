"""`train.history`: what a log says, as arrays, and means over stretches of it."""

from pathlib import Path

import numpy as np
import pytest

from moestro.core.events import EventLog
from moestro.train.history import History, bin_means, read_history, smoothed
from moestro.train.run_folder import RunFolder


def test_columns_have_one_row_per_step_and_absent_ones_are_empty() -> None:
    steps = [{"event": "step", "step": step, "loss": 1.0 / step, "experts": [1, 2]} for step in (1, 2)]
    history = History([{"event": "started", "step": 0, "time_s": 5.0}, *steps])
    assert history.column("loss").tolist() == [1, 0.5]
    assert history.column("experts").tolist() == [[1, 2], [1, 2]]
    assert history.column("threshold").tolist() == []
    assert (history.steps().tolist(), history.last_step) == ([1, 2], 2)


def test_a_field_that_only_some_steps_have_is_left_out() -> None:
    history = History([{"event": "step", "step": 1, "loss": 1.0}, {"event": "step", "step": 2}])
    assert history.column("loss").tolist() == []


def test_time_is_that_of_sessions_without_the_pause_between_them() -> None:
    moments = [("started", 0, 100.0), ("step", 1, 101.0), ("step", 2, 103.0), ("resume", 2, 900.0), ("step", 3, 904.0)]
    history = History([{"event": event, "step": step, "time_s": time_s} for event, step, time_s in moments])
    assert history.seconds == 3 + 4


def test_what_a_resume_went_back_over_is_not_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with EventLog(folder.events) as log:
        for event, step in (("started", 0), ("step", 1), ("step", 2), ("resume", 1), ("step", 2)):
            log.write(event, step, loss=float(step))
    assert read_history(folder).steps().tolist() == [1, 2]


def test_a_log_that_is_not_there_is_an_empty_history(tmp_path: Path) -> None:
    history = read_history(RunFolder(tmp_path))
    assert (history.last_step, history.seconds, history.finished, history.beginning) == (0, 0, None, {})


def test_stretches_average_the_steps_in_them() -> None:
    end_B, mean_B = bin_means(np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 5, 7]), last_step=4, most=2)
    assert (end_B.tolist(), mean_B.tolist()) == ([2, 4], [2, 6])


def test_a_stretch_without_a_step_is_unknown() -> None:
    _, mean_BX = bin_means(np.array([1.0, 3]), np.array([[1.0, 2], [3, 4]]), last_step=3, most=10)
    np.testing.assert_equal(mean_BX, [[1, 2], [np.nan, np.nan], [3, 4]])


@pytest.mark.parametrize("steps", [7, 200, 997])
def test_every_step_is_in_one_stretch(steps: int) -> None:
    step_N = np.arange(1, steps + 1, dtype=float)
    end_B, mean_B = bin_means(step_N, step_N, steps, most=200)
    start_B = np.append(0, np.floor(end_B[:-1] + 1e-9))
    np.testing.assert_allclose(mean_B, (start_B + 1 + np.floor(end_B + 1e-9)) / 2)


def test_smoothing_keeps_a_straight_line_until_its_end() -> None:
    assert smoothed(np.arange(6.0), 3).tolist() == [0, 1, 2, 3, 4, 4.5]


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    assert smoothed(np.array([1.0, np.nan, 3]), 3).tolist() == [1, 2, 3]
