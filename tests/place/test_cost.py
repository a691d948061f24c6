"""`place.cost`: seconds one can do in the head, and bytes equal to a token-by-token count."""

from dataclasses import replace

import numpy as np
import pytest
from parks import layer, park, skewed

from moestro.cluster.links import links_of
from moestro.core.errors import PlacementError
from moestro.place.cost import (
    Placement,
    TokenSet,
    even_split,
    exchange_bytes,
    move_bytes,
    slots_that_fit,
    step_time,
    sync_bytes,
)
from moestro.place.solve import solve, split

HERE = np.array([[100.0, 0], [0, 100.0]])


def link(case, name):  # type: ignore[no-untyped-def]
    return case.links.names.index(name)


def test_local_tokens_cost_compute_only() -> None:
    case = layer(park(2, 1), HERE, 1)
    time = step_time(case, even_split(case.held_EG))
    assert time.exchange_s == 0
    assert time.compute_s == pytest.approx(3 * 100 / 1e6)


def test_the_busiest_link_sets_the_exchange() -> None:
    case = layer(park(2, 1, card=10, slow=1), HERE[::-1], 1)
    time = step_time(case, even_split(case.held_EG))
    assert time.exchange_s == pytest.approx(4 * 100 * 1e4 / 1e9)


def test_a_crowded_network_slows_exchanges_and_nothing_else() -> None:
    free = layer(park(2, 1, card=10, slow=1), HERE[::-1], 1, gradient_bytes=1e6)
    crowded = replace(free, links=links_of(replace(park(2, 1, card=10, slow=1), crowding=1.25), 2))
    held_EG = np.ones((2, 2), bool)
    once, more = (step_time(case, even_split(held_EG)) for case in (free, crowded))
    assert more.exchange_s == pytest.approx(1.25 * once.exchange_s)
    assert once.exchange_s > 0
    assert (more.compute_s, more.sync_s) == (once.compute_s, once.sync_s)
    assert solve(crowded).time.exchange_s == pytest.approx(1.25 * solve(free).time.exchange_s)


def test_replicas_pay_for_gradients_and_new_ones_for_moving() -> None:
    case = layer(park(2, 1), HERE, 2, gradient_bytes=1e6, state_bytes=8e6)
    held_EG = np.array([[True, True], [False, True]])
    out = link(case, "host0.out")
    assert sync_bytes(case, held_EG)[out] == 1e6
    assert move_bytes(case, held_EG)[out] == 8e6
    assert step_time(case, even_split(held_EG)).move_s == pytest.approx(8e6 / 10e9 / 100)


def dispatched_bytes(
    case, placement: Placement, expert_TK: np.ndarray, source_T: np.ndarray, merge: bool
) -> np.ndarray:  # type: ignore[no-untyped-def]
    """A dispatcher in slow motion: every token's copies walk their routes; one copy per host where merged."""
    links = case.links
    counted_L = np.zeros(len(links.names))
    for source, expert_K in zip(source_T, expert_TK, strict=True):
        hosts_seen = set()
        for expert in expert_K:
            device = placement.device_EP[expert, np.argmax(placement.share_AEP[placement.group_S[source], expert])]
            for place in links.route_GGR[source, device]:
                if place < 0 or (merge and links.above_L[place] and links.host_G[device] in hosts_seen):
                    continue
                counted_L[place] += case.token_bytes
            hosts_seen.add(links.host_G[device])
    return counted_L


@pytest.mark.parametrize("merge", [False, True])
def test_bytes_equal_a_count_of_every_copy(merge: bool) -> None:
    rng = np.random.default_rng(0)
    cluster, experts = park(2, 2), 6
    source_T = np.repeat(np.arange(4), 50)
    expert_TK = np.array([rng.choice(experts, 2, replace=False) for _ in source_T])
    token_SE = np.zeros((4, experts))
    np.add.at(token_SE, (np.repeat(source_T, 2), expert_TK.ravel()), 1)
    host_T = source_T // 2
    kinds, count_X = np.unique(np.column_stack([host_T, np.sort(expert_TK)]), axis=0, return_counts=True)
    sets = [TokenSet(int(h), (int(a), int(b)), float(n)) for (h, a, b), n in zip(kinds, count_X, strict=True)]
    case = layer(cluster, token_SE, 2, sets=sets if merge else ())
    whole = even_split(case.held_EG)  # one holder each: shares are whole and every token's way is known
    expected_L = dispatched_bytes(case, whole, expert_TK, source_T, merge)
    np.testing.assert_allclose(exchange_bytes(case, whole), expected_L)


def test_a_split_sends_every_token_once() -> None:
    case = layer(park(2, 2), skewed(4, 6), 6)
    placement = split(case, np.ones((6, 4), bool))
    assert placement.flow_SG(case.token_SE).sum() == pytest.approx(case.token_SE.sum())
    np.testing.assert_allclose(placement.share_AEP.sum(axis=2), 1)


def test_more_replicas_than_slots_are_refused() -> None:
    with pytest.raises(PlacementError, match="device 0 holds 6 replicas and has 3 slots"):
        split(layer(park(2, 2), skewed(4, 6), 3), np.ones((6, 4), bool))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_SE": np.ones((3, 2))}, "counts tokens of 3 ranks, the cluster has 2 devices"),
        ({"token_SE": np.array([[1, np.nan], [1, 1]])}, "not finite"),
        ({"held_EG": np.ones((5, 2), bool)}, "belongs to another model or cluster"),
        ({"slot_G": np.array([1, 0])}, "1 slots cannot hold 2 experts"),
        ({"tokens_per_s_G": np.array([1.0, -1.0])}, "speed is not above 0"),
    ],
)
def test_wrong_layers_are_refused_in_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        replace(layer(park(2, 1), HERE, 1), **changes)  # type: ignore[arg-type]


def test_memory_is_a_limit() -> None:
    links = links_of(park(2, 1))
    assert slots_that_fit(links, 30 * 2.0**30, 10 * 2.0**30).tolist() == [2, 2]
    with pytest.raises(PlacementError, match=r"has 80\.0 GiB, one replica and the rest need 100\.0 GiB"):
        slots_that_fit(links, 90 * 2.0**30, 10 * 2.0**30)
