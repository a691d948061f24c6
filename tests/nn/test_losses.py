"""Every loss against a value by hand, and its gradient against finite differences in float64."""

import math

import pytest
import torch
from torch import Tensor

from moestro.nn import losses
from moestro.nn.routing_rules import pair_gap


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_balance_is_one_when_even_and_the_number_of_experts_when_collapsed() -> None:
    even = torch.full((6, 4), 0.25)
    assert float(losses.balance_loss(even, torch.full((4,), 3.0))) == pytest.approx(1.0)
    one = torch.tensor([[1.0, 0, 0, 0]]).expand(6, -1)
    assert float(losses.balance_loss(one, torch.tensor([6.0, 0, 0, 0]))) == pytest.approx(4.0)


def test_sequences_are_balanced_one_by_one() -> None:
    expert_TK = torch.tensor([[0], [0], [1], [1]])  # even over the batch, lopsided in each sequence
    prob_TE = torch.nn.functional.one_hot(expert_TK[:, 0], 2).float()
    assert float(losses.sequence_balance_loss(prob_TE, expert_TK, sequences=2)) == pytest.approx(2.0)
    assert float(losses.sequence_balance_loss(prob_TE, expert_TK, sequences=1)) == pytest.approx(1.0)


def test_unused_slots_do_not_count() -> None:
    counts = losses.sequence_counts(torch.tensor([[0, 3], [1, 3], [2, 0], [3, 3]]), sequences=2, num_experts=3)
    assert counts.tolist() == [[1, 1, 0], [1, 0, 1]]


def test_z_loss_is_the_squared_log_partition() -> None:
    assert float(losses.z_loss(torch.zeros(3, 8))) == pytest.approx(math.log(8) ** 2)


def test_entropy_of_an_undecided_router() -> None:
    assert float(losses.mean_entropy(torch.full((3, 8), 1 / 8))) == pytest.approx(math.log(8))
    assert float(losses.mean_entropy(torch.eye(8))) == pytest.approx(0.0, abs=1e-6)


def test_sparsity_charges_busy_experts_more() -> None:
    weight_TE = torch.tensor([[2.0, 1.0], [2.0, 0.0]])
    # f = E count / (T k) = [2, 1]; mean weights [2, 0.5]; mean of products over experts
    assert float(losses.sparsity_loss(weight_TE, torch.tensor([2.0, 1.0]), mean_experts=1)) == pytest.approx(
        (4 + 0.5) / 2
    )


def test_token_loss_of_a_uniform_guess() -> None:
    assert float(losses.token_loss(torch.zeros(5, 10), torch.arange(5))) == pytest.approx(math.log(10))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: losses.balance_loss(x.softmax(-1), torch.tensor([3.0, 1, 0, 2])),
        lambda x: losses.sequence_balance_loss(x.softmax(-1), torch.tensor([[0, 1], [0, 4], [2, 3], [1, 0]]), 2),
        losses.z_loss,
        lambda x: losses.sparsity_loss(x.relu(), torch.tensor([3.0, 1, 0, 2]), 2.0),
        lambda x: losses.mean_entropy(x.softmax(-1)),
        lambda x: torch.nn.functional.cross_entropy(x, torch.tensor([0, 3, 1, 1])),
        lambda x: pair_gap(x[:, :2].sort(descending=True).values, logits=True).sum(),
        lambda x: pair_gap(x[:, :2].softmax(-1).sort(descending=True).values, logits=False).sum(),
    ],
    ids=["balance", "sequence", "z", "sparsity", "entropy", "token", "gap of logits", "gap of scores"],
)
def test_gradients_equal_finite_differences(loss: object) -> None:
    assert torch.autograd.gradcheck(loss, (logits(4, 4),))
