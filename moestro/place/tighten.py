"""Rows that cut off what no whole placement can do; the linear programme spreads an expert thinly over all devices.

    Programme + Box (between which values the slowest link and device lie) -> Programme with more rows

on_EH       whether a host holds an expert, count_EH its replicas there; slots and shares follow
replicas    on a device, an expert brings at most what keeps that device within the box, times whether it is held there;
            likewise on every link; so a hot expert needs ceil(load / most) replicas
both_PH     whether a host holds both experts of a set: a host with C slots can pair an expert with C - 1 others, so
            most sets need copies that cross (products of a row and a variable: Sherali and Adams 1990)

Every row holds for every placement whose times lie in the box.

Dimension key:  V variables   C rows   P pairs of experts in a set   X experts of sets   others as in `state`
"""

from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from moestro.place.programme import Programme, Rows, set_columns
from moestro.place.state import Fixed, Floats, Ints


class Box(NamedTuple):
    """Seconds of a step: limits of the exchange's and the computation's share."""

    link_low: float
    link_high: float
    device_low: float
    device_high: float


class Columns(NamedTuple):
    """Numbers of the variables."""

    share_AEG: Ints
    on_EH: Ints
    count_EH: Ints


def tighten(fixed: Fixed, model: Programme, box: Box) -> Programme:
    """The programme within a box."""
    sources, devices, _ = fixed.route_AGR.shape
    experts, hosts, first = fixed.token_AE.shape[1], len(fixed.upper_HHR), len(model.cost_V)
    holders = experts * devices
    columns = Columns(
        share_AEG=holders + np.arange(sources * holders).reshape(sources, experts, devices),
        on_EH=first + np.arange(experts * hosts).reshape(experts, hosts),
        count_EH=first + experts * hosts + np.arange(experts * hosts).reshape(experts, hosts),
    )
    rows = Rows()
    _host_rows(rows, fixed, columns)
    _device_rows(rows, fixed, columns, box.device_high)
    _link_rows(rows, fixed, columns, box.link_high)
    variables = first + 2 * experts * hosts
    if fixed.dedup:
        variables = _pair_rows(rows, fixed, columns, variables)
    more = variables - first
    low_V, most_V = np.zeros(variables), np.concatenate([model.most_V, np.ones(more)])
    most_V[columns.count_EH] = np.bincount(fixed.host_G, minlength=hosts)
    t_link = holders + sources * holders
    low_V[t_link : t_link + 2] = box.link_low, box.device_low
    most_V[t_link : t_link + 2] = box.link_high, box.device_high
    whole_V = np.concatenate([model.whole_V, np.zeros(more, np.int64)])
    whole_V[columns.on_EH] = whole_V[columns.count_EH] = 1
    return Programme(
        cost_V=np.concatenate([model.cost_V, np.zeros(more)]),
        rows=_stacked(model.rows, rows.matrix(variables)),
        low_C=np.concatenate([model.low_C, *rows.low]),
        high_C=np.concatenate([model.high_C, *rows.high]),
        most_V=most_V,
        low_V=low_V,
        whole_V=whole_V,
    )


def _stacked(upper: Any, lower: Any) -> Any:
    from scipy.sparse import vstack

    upper.resize((upper.shape[0], lower.shape[1]))
    return vstack([upper, lower]).tocsr()


def _sum_rows(rows: Rows, row: Ints, column: Ints, value: Floats | float, top: tuple[Ints, Floats | float]) -> None:
    """Sum of value x variable <= number x another variable, for rows 0..; top = (columns, numbers)."""
    top_column, number = top
    count = len(top_column)
    rows.add(
        np.concatenate([row, np.arange(count)]),
        np.concatenate([column, top_column]),
        np.concatenate([np.broadcast_to(value, row.shape), np.broadcast_to(-np.asarray(number, float), (count,))]),
        np.full(count, -np.inf),
        np.zeros(count),
    )


def _host_rows(rows: Rows, fixed: Fixed, columns: Columns) -> None:
    """count = sum of holders, on <= count, shares on a host <= on, slots of a host, every expert on some host."""
    sources, experts, devices = columns.share_AEG.shape
    hosts = columns.on_EH.shape[1]
    pairs = experts * hosts
    expert, device = (part.ravel() for part in np.indices((experts, devices)))
    rows.add(
        np.concatenate([expert * hosts + fixed.host_G[device], np.arange(pairs)]),
        np.concatenate([expert * devices + device, columns.count_EH.ravel()]),
        np.concatenate([np.ones(len(expert)), -np.ones(pairs)]),
        np.zeros(pairs),
        np.zeros(pairs),
    )
    _sum_rows(rows, np.arange(pairs), columns.on_EH.ravel(), 1.0, (columns.count_EH.ravel(), 1.0))
    source, expert, device = (part.ravel() for part in np.indices(columns.share_AEG.shape))
    row = (source * experts + expert) * hosts + fixed.host_G[device]
    _sum_rows(rows, row, columns.share_AEG.ravel(), 1.0, (np.tile(columns.on_EH.ravel(), sources), 1.0))
    expert, host = (part.ravel() for part in np.indices((experts, hosts)))
    slot_H = np.bincount(fixed.host_G, weights=fixed.slot_G, minlength=hosts)
    rows.add(host, columns.on_EH.ravel(), 1.0, np.zeros(hosts), slot_H)
    rows.add(expert, columns.on_EH.ravel(), 1.0, np.ones(experts), np.full(experts, float(hosts)))


