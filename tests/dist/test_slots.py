"""Experts in slots: who serves which token, what a dispatch sends, and moves that lose nothing."""

import numpy as np
import pytest
import torch
from torch import Tensor

from moestro.dist.slots import assign, table_of

CPU = torch.device("cpu")


def table(holders: list[list[int]], shares: list[list[float]], slots: int, ranks: int = 2):  # type: ignore[no-untyped-def]
    """Experts by their holders, in order of ranks."""
    held_ER = torch.zeros(len(holders), ranks, dtype=torch.bool)
    most = max(map(len, holders))
    share_EP = torch.zeros(len(holders), most)
    for expert, (held, share) in enumerate(zip(holders, shares, strict=True)):
        held_ER[expert, held] = True
        share_EP[expert, : len(share)] = torch.tensor(share)
    return table_of(assign(held_ER, torch.full((ranks, slots), -1)), share_EP, CPU)


def test_without_replicas_every_expert_has_its_slot() -> None:
    plain = table([[1], [0], [1]], [[1.0]] * 3, slots=2)
    assert plain.expert_RS.tolist() == [[1, -1], [0, 2]]
    assert plain.slots(torch.tensor([[0, 1], [2, 3]])).tolist() == [[2, 0], [3, 4]]  # 3 and 4 mark unused choices


def test_a_share_of_the_tokens_in_order_goes_to_each_holder() -> None:
    shared = table([[0, 1], [1]], [[0.25, 0.75], [1.0]], slots=2)
    chosen = torch.tensor([[0], [1], [0], [0], [2], [0]])
    assert shared.slots(chosen).flatten().tolist() == [0, 3, 2, 2, 4, 2]


def test_shares_are_kept_to_half_a_token_and_all_tokens_are_served() -> None:
    shared = table([[0, 1, 2], [1], [2]], [[0.2, 0.5, 0.3], [1.0], [1.0]], slots=2, ranks=3)
    for tokens in range(12):
        slot_T = shared.slots(torch.zeros(tokens, 1, dtype=torch.int64)).flatten()
        served = torch.bincount(slot_T // 2, minlength=3)
        assert int(served.sum()) == tokens
        assert all(abs(int(n) - share * tokens) <= 1.0 for n, share in zip(served, (0.2, 0.5, 0.3), strict=True))


def test_who_stays_keeps_its_slot() -> None:
    before = torch.tensor([[4, 1, -1], [0, 2, 3]])
    held_ER = torch.zeros(5, 2, dtype=torch.bool)
    held_ER[[1, 3, 4], 0] = True
    held_ER[[0, 2, 4], 1] = True  # 3 leaves rank 1 for rank 0; 4 gets a second holder
    assert assign(held_ER, before).tolist() == [[4, 1, 3], [0, 2, 4]]
