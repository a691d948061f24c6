"""Goodput against published tables and against simulated runs."""

import numpy as np
import pytest

from moestro.core.errors import PlanError
from moestro.plan.goodput import LLAMA3_FAILURES, Reliability, best_interval_s, goodput, run_cost, simulate, wall_s

SLOW = Reliability(checkpoint_s=60, restart_s=900)


def test_llama3_fails_once_in_three_hours() -> None:
    assert Reliability().mean_between_failures_s(16384) / 3600 == pytest.approx(3.09, abs=0.01)
    assert pytest.approx(2112, abs=1) == 1 / LLAMA3_FAILURES


@pytest.mark.parametrize(("devices", "share"), [(4096, 93.0), (16384, 83.0), (32768, 73.2), (100_000, 46.7)])
def test_exact_goodput_at_llama3s_failure_rate(devices: int, share: float) -> None:
    assert 100 * goodput(devices, SLOW).share == pytest.approx(share, abs=0.1)


def test_the_default_agrees_with_what_llama3_reported() -> None:
    """'Higher than 90 %' on 16,384 devices (2407.21783)."""
    assert 90 <= 100 * goodput(16384, Reliability()).share <= 95


def test_no_other_interval_is_better() -> None:
    between = 10_000.0
    best = best_interval_s(between, SLOW)
    lost = [wall_s(best * factor, between, SLOW) / (best * factor) for factor in (0.9, 1.0, 1.1)]
    assert lost[1] == min(lost)


@pytest.mark.parametrize("devices", [1024, 10_240, 65_536])
def test_simulated_runs_agree_with_the_formula(devices: int) -> None:
    work_s = 20 * 86400.0
    runs = simulate(work_s, devices, SLOW, runs=400)
    measured = work_s / 3600 / runs.wall_hours_R.mean()
    assert measured == pytest.approx(goodput(devices, SLOW).share, rel=0.01)


def test_more_failures_spread_runs_and_seeds_repeat_them() -> None:
    one, same = (simulate(1e6, 10_240, SLOW, runs=50, seed=3) for _ in range(2))
    assert np.array_equal(one.wall_hours_R, same.wall_hours_R)
    assert one.percentile(0.1) < one.percentile(0.9)


def test_a_run_costs_what_its_hours_cost() -> None:
    cost = run_cost(tokens=3.6e9, tokens_per_step=1e6, step_s=1.0, share=0.5, devices=10, power_w=1000, usd_per_hour=2)
    assert (cost.steps, cost.hours, cost.energy_mwh, cost.price_usd) == (3600, 2.0, 0.02, 40.0)


@pytest.mark.parametrize("key", ["failures_per_device_day", "checkpoint_s", "restart_s"])
def test_rates_must_be_above_zero(key: str) -> None:
    with pytest.raises(PlanError, match=f"reliability.{key} is 0"):
        Reliability(**{key: 0.0})
