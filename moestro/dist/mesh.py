"""Process groups for a layout: one `Axis` per direction in which ranks work together.

    join(spec) -> Mesh -> mesh["ep"] -> Axis: size, index, sum, gather, swap

All collectives of training go through an `Axis`, where they are counted (for `watch`, which finds lost ranks) and timed
(for `timeline`). Groups of one rank have no process group and cost nothing.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, cycle, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moestro.dist.layout import AXES, Layout
from moestro.dist.timeline import CLOCK


@dataclass(slots=True)
class Pulse:
    """How many exchanges this process has entered; who has entered fewest lets the others wait."""

    entered: int = 0


PULSE = Pulse()
ROUND_BYTES, ROUNDS = 2**18, 32
"""Of a long exchange with other machines a rank asks for so much at a time, in so many parts at most."""
LEAST_BYTES = 2**14
"""Smaller parts only cost time."""
AHEAD_S = 0.1
"""A rank has asked for what comes in this time, and for two rounds at least: no queue on the way has to hold more."""


class Flow:
    """What the exchanges of a group remember: how fast rows came from other machines, and a number for the next one."""

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        self.tags = cycle(range(1, 2**15))
        """They keep messages of exchanges apart; counted alike on all ranks."""

    def saw(self, came_bytes: float, seconds: float) -> None:
        """Learn from an exchange; a slower one may only have waited for others, so the figure falls slowly."""
        self.bytes_per_s = max(came_bytes / max(seconds, 1e-6), 0.9 * self.bytes_per_s)


Group = tuple[dist.ProcessGroup | None, Flow]


@dataclass(frozen=True, slots=True)
class Axis:
    """The ranks this rank works with in one direction, itself included."""

    name: str = field(compare=False)
    ranks: tuple[int, ...]
    index: int
    """Our place in `ranks`."""
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    """None where we are alone; equal sets of ranks share a group."""
    flow: Flow = field(default_factory=Flow, compare=False, repr=False)
    """Shared by equal sets of ranks, as the group is."""
    near: range = field(default=range(2**31), compare=False)
    """Ranks of the job that are on this machine."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @contextmanager
    def message(self, like: Tensor) -> Iterator[None]:
        """Around every collective: count it, and time it."""
        PULSE.entered += 1
        with CLOCK.message(self, like.is_cuda):
            yield

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, as a new tensor."""
        if self.group is None:
            return value
        total = value.clone()
        with self.message(total):
            dist.all_reduce(total, group=self.group)
        return total

    def begin_sum(self, value: Tensor) -> "Pending":
        """As `sum`, while this rank does something else."""
        total = value.clone()
        PULSE.entered += 1
        return Pending(self, total, [dist.all_reduce(total, group=self.group, async_op=True)], (total,))

    def least(self, value: Tensor) -> Tensor:
        """The least of the ranks' numbers, each for itself, as a new tensor."""
        if self.group is None:
            return value
        least = value.clone()
        with self.message(least):
            dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return least

    def gather(self, rows_TX: Tensor) -> tuple[Tensor, slice]:
        """All ranks' rows in order, and which are ours; ranks may have different numbers of rows."""
        if self.group is None:
            return rows_TX, slice(None)
        size_R = self.gather_even(torch.tensor([len(rows_TX)], device=rows_TX.device)).tolist()
        padded = rows_TX.new_zeros(max(size_R), *rows_TX.shape[1:])
        padded[: len(rows_TX)] = rows_TX
        parts = self.gather_even(padded).split(max(size_R)) if max(size_R) else [padded] * self.size
        start = sum(size_R[: self.index])
        rows = torch.cat([part[:size] for part, size in zip(parts, size_R, strict=True)])
        return rows, slice(start, start + len(rows_TX))

    def gather_even(self, rows_TX: Tensor) -> Tensor:
        """As `gather` where all ranks have equally many rows."""
        if self.group is None:
            return rows_TX
        parts = [torch.empty_like(rows_TX) for _ in self.ranks]
        with self.message(rows_TX):
            dist.all_gather(parts, rows_TX.contiguous(), group=self.group)
        return torch.cat(parts)

    def swap_even(self, rows_RX: Tensor) -> Tensor:
        """Equal parts of the first dimension go to each rank; what comes back is a part from each."""
        out_RX = torch.empty_like(rows_RX, memory_format=torch.contiguous_format)
        with self.message(rows_RX):
            dist.all_to_all_single(out_RX, rows_RX.contiguous(), group=self.group)
        return out_RX

    def begin_swap(self, rows_NX: Tensor, send: list[int], receive: list[int], beside: bool = False) -> "Pending":
        """The first send[0] rows go to rank 0, the next send[1] to rank 1, ...; alike for what comes.

        beside   much is computed before `wait`, so everything has to travel without it; alike on all ranks
        """
        rows_NX = rows_NX.contiguous()
        out_MX = rows_NX.new_empty(sum(receive), *rows_NX.shape[1:])
        PULSE.entered += 1
        if rows_NX.is_cuda:
            works: Iterable[Any] = [
                dist.all_to_all_single(out_MX, rows_NX, receive, send, group=self.group, async_op=True)
            ]
        else:
            works = begin_pairs(rows_NX.split(send), out_MX.split(receive), self, beside)
        return Pending(self, out_MX, works, (rows_NX,))


@dataclass(frozen=True, slots=True)
class Pending:
    """A collective under way."""

    axis: Axis
    result: Tensor
    """Undefined until `wait` has returned it."""
    works: Iterable[Any]
    """What to wait for; going on to the next may begin more."""
    kept: tuple[Tensor, ...]
    """What the collective reads or writes meanwhile."""

    def wait(self) -> Tensor:
        """The result."""
        with CLOCK.message(self.axis, self.result.is_cuda):
            for work in self.works:
                work.wait()
        return self.result