def _device_rows(rows: Rows, fixed: Fixed, columns: Columns, high: float) -> None:
    """What an expert brings to a device <= high x held there; as many replicas as its load needs."""
    devices = columns.share_AEG.shape[2]
    load_EG = fixed.token_AE.sum(axis=0)[:, None] * fixed.device_cost_G
    expert, device = np.nonzero(load_EG > high)
    column = columns.share_AEG[:, expert, device]
    value = fixed.token_AE[:, expert] * fixed.device_cost_G[device]
    row = np.broadcast_to(np.arange(len(expert)), column.shape)
    _sum_rows(rows, row.ravel(), column.ravel(), value.ravel(), (expert * devices + device, high))
    need_E = np.ceil(load_EG.min(axis=1) / high - 1e-6)
    hot = np.flatnonzero(need_E > 1)
    column = hot[:, None] * devices + np.arange(devices)
    row = np.broadcast_to(np.arange(len(hot))[:, None], column.shape)
    rows.add(row.ravel(), column.ravel(), 1.0, need_E[hot], np.full(len(hot), np.inf))


def _link_rows(rows: Rows, fixed: Fixed, columns: Columns, high: float) -> None:
    """What an expert brings to a link from all sources, on its way to one device or to one host, likewise."""
    _, experts, devices = columns.share_AEG.shape
    hosts = columns.on_EH.shape[1]
    source, device, place = np.nonzero((fixed.route_AGR >= 0) & (fixed.part_AGR == 1.0))
    link = fixed.route_AGR[source, device, place]
    column = columns.share_AEG[source, :, device].ravel()
    value = (fixed.token_AE[source] * fixed.link_cost_L[link][:, None]).ravel()
    expert = np.tile(np.arange(experts), len(source))
    for units, unit, held in (
        (devices, device, np.arange(experts)[:, None] * devices + np.arange(devices)),
        (hosts, fixed.host_G[device], columns.on_EH),
    ):
        key = np.repeat(link * units + unit, experts) * experts + expert
        number, row = np.unique(key, return_inverse=True)
        kept = np.bincount(row, weights=value) > high
        new_row = np.cumsum(kept) - 1
        use = kept[row]
        top = held[number[kept] % experts, number[kept] // experts % units]
        _sum_rows(rows, new_row[row[use]], column[use], value[use], (top, high))


def _pair_rows(rows: Rows, fixed: Fixed, columns: Columns, first: int) -> int:
    """Copies of a set >= share + share - both; both <= on; an expert is together with what other slots can hold."""
    experts, hosts = columns.on_EH.shape
    copy_TH, served_XH, kind_X, expert_X = set_columns(fixed)
    at = {(int(kind), int(expert)): x for x, (kind, expert) in enumerate(zip(kind_X, expert_X, strict=True))}
    kind_N, left_N, right_N, key_N = [], [], [], []
    for kind, expert_K in enumerate(fixed.type_expert_TK):
        for one, other in combinations(sorted(int(expert) for expert in expert_K if expert >= 0), 2):
            kind_N.append(kind)
            left_N.append(at[kind, one])
            right_N.append(at[kind, other])
            key_N.append(one * experts + other)
    key_P, pair_N = np.unique(np.asarray(key_N, np.int64), return_inverse=True)
    both_PH = first + np.arange(len(key_P) * hosts).reshape(-1, hosts)
    taken = (served_XH[left_N], served_XH[right_N])
    row = np.arange(len(kind_N) * hosts)
    _sum_rows(
        rows,
        np.concatenate([row, row, row]),
        np.concatenate([taken[0].ravel(), taken[1].ravel(), both_PH[pair_N].ravel()]),
        np.repeat([1.0, 1.0, -1.0], len(row)),
        (copy_TH[kind_N].ravel(), 1.0),
    )
    row = np.arange(both_PH.size)
    for expert_P in (key_P // experts, key_P % experts):
        _sum_rows(rows, row, both_PH.ravel(), 1.0, (columns.on_EH[expert_P].ravel(), 1.0))
    slot_H = np.bincount(fixed.host_G, weights=fixed.slot_G, minlength=hosts)
    expert_2P = np.concatenate([key_P // experts, key_P % experts])
    row = np.concatenate([(expert_2P[:, None] * hosts + np.arange(hosts)).ravel(), np.arange(experts * hosts)])
    column = np.concatenate([both_PH.ravel(), both_PH.ravel(), columns.count_EH.ravel()])
    _sum_rows(rows, row, column, 1.0, (columns.on_EH.ravel(), np.tile(slot_H, experts)))
    return first + both_PH.size
