"""The threshold's arithmetic, on histograms one can count."""

import pytest
import torch

from moestro.nn.routing_budget import BINS, LOWEST, PER_UNIT, Budget, budget_at, histogram, quantile


def test_histograms_of_parts_add_up() -> None:
    values = torch.tensor([[0.0], [0.5], [1.0], [1.0]])  # log-odds: beyond the left edge, 0, beyond the right edge
    count = histogram(values)
    assert (count[0], count[BINS // 2], count[BINS - 1]) == (1, 1, 2)
    assert torch.equal(count, histogram(values[:1]) + histogram(values[1:]))


@pytest.mark.parametrize(("share", "value"), [(0.25, 0.25), (0.5, 0.5), (0.9, 0.9)])
def test_the_quantile_of_even_values_is_the_share(share: float, value: float) -> None:
    log_odds = quantile(histogram(torch.linspace(0, 1, 100_001)[:, None]), share)
    assert float(torch.sigmoid(log_odds)) == pytest.approx(value, abs=1e-3)


def test_the_quantile_is_linear_inside_a_bin() -> None:
    count = torch.zeros(BINS)
    count[10] = 4
    assert float(quantile(count, 0.5)) == pytest.approx(LOWEST + 10.5 / PER_UNIT)


@pytest.mark.parametrize(("progress", "budget"), [(0.0, 2.0), (0.05, 1.75), (0.1, 1.5), (0.7, 1.5)])
def test_the_schedule_is_linear_then_flat(progress: float, budget: float) -> None:
    assert budget_at(progress, start=2.0, end=1.5, anneal_share=0.1) == pytest.approx(budget)


def test_the_first_update_jumps_to_the_quantile_and_later_ones_follow_slowly() -> None:
    budget = Budget(decay=0.9, gain=0.0)
    even = histogram(torch.linspace(0, 1, 10_001)[:, None])
    budget.update(even, decisions=1, mean_experts=1.3, wanted=1.3)
    assert float(budget.threshold) == pytest.approx(0.3, abs=1e-3)
    lower = histogram(torch.linspace(0, 0.5, 10_001)[:, None])
    budget.update(lower, decisions=1, mean_experts=1.3, wanted=1.3)
    log_odds = torch.logit(torch.tensor([0.3, 0.15]))
    assert float(budget.threshold) == pytest.approx(
        float(torch.sigmoid(0.9 * log_odds[0] + 0.1 * log_odds[1])), abs=1e-3
    )


def test_the_integral_pushes_against_a_lasting_error() -> None:
    budget = Budget(decay=0.9, gain=0.1)
    even = histogram(torch.linspace(0, 1, 10_001)[:, None])
    for _ in range(5):
        budget.update(even, decisions=1, mean_experts=1.2, wanted=1.3)  # 0.1 experts short: about 0.01 in 0..1 a step
    assert float(budget.threshold) == pytest.approx(0.35, abs=5e-3)


def test_a_budget_of_everything_opens_the_threshold() -> None:
    budget = Budget(decay=0.9, gain=0.1)
    budget.update(histogram(torch.rand(100, 1)), decisions=1, mean_experts=1.5, wanted=2.0)
    assert float(budget.threshold) == 1.0
