"""Grouping by expert is stable, drops nothing, and both directions are exact, forward and backward."""

import pytest
import torch

from moestro.nn import permute
from moestro.nn.kernels import cpu
from moestro.nn.permute import combine_rows, gather_rows, pairs_of, sort_by_expert

EXPERT_TK = torch.tensor([[2, 0], [3, 2], [3, 3], [0, 3]])
"""Three experts, so 3 marks an unused slot; expert 1 gets nothing, token 2 has no expert."""


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(cpu, "library", lambda: None)
    elif cpu.library() is None:
        pytest.skip(cpu.why_not())


def test_rows_are_grouped_and_keep_their_order() -> None:
    order = sort_by_expert(EXPERT_TK, 3)
    assert order.count_E.tolist() == [2, 0, 2]
    assert order.source_N.tolist() == [1, 6, 0, 3]
    assert order.token_N.tolist() == [0, 3, 0, 1]
    assert order.slot_TK.tolist() == [[2, 0], [-1, 3], [-1, -1], [1, -1]]


def test_gather_and_combine_are_each_others_gradient() -> None:
    order = sort_by_expert(EXPERT_TK, 3)
    x_TD = torch.arange(8.0).view(4, 2).requires_grad_()
    x_ND = gather_rows(x_TD, order)
    assert x_ND.tolist() == [[0, 1], [6, 7], [0, 1], [2, 3]]
    y_TD = combine_rows(x_ND * torch.tensor([[1.0], [10], [100], [1000]]), order)
    assert y_TD.tolist() == [[0, 101], [2000, 3000], [0, 0], [60, 70]]
    y_TD.sum().backward()
    assert x_TD.grad is not None
    assert x_TD.grad[:, 0].tolist() == [101, 1000, 0, 10]


def test_no_rows_at_all() -> None:
    order = sort_by_expert(torch.full((3, 2), 3), 3)
    assert combine_rows(gather_rows(torch.ones(3, 4), order), order).tolist() == [[0.0] * 4] * 3


def test_the_module_has_no_other_way_around_the_kernels() -> None:
    assert permute.cpu is cpu  # the fixture's patch reaches it


def test_pairs_are_counted_once_and_unused_slots_ignored() -> None:
    expert_TK = torch.tensor([[0, 1, 3], [1, 0, 3], [2, 3, 3], [1, 2, 0]])
    assert pairs_of(expert_TK, 3).tolist() == [3, 1, 1]  # (0, 1), (0, 2), (1, 2)
