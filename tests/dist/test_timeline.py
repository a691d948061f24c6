"""A step's time is told apart into own work, messages, and waiting for ranks that come late."""

import time

import pytest
import torch

from moestro.dist.layout import Layout
from moestro.dist.mesh import Mesh
from moestro.dist.testing import run_on_ranks
from moestro.dist.timeline import CLOCK, PARTS, Spent, agree

LATE_S = 0.06


def two_sums_for_which_another_rank_is_late() -> tuple[list[Spent], float]:
    """Rank 1 is late for the first message, rank 0 for the second."""
    mesh = Mesh(Layout(dp_shard=2), torch.device("cpu"))
    mesh["world"].sum(torch.ones(1))  # before the step: not counted
    CLOCK.begin()
    begun_s = time.perf_counter()
    time.sleep(LATE_S * mesh.rank)
    with CLOCK.during("exchange"):
        mesh["dp"].sum(torch.ones(1))
    time.sleep(LATE_S * (1 - mesh.rank))
    mesh["world"].sum(torch.ones(1))
    CLOCK.end(7)
    wall_s = time.perf_counter() - begun_s
    mesh["world"].sum(torch.ones(1))  # after it
    return agree(CLOCK, mesh), wall_s


def test_who_is_late_works_and_the_others_are_idle() -> None:
    (spent, wall_0_s), (same, wall_1_s) = run_on_ranks(two_sums_for_which_another_rank_is_late, ranks=2)
    assert [one.step for one in spent] == [7]
    torch.testing.assert_close(spent[0].second_WP, same[0].second_WP, rtol=0, atol=0)
    for part in ("compute", "idle"):
        assert spent[0].of(part) == pytest.approx([LATE_S, LATE_S], rel=0.5)
    assert max(spent[0].of("exchange") + spent[0].of("reduction")) < LATE_S / 2
    assert spent[0].second_WP.sum(1).tolist() == pytest.approx([wall_0_s, wall_1_s], abs=2e-3)


def wait_for_a_sum_that_runs_beside_work() -> list[Spent]:
    mesh = Mesh(Layout(dp_shard=2), torch.device("cpu"))
    CLOCK.begin()
    pending = mesh["dp"].begin_sum(torch.ones(1))
    time.sleep(LATE_S)
    assert pending.wait().item() == 2
    CLOCK.end(1)
    return agree(CLOCK, mesh)


def test_a_message_beside_work_costs_only_what_is_waited_for_it() -> None:
    spent = run_on_ranks(wait_for_a_sum_that_runs_beside_work, ranks=2)[0][0]
    assert min(spent.of("compute")) >= LATE_S
    assert spent.second_WP[:, 1:].sum() < LATE_S / 2
    assert PARTS[0] == "compute"
