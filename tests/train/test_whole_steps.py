"""Whole steps are what the model says, as much longer as it has been, and a rest that no placement changes."""

import pytest
import torch

from moestro.dist.timeline import Spent
from moestro.place.cost import StepTime
from moestro.train.whole_steps import CROWDED, Measured, WholeSteps, beside


def spent(step: int, *seconds: float) -> Spent:
    """Each rank's seconds, half of them compute, half of them idle."""
    return Spent(step, torch.tensor([[one / 2, 0.0, 0.0, one / 2] for one in seconds]))


def modelled(exchange_s: float, compute_s: float = 0.0) -> list[StepTime]:
    """Of one layer."""
    return [StepTime(exchange_s=exchange_s, compute_s=compute_s, sync_s=0.0, move_s=0.0, latency_s=0.0)]


def test_own_work_stays_whatever_the_placement() -> None:
    known = beside(Measured(step_s=1.5, own_s=0.6), modelled(0.9, compute_s=0.1))
    assert known.rest_s == pytest.approx(0.5)
    assert known.predicted_s(1.0) == pytest.approx(1.5)
    assert known.predicted_s(0.25) == pytest.approx(0.75)


def test_exchanges_that_take_longer_than_the_model_says_do_so_elsewhere_too() -> None:
    known = beside(Measured(step_s=1.7, own_s=0.5), modelled(1.0))
    assert known.predicted_s(1.0) == pytest.approx(1.7)
    assert known.predicted_s(0.5) == pytest.approx(0.5 + 1.2 * 0.5)


def test_what_is_far_beyond_the_model_is_no_exchange() -> None:
    known = beside(Measured(step_s=2.0, own_s=0.5), modelled(0.1))
    assert known.scale == CROWDED
    assert known.predicted_s(0.1) == pytest.approx(2.0)
    assert known.predicted_s(0.0) == pytest.approx(2.0 - 0.1 * CROWDED)


def test_a_model_that_promises_longer_steps_than_there_are_is_scaled() -> None:
    known = beside(Measured(step_s=0.5, own_s=0.1), modelled(1.0))
    assert known.predicted_s(1.0) == pytest.approx(0.5)
    assert known.predicted_s(0.5) == pytest.approx(0.3)
    assert beside(Measured(0.5, 0.5), modelled(0.0)).predicted_s(0.0) == 0.5


def test_steps_count_from_the_one_after_experts_have_arrived() -> None:
    steps = WholeSteps()
    steps.learn([spent(step, 9.0, 1.0) for step in (1, 2, 3, 4)])
    steps.begin(4, expected_s=2.0)
    assert steps.measured() is None
    assert not steps.as_expected(5)
    steps.learn([spent(4, 9.0), spent(5, 7.0), spent(6, 2.0, 2.2), spent(7, 1.8, 1.0), spent(8, 2.1)])
    assert steps.measured() == Measured(pytest.approx(2.1), pytest.approx(1.05))
    assert steps.as_expected(5)


def test_steps_that_take_longer_are_noticed() -> None:
    steps = WholeSteps()
    steps.begin(0, expected_s=1.0)
    steps.learn([spent(step, 1.0) for step in range(2, 12)])
    assert steps.as_expected(5)
    steps.learn([spent(step, 1.5) for step in range(12, 15)])
    assert steps.measured() == Measured(1.0, 0.5)
    assert not steps.as_expected(5)
