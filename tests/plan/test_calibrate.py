"""Calibration: a machine made up from known constants is found again, and the profile predicts runs it has not seen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moestro.cli import plan_calibrate
from moestro.core.config import build
from moestro.core.errors import PlanError
from moestro.plan.calibrate import Trial, calibrated, measured_row
from moestro.plan.profile import load_profile, predict
from moestro.plan.step import step_time
from moestro.train.recipe import Recipe


def seconds_on_a_made_up_machine(trial: Trial) -> float:
    """This package's formulas under constants no prior knows."""
    constants = replace(
        load_profile().constants, matmul_share=0.3, memory_share=0.4, host_s=4e-5, step_s=0.05, elementwise=3.0
    )
    return float(step_time(measured_row(trial, 1.0).case, constants).total_s)


def test_a_made_up_machine_is_found_again(tmp_path: Path) -> None:
    trials = plan_calibrate.trials(1)
    rows = [measured_row(trial, seconds_on_a_made_up_machine(trial)) for trial in trials]
    result = calibrated(rows, tmp_path / "profile.json", check=True)
    assert result["fit_error"]["median"] < 2
    assert result["left_out_error"]["median"] < 10
    unseen = Trial(width=320, num_layers=3, sequences=12)
    found = predict([measured_row(unseen, 1.0)], load_profile(tmp_path / "profile.json"))
    assert found.step_s[0] == pytest.approx(seconds_on_a_made_up_machine(unseen), rel=0.05)


def test_ranks_share_the_machine() -> None:
    one, four = (seconds_on_a_made_up_machine(Trial(ranks=ranks)) for ranks in (1, 4))
    assert four > 0.8 * one


def test_a_trial_is_a_recipe_the_trainer_takes(tmp_path: Path) -> None:
    table = Trial().recipe(8, tmp_path / "run", tmp_path / "text.txt")
    assert build(Recipe, table).train.steps == 8


def test_measuring_goes_through_every_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_calibrate, "measure", lambda trial, steps: seconds_on_a_made_up_machine(trial))
    said: list[str] = []
    out = tmp_path / "profile.json"
    result = plan_calibrate.calibrate_here(out=out, steps=8, ranks=[1], check=False, say=said.append)
    assert len(said) == 2 * len(plan_calibrate.trials(1))
    assert "median error" in result["text"]
    assert np.isfinite(load_profile(out).constants.matmul_share)


@pytest.mark.parametrize(("steps", "ranks", "words"), [(2, [1], "--steps is 2"), (8, [0], "--ranks is 0")])
def test_bad_settings_are_refused(tmp_path: Path, steps: int, ranks: list[int], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan_calibrate.calibrate_here(out=tmp_path / "p", steps=steps, ranks=ranks, check=False, say=print)
