"""`place.policy`, `place.predict`, `place.planner`, `place.replay`: move when it pays, follow drift, spend less."""

import numpy as np
import pytest
from parks import layer, park, skewed

from moestro.place.planner import Gated
from moestro.place.policy import Reason, decide, life_steps
from moestro.place.predict import Predictor, mean_load
from moestro.place.replay import Stay, replay

SURE = {"life": 100.0, "error": 0.0}


def test_a_plan_moves_when_it_pays_back_with_margin() -> None:
    assert decide(now_s=1.0, planned_s=0.9, move_s=4.5, **SURE).move
    assert decide(now_s=1.0, planned_s=0.9, move_s=5.5, **SURE).reason is Reason.COSTS
    assert decide(now_s=1.0, planned_s=0.9, move_s=4.5, margin=1.5, **SURE).reason is Reason.COSTS


def test_no_gain_or_an_unsure_one_moves_nothing() -> None:
    assert decide(now_s=1.0, planned_s=0.985, move_s=0.0, **SURE).reason is Reason.SAME
    assert decide(now_s=1.0, planned_s=1.1, move_s=0.0, **SURE).reason is Reason.SAME
    assert decide(now_s=1.0, planned_s=0.5, move_s=0.0, life=100, error=2.0).reason is Reason.UNSURE


def test_a_life_ends_with_drift_training_or_what_was_watched() -> None:
    known = {"interval_steps": 10, "watched_steps": 5000, "left_steps": 5000}
    assert life_steps(drift=0.01, **known) == 500
    assert life_steps(drift=0.0, **known) == 2000
    assert life_steps(drift=0.0, **{**known, "left_steps": 30}) == 30
    assert life_steps(drift=0.0, **{**known, "watched_steps": 100}) == 100
    assert life_steps(drift=5.0, **known) == 10


def test_noise_is_averaged_and_a_jump_followed() -> None:
    rng = np.random.default_rng(0)
    steady = rng.multinomial(1000, [0.5, 0.3, 0.2], size=60)
    predictor = Predictor(1, 3)
    for count_E in steady:
        predictor.update(count_E[None])
    load_LE, error_L = predictor.predict()
    np.testing.assert_allclose(load_LE[0] / 1000, [0.5, 0.3, 0.2], atol=0.02)
    assert error_L[0] < 0.06
    for _ in range(30):
        predictor.update(np.array([[200, 300, 500]]))
    np.testing.assert_allclose(predictor.predict()[0][0], [200, 300, 500], rtol=0.05)


def test_a_trend_is_predicted_better_than_the_last_step() -> None:
    predictor = Predictor(1, 2)
    for step in range(60):
        predictor.update(np.array([[1000 + 20 * step, 3000 - 20 * step]]))
    load_LE, error_L = predictor.predict()
    last, following = 1000 + 20 * 59, 1000 + 20 * 60
    assert abs(load_LE[0, 0] - following) < abs(last - following)
    assert error_L[0] < 40 / 4000


def test_the_mean_forgets() -> None:
    assert mean_load(np.array([[[0.0]], [[10.0]]]), memory=0.7)[0, 0] == pytest.approx(3.0)


def test_over_time_it_beats_doing_nothing_and_keeps_its_budget() -> None:
    cluster = park(2, 4, card=5)
    loads = [skewed(8, 16, seed=1 + sample // 20, slope=1.2) for sample in range(40)]
    case = layer(cluster, loads[0], 3, state_bytes=2e8)
    nothing = replay(case, loads, Stay(), 10)
    ours = replay(case, loads, Gated(interval_steps=10, total_steps=390, effort=0.3), 10)
    assert ours.total_s < 0.8 * nothing.total_s
    assert nothing.plans == 0 < ours.plans
    assert max(ours.moved) <= 0.15 * ours.slots
    assert ours.total_s == ours.step_s + ours.move_s


def test_balanced_loads_are_left_alone() -> None:
    even = np.full((8, 16), 100.0)
    case = layer(park(2, 4, card=100), even, 3, state_bytes=1e11)
    assert replay(case, [even] * 10, Gated(interval_steps=10, total_steps=90), 10).plans == 0
