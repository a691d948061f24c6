"""Measure the network between the ranks of a job, and fit the levels of a cluster to it.

    torchrun ... -m moestro cluster probe --out cluster.toml     (or --ranks N: N ranks on this machine)

Every ordered pair of ranks exchanges a small message (latency) and a large one (bandwidth) while the others are silent.
Then all ranks of a unit send at once to the next unit: what each gets tells how many share a link. One all-to-all of
everybody is timed and compared with what the fitted links predict: their quotient is the crowding.

The only module of `cluster` that needs torch, imported when the probe runs.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moestro.cluster.fit import Fitted, fit_levels
from moestro.cluster.links import links_of
from moestro.cluster.topology import Cluster, DeviceSpec, LevelSpec
from moestro.core.errors import ClusterError

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the ranks measured."""

    rate_RR: Floats
    """GB/s, one pair at a time."""
    latency_RR: Floats
    """Microseconds, half a round trip."""
    crowd: Callable[[list[int]], Floats]
    """GB/s per rank when every rank sends to the rank at its place of the list; called by all ranks together."""
    exchange_s: float
    """Seconds of one all-to-all with `exchange_bytes` from everybody to everybody."""
    exchange_bytes: float


@dataclass(frozen=True, kw_only=True)
class Probed:
    """The fitted cluster, and how far an all-to-all is from it."""

    cluster: Cluster
    fitted: Fitted
    crowding: float
    """Measured over predicted time of an all-to-all; some 1.1 over TCP. The cluster keeps it where it is above 1."""


