"""The placement of a layer as a mixed-integer linear programme, for HiGHS.

    min  t_link + t_device + t_sync + t_move
    x_EG in {0,1} holders     f_AEG >= 0 shares, summing to 1 over G, at most x
    t_link >= load of every link,  t_device >= load of every device, and so on
    token sets: y_TKH share of a set's tokens for one of its experts served on H, u_TH >= y: copies that cross

Dimension key:  V variables   C rows   others as in `state`
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from moestro.place.state import Fixed, Floats, Ints


@dataclass(frozen=True, kw_only=True)
class Programme:
    """min cost_V @ v  with  low_C <= rows @ v <= high_C,  low_V <= v <= most_V."""

    cost_V: Floats
    rows: Any
    """Sparse [C, V]."""
    low_C: Floats
    high_C: Floats
    most_V: Floats
    low_V: Floats
    whole_V: Ints
    """0 broken, 1 whole hosts (`tighten`), 2 whole devices: an exact answer needs both."""


EXACT = 2
"""The highest level of `whole_V`."""
FOUND, IMPOSSIBLE = 0, 2
"""Of SciPy's status: proven best, and no answer exists."""


def solve_programme(model: Programme, level: int, limit_s: float, gap: float = 1e-4) -> Any:
    """SciPy's `milp` result, variables up to `level` whole."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    with _silent():
        return milp(
            model.cost_V,
            constraints=LinearConstraint(model.rows, model.low_C, model.high_C),
            integrality=((model.whole_V > 0) & (model.whole_V <= level)).astype(int),
            bounds=Bounds(model.low_V, model.most_V),
            options={"time_limit": max(limit_s, 0.01), "mip_rel_gap": gap},
        )


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS writes a line of its debugging to the process's stdout now and then; callers print JSON there."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


class Rows:
    """Sparse rows, collected as arrays."""

    def __init__(self) -> None:
        self.parts: list[tuple[Ints, Ints, Floats]] = []
        self.low: list[Floats] = []
        self.high: list[Floats] = []
        self.count = 0

    def add(self, row: Any, column: Any, value: Any, low: Any, high: Any) -> None:
        """Entries of a block of rows numbered from 0, with their limits (one per row)."""
        row = np.asarray(row, np.int64)
        value = np.broadcast_to(np.asarray(value, float), row.shape)
        self.parts.append((row + self.count, np.asarray(column, np.int64), value))
        low, high = np.atleast_1d(np.asarray(low, float)), np.atleast_1d(np.asarray(high, float))
        self.low.append(low)
        self.high.append(high)
        self.count += len(low)

    def matrix(self, columns: int) -> Any:
        """All rows."""
        from scipy.sparse import coo_matrix

        row, column, value = (np.concatenate([part[i] for part in self.parts]) for i in range(3))
        return coo_matrix((value, (row, column)), shape=(self.count, columns)).tocsr()


def build(fixed: Fixed) -> Programme:
    """The programme of a layer."""
    sources, devices, _ = fixed.route_AGR.shape
    experts, links = fixed.token_AE.shape[1], len(fixed.link_cost_L)
    holders, shares = experts * devices, sources * experts * devices
    share_AEG = holders + np.arange(shares).reshape(sources, experts, devices)
    t_link, t_device, t_sync, t_move = (holders + shares + i for i in range(4))
    rows = Rows()
    _assignment(rows, fixed, share_AEG)
    _link_rows(rows, fixed, share_AEG, t_link)
    source, expert, device = (part.ravel() for part in np.indices(share_AEG.shape))
    load = fixed.token_AE[source, expert] * fixed.device_cost_G[device]
    _at_most(rows, device, share_AEG.ravel(), load, t_device, devices)
    _holding_rows(rows, fixed, t_sync, t_move)
    variables = holders + shares + 4
    if fixed.dedup:
        variables = variables + _set_rows(rows, fixed, share_AEG, t_link)
    cost_V, most_V, whole_V = np.zeros(variables), np.ones(variables), np.zeros(variables, np.int64)
    cost_V[t_link : t_move + 1] = 1.0
    most_V[t_link : t_move + 1] = np.inf
    whole_V[:holders] = 2
    assert links
    low_C, high_C = np.concatenate(rows.low), np.concatenate(rows.high)
    return Programme(
        cost_V=cost_V,
        rows=rows.matrix(variables),
        low_C=low_C,
        high_C=high_C,
        most_V=most_V,
        low_V=np.zeros(variables),
        whole_V=whole_V,
    )


def _assignment(rows: Rows, fixed: Fixed, share_AEG: Ints) -> None:
    """Shares sum to 1 and need a holder; slots; every expert somewhere."""
    sources, experts, devices = share_AEG.shape
    pairs = sources * experts
    rows.add(np.repeat(np.arange(pairs), devices), share_AEG.ravel(), 1.0, np.ones(pairs), np.ones(pairs))
    number = np.arange(share_AEG.size)
    _, expert, device = (part.ravel() for part in np.indices(share_AEG.shape))
    holder = expert * devices + device
    rows.add(
        np.concatenate([number, number]),
        np.concatenate([share_AEG.ravel(), holder]),
        np.concatenate([np.ones(len(number)), -np.ones(len(number))]),
        np.full(len(number), -np.inf),
        np.zeros(len(number)),
    )
    expert, device = (part.ravel() for part in np.indices((experts, devices)))
    rows.add(device, expert * devices + device, 1.0, np.zeros(devices), fixed.slot_G.astype(float))
    rows.add(expert, expert * devices + device, 1.0, np.ones(experts), np.full(experts, np.inf))


def _at_most(rows: Rows, row: Ints, column: Ints, load: Floats, top: int, count: int) -> None:
    """Sum of load x variable <= top, for rows 0..count-1."""
    rows.add(
        np.concatenate([row, np.arange(count)]),
        np.concatenate([column, np.full(count, top)]),
        np.concatenate([load, -np.ones(count)]),
        np.full(count, -np.inf),
        np.zeros(count),
    )


def _link_rows(rows: Rows, fixed: Fixed, share_AEG: Ints, t_link: int) -> None:
    """Links that carry every copy; those above hosts come with the sets where tokens travel once."""
    source, device, place = np.nonzero((fixed.route_AGR >= 0) & (fixed.part_AGR == 1.0))
    link, experts = fixed.route_AGR[source, device, place], fixed.token_AE.shape[1]
    link_X = np.repeat(link, experts)
    load_X = (fixed.token_AE[source] * fixed.link_cost_L[link][:, None]).ravel()
    if not fixed.dedup:
        _at_most(rows, link_X, share_AEG[source, :, device].ravel(), load_X, t_link, len(fixed.link_cost_L))
        return
    plain, row_X = np.unique(link_X, return_inverse=True)
    _at_most(rows, row_X, share_AEG[source, :, device].ravel(), load_X, t_link, len(plain))


def _holding_rows(rows: Rows, fixed: Fixed, t_sync: int, t_move: int) -> None:
    """Gradients between a replica and its home; copies of new replicas."""
    experts, devices = fixed.nearest_EG.shape
    links = len(fixed.link_cost_L)
    expert, device = (part.ravel() for part in np.indices((experts, devices)))
    holder, home, nearest = expert * devices + device, fixed.home_E[expert], fixed.nearest_EG[expert, device]
    both = np.concatenate([fixed.pair_route_GGR[device, home], fixed.pair_route_GGR[home, device]], axis=1)
    copied = np.where(nearest[:, None] >= 0, fixed.pair_route_GGR[nearest, device], -1)
    for route, cost_L, top in ((both, fixed.sync_cost_L, t_sync), (copied, fixed.move_cost_L, t_move)):
        number, place = np.nonzero(route >= 0)
        link = route[number, place]
        if cost_L.any():
            _at_most(rows, link, holder[number], cost_L[link], top, links)


def set_columns(fixed: Fixed) -> tuple[Ints, Ints, Ints, Ints]:
    """Variables of token sets: copy_TH, served_XH; and the set and the expert of every X."""
    sources, devices, _ = fixed.route_AGR.shape
    first = fixed.token_AE.shape[1] * devices * (1 + sources) + 4
    hosts = len(fixed.upper_HHR)
    kind_X, place_X = np.nonzero(fixed.type_expert_TK >= 0)
    expert_X = fixed.type_expert_TK[kind_X, place_X]
    kinds, pairs = len(fixed.type_token_T), len(kind_X)
    copy_TH = first + np.arange(kinds * hosts).reshape(kinds, hosts)
    served_XH = copy_TH.size + first + np.arange(pairs * hosts).reshape(pairs, hosts)
    return copy_TH, served_XH, kind_X, expert_X


def _set_rows(rows: Rows, fixed: Fixed, share_AEG: Ints, t_link: int) -> int:
    """Tokens that cross once per host; returns how many variables that adds."""
    hosts = len(fixed.upper_HHR)
    copy_TH, served_XH, kind_X, expert_X = set_columns(fixed)
    kinds, pairs = copy_TH.shape[0], len(kind_X)
    host_T = np.zeros(kinds, np.int64)
    for expert in range(len(fixed.type_start_EH)):
        for host in range(hosts):
            host_T[fixed.type_of_X[fixed.type_start_EH[expert, host] : fixed.type_stop_EH[expert, host]]] = host
    rows.add(np.repeat(np.arange(pairs), hosts), served_XH.ravel(), 1.0, np.ones(pairs), np.ones(pairs))
    number = np.arange(served_XH.size)
    rows.add(
        np.concatenate([number, number]),
        np.concatenate([copy_TH[kind_X].ravel(), served_XH.ravel()]),
        np.concatenate([np.ones(len(number)), -np.ones(len(number))]),
        np.zeros(len(number)),
        np.full(len(number), np.inf),
    )
    route_TH = fixed.upper_HHR[host_T]
    kind_A, host_A, hop_A = np.nonzero(route_TH >= 0)
    link = route_TH[kind_A, host_A, hop_A]
    load = fixed.type_token_T[kind_A] * fixed.link_cost_L[link]
    _at_most(rows, link, copy_TH[kind_A, host_A], load, t_link, len(fixed.link_cost_L))
    # what sets send to a host is what sources send to its devices
    tie_X = expert_X * hosts + host_T[kind_X]
    expert, source, device = (part.ravel() for part in np.indices((share_AEG.shape[1], *share_AEG.shape[::2])))
    tie = (expert * hosts + fixed.host_A[source]) * hosts + fixed.host_G[device]
    seen = np.zeros(share_AEG.shape[1] * hosts, bool)
    seen[tie_X] = True
    kept = seen[tie // hosts]
    rows.add(
        np.concatenate([np.repeat(tie_X * hosts, hosts) + np.tile(np.arange(hosts), pairs), tie[kept]]),
        np.concatenate([served_XH.ravel(), share_AEG[source, expert, device][kept]]),
        np.concatenate([np.repeat(fixed.type_token_T[kind_X], hosts), -fixed.token_AE[source, expert][kept]]),
        np.zeros(len(seen) * hosts),
        np.zeros(len(seen) * hosts),
    )
    return copy_TH.size + served_XH.size
