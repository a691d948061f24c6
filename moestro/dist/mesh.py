"""Process groups for a layout: one `Axis` per direction in which ranks work together.

    join(spec) -> Mesh -> mesh["ep"] -> Axis: size, index, sum, gather, swap

All collectives of training go through an `Axis`, where they are counted (for `watch`, which finds lost ranks) and timed
(for `timeline`). Groups of one rank have no process group and cost nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
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


@dataclass(frozen=True, slots=True)
class Axis:
    """The ranks this rank works with in one direction, itself included."""

    name: str = field(compare=False)
    ranks: tuple[int, ...]
    index: int
    """Our place in `ranks`."""
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    """None where we are alone; equal sets of ranks share a group."""

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

    def begin_swap(self, rows_NX: Tensor, send: list[int], receive: list[int]) -> "Pending":
        """The first send[0] rows go to rank 0, the next send[1] to rank 1, ...; alike for what comes."""
        rows_NX = rows_NX.contiguous()
        out_MX = rows_NX.new_empty(sum(receive), *rows_NX.shape[1:])
        PULSE.entered += 1
        if rows_NX.is_cuda:
            works = [dist.all_to_all_single(out_MX, rows_NX, receive, send, group=self.group, async_op=True)]
        else:
            works = begin_pairs(rows_NX.split(send), out_MX.split(receive), self)
        return Pending(self, out_MX, works, (rows_NX,))


@dataclass(frozen=True, slots=True)
class Pending:
    """A collective under way."""

    axis: Axis
    result: Tensor
    """Undefined until `wait` has returned it."""
    works: Sequence[Any]
    kept: tuple[Tensor, ...]
    """What the collective reads or writes meanwhile."""

    def wait(self) -> Tensor:
        """The result."""
        with CLOCK.message(self.axis, self.result.is_cuda):
            for work in self.works:
                work.wait()
        return self.result


def begin_pairs(rows_R: Sequence[Tensor], out_R: Sequence[Tensor], axis: Axis) -> list[dist.Work]:
    """gloo's uneven all-to-all with every receive announced before anything is sent; returns what to wait for.

    Two ranks share one connection. gloo's own all-to-all sends first, so whoever comes second sends its rows ahead of the
    word that it can receive, and the other waits until they are through: one direction at a time, half the bandwidth.
    """
    size, own = axis.size, axis.index
    others = [(own + distance) % size for distance in range(1, size)]
    works = [dist.irecv(out_R[rank], axis.ranks[rank], axis.group) for rank in reversed(others) if len(out_R[rank])]
    works += [dist.isend(rows_R[rank], axis.ranks[rank], axis.group) for rank in others if len(rows_R[rank])]
    out_R[own].copy_(rows_R[own])
    return [work for work in works if work is not None]


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
        made: dict[tuple[int, ...], dist.ProcessGroup | None] = {tuple(range(layout.world)): dist.group.WORLD}
        self._axes = {axis: self._axis(axis, made) for axis in AXES}

    def _axis(self, name: str, made: dict[tuple[int, ...], dist.ProcessGroup | None]) -> Axis:
        """Every rank takes part in making every group, in one order; equal sets of ranks share a group."""
        own: Axis | None = None
        for ranks in map(tuple, self.layout.groups(name)):
            if len(ranks) > 1 and ranks not in made:
                made[ranks] = dist.new_group(list(ranks), timeout=self.timeout)
            if self.rank in ranks:
                own = Axis(name, ranks, ranks.index(self.rank), made[ranks] if len(ranks) > 1 else None)
        assert own is not None
        return own

    def __getitem__(self, axis: str) -> Axis:
        return self._axes[axis]

    def beside(self, axis: str) -> Axis:
        """An axis again with process groups of its own, for exchanges that run while training's go on."""
        return self._axis(axis, {})


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