def measure(payload_bytes: int, repeats: int, swap: Callable[..., Any], say: Callable[[str], None]) -> Measured:
    """Pairwise and collective times in the current process group; every rank returns the same figures.

    swap   exchanges numbers between all ranks as training does: swap(numbers, how many to each, how many from each)
    """
    import torch
    from torch import distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    large, small = torch.zeros(payload_bytes // 4), torch.zeros(1)
    rate_RR, latency_RR = np.zeros((ranks, ranks)), np.zeros((ranks, ranks))
    for source in range(ranks):
        for to in range(ranks):
            dist.barrier()
            if source == to or rank not in (source, to):
                continue
            seconds = [_one_way_s(rank == source, source, to, large, small) for _ in range(repeats)]
            latency_RR[source, to] = 1e6 * min(_round_trip_s(rank == source, source, to, small) / 2 for _ in range(5))
            rate_RR[source, to] = payload_bytes / 1e9 / max(min(seconds), 1e-9)
        if rank == 0:
            say(f"rank {source + 1} of {ranks}")
    for table in (rate_RR, latency_RR):
        for source in range(ranks):
            row = torch.from_numpy(table[source].copy())
            dist.broadcast(row, source)
            table[source] = row.numpy()

    def crowd(partner_R: list[int]) -> Floats:
        return _crowd_rates(partner_R, large, repeats)

    part = max(payload_bytes // 4 // ranks, 1)
    out, parts = torch.zeros(ranks * part), [part] * ranks
    exchange_s = _slowest_s(lambda: swap(out, parts, parts), repeats)
    return Measured(
        rate_RR=rate_RR, latency_RR=latency_RR, crowd=crowd, exchange_s=exchange_s, exchange_bytes=4.0 * part
    )


def _one_way_s(sending: bool, source: int, to: int, large: Any, small: Any) -> float:
    """Seconds until the receiver has the payload and its receipt is back."""
    from torch import distributed as dist

    began = time.perf_counter()
    if sending:
        dist.send(large, to)
        dist.recv(small, to)
    else:
        dist.recv(large, source)
        dist.send(small, source)
    return time.perf_counter() - began


def _round_trip_s(sending: bool, source: int, to: int, small: Any) -> float:
    return _one_way_s(sending, source, to, small, small)


def _slowest_s(work: Callable[[], object], repeats: int) -> float:
    """Median over repeats of the slowest rank's seconds, after one to warm up."""
    import torch
    from torch import distributed as dist

    found = []
    for turn in range(repeats + 1):
        dist.barrier()
        began = time.perf_counter()
        work()
        seconds = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        if turn:
            found.append(float(seconds))
    return float(np.median(found))


def _crowd_rates(partner_R: list[int], large: Any, repeats: int) -> Floats:
    """Everybody sends to its partner at once; GB/s that each sender got."""
    import torch
    from torch import distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    received = [torch.zeros_like(large) for sender in range(ranks) if partner_R[sender] == rank and sender != rank]
    best = torch.full((ranks,), float("inf"), dtype=torch.float64)
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        senders = [sender for sender in range(ranks) if partner_R[sender] == rank and sender != rank]
        work = [dist.irecv(buffer, sender) for buffer, sender in zip(received, senders, strict=True)]
        if partner_R[rank] != rank:
            work.append(dist.isend(large, partner_R[rank]))
        for one in work:
            assert one is not None
            one.wait()
        seconds = torch.zeros(ranks, dtype=torch.float64)
        for sender in senders:
            seconds[sender] = time.perf_counter() - began
        dist.all_reduce(seconds)
        best = torch.minimum(best, seconds)
    return large.numel() * 4 / 1e9 / np.maximum(best.numpy(), 1e-12)


def probe(measured: Measured, device: DeviceSpec, name: str) -> Probed:
    """Fit a cluster to the measurement; called by all ranks, they share the crowd measurements."""
    ranks = len(measured.rate_RR)
    if ranks < 2:
        raise ClusterError("a probe needs at least two ranks; start it with torchrun or --ranks 2")
    fitted = fit_levels(measured.rate_RR, measured.latency_RR)
    levels = []
    for place, level in enumerate(fitted.levels):
        below = fitted.groups[place - 1] if place else tuple((rank,) for rank in range(ranks))
        levels.append(replace(level, sharing=_sharing(measured, fitted, place, below, level)))
    cluster = Cluster(
        name=name,
        device=device,
        network=tuple(levels),
        source=f"probed between {ranks} ranks",
        exception=fitted.exceptions,
    )
    links = links_of(cluster, ranks)
    even_RR = np.full((ranks, ranks), measured.exchange_bytes) * (1 - np.eye(ranks))
    predicted_s = float((links.sums(even_RR) / links.bytes_per_s_L).max())
    crowding = measured.exchange_s / max(predicted_s, 1e-12)
    return Probed(cluster=replace(cluster, crowding=round(max(crowding, 1.0), 3)), fitted=fitted, crowding=crowding)


def _sharing(
    measured: Measured, fitted: Fitted, place: int, below: tuple[tuple[int, ...], ...], level: LevelSpec
) -> float:
    """How many ranks of a lower unit share one link of this level: solo rate over the rate when all send."""
    if place == 0 or max(len(unit) for unit in below) < 2:
        return 1.0
    partner_R = list(range(len(measured.rate_RR)))
    for group in fitted.groups[place]:
        units = [unit for unit in below if set(unit) <= set(group)]
        for number, unit in enumerate(units):
            other = units[(number + 1) % len(units)]
            for index, rank in enumerate(unit):
                partner_R[rank] = other[index % len(other)] if len(units) > 1 else rank
    rate_R = measured.crowd(partner_R)
    quotient = [
        measured.rate_RR[rank, partner] / rate_R[rank] for rank, partner in enumerate(partner_R) if partner != rank
    ]
    widest = max(len(unit) for unit in below)
    return round(float(np.clip(np.median(quotient), 1.0, widest)), 2) if quotient else 1.0


def in_group(work: Callable[[], None]) -> None:
    """Run `work` as one rank of the job that torchrun (or --ranks) started, over gloo."""
    from torch import distributed as dist

    if "RANK" not in os.environ:
        raise ClusterError("no RANK in the environment; start the probe with torchrun, or give --ranks to run it here")
    dist.init_process_group("gloo")
    try:
        work()
    finally:
        dist.destroy_process_group()
