"""An exchange between machines comes in rounds, whatever the counts, and bit for bit as gloo's own."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moestro.dist.layout import Layout
from moestro.dist.mesh import LEAST_BYTES, ROUND_BYTES, ROUNDS, Axis, Flow, Mesh, on_this_machine, part_rows
from moestro.dist.testing import run_on_ranks

ROWS_RR = [[3, 900, 0], [1, 0, 0], [700, 260, 5]]
"""From rank to rank; of 1 KB."""


def axis_of(ranks: int, on_a_machine: int) -> Axis:
    own = dist.get_rank()
    os.environ |= {"LOCAL_WORLD_SIZE": str(on_a_machine), "LOCAL_RANK": str(own % on_a_machine)}
    return Mesh(Layout(dp_shard=ranks, ep=ranks), torch.device("cpu"))["ep"]


def exchanged(axis: Axis, beside: bool) -> tuple[list[Tensor], list[Tensor], int]:
    """Two exchanges under way at once, the same by gloo, and how many messages were announced before any wait."""
    own, announced, announce = axis.index, [], dist.irecv
    send, receive = ROWS_RR[own], [row[own] for row in ROWS_RR]
    torch.manual_seed(own)
    wide_NX, narrow_N = torch.randn(sum(send), 256), torch.randn(sum(send))
    dist.irecv = lambda *given: announced.append(given) or announce(*given)  # type: ignore[assignment,func-returns-value]
    pending = [axis.begin_swap(rows, send, receive, beside) for rows in (wide_NX, narrow_N)]
    at_once = len(announced)
    found = [one.wait() for one in pending]
    raw = [rows.new_empty(sum(receive), *rows.shape[1:]) for rows in (wide_NX, narrow_N)]
    for out, rows in zip(raw, (wide_NX, narrow_N), strict=True):
        dist.all_to_all_single(out, rows, receive, send)
    return found, raw, at_once


def check_rounds(on_a_machine: int, beside: bool) -> int:
    found, raw, at_once = exchanged(axis_of(3, on_a_machine), beside)
    assert all(ours.equal(gloos) for ours, gloos in zip(found, raw, strict=True))
    return at_once


@pytest.mark.parametrize(
    ("on_a_machine", "beside", "at_once"),
    [
        (1, False, [5, 6, 0]),  # rank 0: 1 + 2 of 6 parts, rank 1: 2 of 8 + 2 of 3; and 2 narrow ones each
        (1, True, [4, 4, 0]),
        (3, False, [4, 4, 0]),
    ],
)
def test_rows_from_other_machines_are_asked_for_two_rounds_ahead(
    on_a_machine: int, beside: bool, at_once: list[int]
) -> None:
    assert run_on_ranks(check_rounds, on_a_machine, beside, ranks=3) == at_once


def test_parts_are_neither_too_small_nor_too_many() -> None:
    row_X = torch.zeros(1, 256)
    assert part_rows(row_X.expand(10_000, -1), 2) * 1024 >= 10_000 * 1024 / ROUNDS
    assert part_rows(row_X.expand(500, -1), 2) * 1024 == ROUND_BYTES
    assert part_rows(row_X.expand(500, -1), 1000) * 1024 == LEAST_BYTES
    assert part_rows(torch.zeros(3, 2**20), 9) == 1  # a row is never cut


def check_machine() -> range:
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(dist.get_rank() % 2)}
    return on_this_machine()


def test_ranks_of_a_machine_are_the_ones_its_launcher_has_started() -> None:
    assert run_on_ranks(check_machine, ranks=4) == [range(2), range(2), range(2, 4), range(2, 4)]


def test_a_flow_follows_faster_exchanges_at_once_and_slower_ones_slowly() -> None:
    flow = Flow()
    flow.saw(1e6, 1.0)
    assert flow.bytes_per_s == 1e6
    flow.saw(4e6, 1.0)
    flow.saw(1e6, 1.0)
    assert flow.bytes_per_s == pytest.approx(3.6e6)


def check_ahead(bytes_per_s: float) -> int:
    axis = axis_of(3, 1)
    axis.flow.bytes_per_s = bytes_per_s
    return exchanged(axis, False)[2]


def test_links_known_to_be_fast_are_asked_for_all_at_once() -> None:
    assert run_on_ranks(check_ahead, 1e9, ranks=3) == [9, 13, 0]