def begin_pairs(rows_R: Sequence[Tensor], out_R: Sequence[Tensor], axis: Axis, beside: bool) -> Iterator[dist.Work]:
    """gloo's uneven all-to-all with receives announced before anything is sent; returns what to wait for.

    Two ranks share one connection. gloo's own all-to-all sends first, so whoever comes second sends its rows ahead of the
    word that it can receive, and the other waits until they are through: one direction at a time, half the bandwidth.

    Nothing leaves before it is announced. What comes from other machines is announced in rounds, a part from each rank,
    as many ahead as come in AHEAD_S: many connections with all their rows under way fill the queue of a slow link until
    it drops, and then TCP waits for longer than the exchange would take. How fast rows come is known from the exchanges
    before. Later rounds are announced while we wait; with `beside` all are at once.
    """
    size, own, flow = axis.size, axis.index, axis.flow
    tag = next(flow.tags)
    others = [(own + distance) % size for distance in range(1, size)]
    others.sort(key=lambda rank: axis.ranks[rank] in axis.near)  # what is far begins first

    def parts(rows_X: Tensor, rank: int) -> list[tuple[Tensor, int]]:
        whole = beside or axis.ranks[rank] in axis.near
        return [(part, axis.ranks[rank]) for part in rows_X.split(len(rows_X) if whole else part_rows(rows_X, size))]

    def announce(wanted: Iterable[tuple[Tensor, int] | None]) -> list[dist.Work | None]:
        return [dist.irecv(part[0], part[1], axis.group, tag) for part in wanted if part]

    coming = list(zip_longest(*(parts(out_R[rank], rank) for rank in others if len(out_R[rank]))))
    going = zip_longest(*(parts(rows_R[rank], rank) for rank in others if len(rows_R[rank])))
    far_bytes = sum(out_R[rank].nbytes for rank in others if axis.ranks[rank] not in axis.near)
    rounds_per_s, began_s = flow.bytes_per_s * len(coming) / max(far_bytes, 1), time.perf_counter()
    announced = [announce(wanted) for wanted in coming[: max(2, int(AHEAD_S * rounds_per_s))]]
    sent = [dist.isend(part[0], part[1], axis.group, tag) for part in chain(*going) if part]
    out_R[own].copy_(rows_R[own])

    def rest() -> Iterator[dist.Work | None]:
        for came in range(1, len(coming) + 1):
            yield from announced[came - 1]
            ahead = max(2, int(AHEAD_S * max(rounds_per_s, came / (time.perf_counter() - began_s))))
            announced.extend(announce(wanted) for wanted in coming[len(announced) : came + ahead])
        if len(coming) > 1:
            flow.saw(far_bytes, time.perf_counter() - began_s)
        yield from sent

    return (work for work in rest() if work is not None)


def part_rows(rows_X: Tensor, ranks: int) -> int:
    """Rows of one part of what goes from one rank to another; both ends know these numbers."""
    row_bytes = max(rows_X[0].nbytes, 1)
    few = max(ROUND_BYTES // max(ranks - 1, 1), LEAST_BYTES) // row_bytes
    return max(few, -(-len(rows_X) // ROUNDS), 1)


def alone(name: str) -> Axis:
    """An axis along which nothing is split."""
    return Axis(name, (0,), 0)


class Mesh:
    """This rank's axes."""

    def __init__(self, layout: Layout, device: torch.device, timeout_s: float = 0.0) -> None:
        """`timeout_s`: how long ranks wait for each other, in every group; 0: as long as torch's default."""
        self.layout, self.device = layout, device
        self.timeout = timedelta(seconds=timeout_s) if timeout_s else None
        self.rank = dist.get_rank()
        self.near = on_this_machine()
        made: dict[tuple[int, ...], Group] = {tuple(range(layout.world)): (dist.group.WORLD, Flow())}
        self._axes = {axis: self._axis(axis, made) for axis in AXES}

    def _axis(self, name: str, made: dict[tuple[int, ...], Group]) -> Axis:
        """Every rank takes part in making every group, in one order; equal sets of ranks share a group."""
        own: Axis | None = None
        for ranks in map(tuple, self.layout.groups(name)):
            if len(ranks) > 1 and ranks not in made:
                made[ranks] = dist.new_group(list(ranks), timeout=self.timeout), Flow()
            if self.rank in ranks:
                group, flow = made[ranks] if len(ranks) > 1 else (None, Flow())
                own = Axis(name, ranks, ranks.index(self.rank), group, flow, self.near)
        assert own is not None
        return own

    def __getitem__(self, axis: str) -> Axis:
        return self._axes[axis]

    def beside(self, axis: str) -> Axis:
        """An axis again with process groups of its own, for exchanges that run while training's go on."""
        return self._axis(axis, {})


def on_this_machine() -> range:
    """Ranks that the launcher has started beside us; all, where it does not say how many."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return range(dist.get_world_size())
    first = dist.get_rank() - int(os.environ["LOCAL_RANK"])
    return range(first, first + int(os.environ["LOCAL_WORLD_SIZE"]))


def swap_between_all(rows_NX: Tensor, send: list[int], receive: list[int]) -> Tensor:
    """See `Axis.begin_swap`, for all ranks of the job, before they are a mesh."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    everybody = Axis("world", tuple(range(ranks)), rank, dist.group.WORLD, near=on_this_machine())
    return everybody.begin_swap(rows_NX, send, receive).wait()


def under_torchrun() -> bool:
    """True in a process that a launcher has given a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(timeout_s: float) -> None:
    """Meet the other ranks at the address the launcher has put into the environment."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def leave() -> None:
    """End the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
