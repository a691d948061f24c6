"""`plan.network` against cases one can do in the head."""

from dataclasses import replace

import numpy as np
import pytest

from moestro.plan.constants import PRIORS, Constants
from moestro.plan.machine import Level, Machine
from moestro.plan.network import collective_s, exchange_s, message_s

PLAIN = replace(
    Constants(**{name: prior.mean for name, prior in PRIORS.items()}),
    inside_share=1.0,
    across_share=1.0,
    congestion=0.0,
    collective_s=0.0,
    hop_inside_s=0.0,
    hop_across_s=0.0,
    alltoall_inside=1.0,
    alltoall_across=1.0,
    dispatch_inside=1.0,
    dispatch_across=1.0,
    exchange_s=0.0,
)
HOSTS = Machine(
    bf16_flops_per_s=1e15,
    matmul_flops_per_s=1e15,
    peak_flops_per_s=1e15,
    memory_bytes_per_s=1e12,
    memory_bytes=1e11,
    tile=256,
    wave=4e6,
    levels=(Level(devices=8, bytes_per_s=400e9), Level(devices=np.inf, bytes_per_s=50e9)),
)


def test_a_lone_rank_sends_nothing() -> None:
    assert collective_s(1e9, 1, 1, HOSTS, PLAIN) == 0
    assert exchange_s(1e9, 1, 8, HOSTS, PLAIN, 0.0) == 0


def test_inside_a_host_the_inner_links_count() -> None:
    assert collective_s(8e9, 8, 1, HOSTS, PLAIN) == pytest.approx(7 / 8 * 8e9 / 400e9)


def test_ranks_a_host_apart_use_the_outer_links_alone() -> None:
    assert collective_s(8e9, 4, 8, HOSTS, PLAIN) == pytest.approx(3 / 4 * 8e9 / 50e9)


def test_two_full_hosts_share_their_cards() -> None:
    """Eight cards a host carry an eighth of the payload each; the slower level counts (a smooth maximum)."""
    across, inside = 1 / 2 * 16e9 / 8 / 50e9, 7 / 8 * 16e9 / 400e9
    assert max(across, inside) <= collective_s(16e9, 16, 1, HOSTS, PLAIN) <= 2**0.25 * max(across, inside)


def test_ring_latency_grows_with_ranks_and_tree_latency_with_their_logarithm() -> None:
    slow = replace(PLAIN, hop_across_s=1e-6, hop_inside_s=1e-6)
    assert collective_s(0.0, 64, 8, HOSTS, slow) == pytest.approx(63e-6)
    assert collective_s(0.0, 64, 8, HOSTS, slow, tree=1.0) == pytest.approx(12e-6)


def test_deduplication_sends_a_token_to_each_host_once() -> None:
    """Eight choices over 2 hosts: plainly half of the copies cross; at best 2 (1 - 1/2^8) of 8, half of which stay."""
    payload = 8e9
    plain = exchange_s(payload, 16, 8, HOSTS, PLAIN, 0.0)
    smart = exchange_s(payload, 16, 8, HOSTS, PLAIN, 1.0)
    assert plain == pytest.approx(payload / 2 / 50e9, rel=0.01)
    assert smart == pytest.approx(payload * 2 * (1 - 0.5**8) / 8 / 2 / 50e9, rel=0.05)


def test_a_message_takes_the_lowest_level_that_joins_its_ends() -> None:
    near, far = message_s(1e9, 4, HOSTS, PLAIN), message_s(1e9, 64, HOSTS, PLAIN)
    assert near == pytest.approx(1e9 / 400e9, rel=0.01)
    assert far == pytest.approx(1e9 / 50e9, rel=0.01)


@pytest.mark.parametrize("ranks", [2, 16, 512])
def test_columns_and_single_numbers_agree(ranks: int) -> None:
    column = collective_s(np.array([1e8, 1e9]), np.array([2, ranks]), 1, HOSTS, PLAIN)
    assert column[1] == pytest.approx(float(collective_s(1e9, ranks, 1, HOSTS, PLAIN)))
