"""Every routing rule on cases one can do by hand: four experts with probabilities one can read off."""

import math

import pytest
import torch
from torch import Tensor

from moestro.nn import routing_rules as rules
from moestro.nn.routing_rules import Choice, Scores

NONE = 4
"""The number of experts, which marks an unused slot."""

PROBS = torch.tensor([[0.50, 0.30, 0.15, 0.05], [0.05, 0.10, 0.05, 0.80]])
"""A token in two minds (gap 0.25) and a decided one (gap 7/9)."""


def scores(prob_TE: Tensor = PROBS, bias_E: list[float] | None = None) -> Scores:
    select_TE = prob_TE + torch.tensor(bias_E) if bias_E else prob_TE
    return Scores(prob_TE.log().requires_grad_(), prob_TE, select_TE)


def experts(choice: Choice) -> list[list[int]]:
    return choice.expert_TK.tolist()


def weights(choice: Choice) -> list[list[float]]:
    return [[round(w, 4) for w in row] for row in choice.weight_TK.tolist()]


def test_top_k_takes_the_best_and_keeps_their_scores() -> None:
    assert experts(rules.top_k(scores(), 1)) == [[0], [3]]
    two = rules.top_k(scores(), 2)
    assert experts(two) == [[0, 1], [3, 1]]
    assert weights(two) == [[0.5, 0.3], [0.8, 0.1]]


def test_a_bias_picks_experts_but_does_not_weigh_them() -> None:
    choice = rules.top_k(scores(bias_E=[0, 0, 0.4, 0]), 2)
    assert experts(choice) == [[2, 0], [3, 2]]
    assert weights(choice) == [[0.15, 0.5], [0.8, 0.05]]


def test_renormalised_weights_sum_to_one() -> None:
    assert weights(rules.renormalised(rules.top_k(scores(), 2))) == [[0.625, 0.375], [0.8889, 0.1111]]


@pytest.mark.parametrize(("threshold", "seconds"), [(0.24, [NONE, NONE]), (0.26, [1, NONE]), (0.8, [1, 1])])
def test_gap_takes_the_second_where_it_is_nearly_as_good(threshold: float, seconds: list[int]) -> None:
    choice = rules.gap(scores(), torch.tensor(threshold), True, "keep", 0.5)
    assert experts(choice) == [[0, seconds[0]], [3, seconds[1]]]
    assert weights(choice)[0] == [0.5, 0.3 if seconds[0] == 1 else 0.0]
    assert choice.decision_TJ is not None
    assert choice.decision_TJ.flatten().tolist() == pytest.approx([0.25, 7 / 9])


def test_the_gap_of_probabilities_is_half_the_logit_difference_through_tanh() -> None:
    logits = torch.tensor([[3.0, 1.0], [0.1, -60.0], [-1.0, 2.0]])
    expected = [math.tanh(1.0), math.tanh(30.05), 0.0]  # a bias may put the weaker first: no negative gap
    assert rules.pair_gap(logits, logits=True).tolist() == pytest.approx(expected)
    assert rules.pair_gap(logits[:1].softmax(-1), logits=False).tolist() == pytest.approx(expected[:1])


def test_gap_weights_over_the_pair_never_reach_one_and_leave_the_router_a_gradient() -> None:
    lone = scores()
    logit_TE = lone.logit_TE
    choice = rules.gap(Scores(logit_TE, logit_TE.softmax(-1), lone.select_TE), torch.tensor(0.0), True, "pair", 0.5)
    assert experts(choice) == [[0, NONE], [3, NONE]]
    assert weights(choice) == [[0.625, 0.0], [0.8889, 0.0]]
    (d_logit_TE,) = torch.autograd.grad(choice.weight_TK.sum(), logit_TE)
    assert d_logit_TE[0, 0] > 0.1


def test_a_ramped_second_weight_rises_from_zero_at_the_threshold() -> None:
    def second_weight(threshold: float) -> float:
        return weights(rules.gap(scores(), torch.tensor(threshold), True, "ramp", 0.5))[0][1]

    assert second_weight(0.25) == pytest.approx(0.0, abs=1e-4)
    assert second_weight(1 / 3) == pytest.approx(0.375 / 2, abs=1e-3)  # half way: (1/3 - 1/4) / (0.5 / 3) = 1/2
    assert second_weight(0.5) == pytest.approx(0.375, abs=1e-4)


def test_top_p_goes_on_until_the_mass_is_reached() -> None:
    assert experts(rules.top_p(scores(), torch.tensor(0.75), 3)) == [[0, 1, NONE], [3, NONE, NONE]]
    assert experts(rules.top_p(scores(), torch.tensor(0.85), 3)) == [[0, 1, 2], [3, 1, NONE]]


def test_gshard_draws_the_second_in_proportion_to_twice_its_share() -> None:
    torch.manual_seed(0)
    many = scores(PROBS[1:].expand(20_000, -1))  # share of the second is 1/9, so its chance is 2/9
    share = (rules.gshard(many, True, "keep").expert_TK[:, 1] != NONE).float().mean()
    assert float(share) == pytest.approx(2 / 9, abs=0.01)


def test_gshard_does_not_draw_at_evaluation() -> None:
    choice = rules.gshard(scores(), False, "pair")  # chances 3/4 and 2/9
    assert experts(choice) == [[0, 1], [3, NONE]]
    assert weights(choice) == [[0.625, 0.375], [0.8889, 0.0]]


def test_null_experts_leave_slots_unused() -> None:
    with_two_idle = scores(torch.tensor([[0.3, 0.1, 0.1, 0.1, 0.35, 0.05], [0.4, 0.3, 0.1, 0.1, 0.05, 0.05]]))
    choice = rules.null_experts(with_two_idle, 2, num_experts=4)
    assert experts(choice) == [[NONE, 0], [0, 1]]
    assert weights(choice) == [[0.0, 0.3], [0.4, 0.3]]


def test_a_mask_may_take_any_number_of_experts_or_none() -> None:
    taken = torch.tensor([[True, False, True, False], [False] * 4])
    choice = rules.by_mask(taken, PROBS)
    assert experts(choice) == [[0, NONE, 2, NONE], [NONE] * 4]
    assert weights(choice) == [[0.5, 0.0, 0.15, 0.0], [0.0] * 4]


def test_expert_choice_gives_every_expert_its_best_tokens() -> None:
    taken, cutoff = rules.best_tokens(PROBS, mean_experts=2)  # 2 tokens * 2 / 4 experts = 1 token each
    assert taken.tolist() == [[True, True, True, False], [False, False, False, True]]
    assert cutoff.tolist() == pytest.approx([0.5, 0.3, 0.15, 0.8])


def test_only_the_best_groups_may_be_chosen_from() -> None:
    two_groups = rules.within_groups(PROBS, num_groups=2, groups_per_token=1, group_score="top2_sum")
    assert two_groups.isinf().tolist() == [[False, False, True, True], [True, True, False, False]]
    lopsided = torch.tensor([[0.4, 0.0, 0.3, 0.3]])  # the best expert, against the best pair
    assert rules.within_groups(lopsided, 2, 1, "max").isinf().tolist() == [[False, False, True, True]]
    assert rules.within_groups(lopsided, 2, 1, "top2_sum").isinf().tolist() == [[True, True, False, False]]
