"""The GPU benchmark outlives what fails: a lost device ends the process, and the next one leaves out what lost it."""

import time
from pathlib import Path
from typing import Any

import pytest


class LeftError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def gpu_report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu_report

    def leave(code: int) -> None:
        raise LeftError(code)

    monkeypatch.setattr(gpu_report.os, "_exit", leave)
    return gpu_report


def fails() -> None:
    raise ValueError("wrong")


def test_what_fails_is_named_and_the_rest_goes_on(gpu_report: Any, tmp_path: Path) -> None:
    report = gpu_report.Report(tmp_path, seconds=60)
    assert report.attempt("a", fails) is None
    assert report.attempt("b", lambda: 3) == 3
    assert report.found["problems"] == ["a: ValueError: wrong"]


def test_a_lost_device_is_met_once(gpu_report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = gpu_report.Report(tmp_path, seconds=60)
    report.keep("rows", [{"shape": "s", "load": "l", "way": "w"}])
    monkeypatch.setattr(gpu_report, "answers", lambda: False)
    with pytest.raises(LeftError, match=str(gpu_report.LOST)):
        report.attempt("a backward", fails, part_of="a")
    again = gpu_report.Report(tmp_path, seconds=60, resume=True)
    assert again.attempt("a", lambda: pytest.fail("tried again")) is None
    assert again.attempt("b", lambda: 3) == 3
    assert again.row("s", "l", "w") is not None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_answer_counts_as_lost_and_no_time_as_left_out(gpu_report: Any, tmp_path: Path) -> None:
    report = gpu_report.Report(tmp_path, seconds=0.2)
    report.attempt("hangs", lambda: time.sleep(0.3), limit_s=0.05)
    assert gpu_report.Report(tmp_path, seconds=60, resume=True).found["lost"] == ["hangs"]
    assert report.attempt("late", lambda: 3) is None
    assert report.found["left_out"] == ["late"]
