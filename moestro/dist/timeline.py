"""Where the time of a step goes on every rank: its own work, messages, waiting for others.

    every collective -> CLOCK.message() -> seconds by group of ranks, in order -> agree (every few steps) -> Spent

compute     everything that is not below, from the moment the ranks agree on a step until the last weight has moved
exchange    messages of forward and backward passes: tokens to experts and back, router counts, columns, stages
reduction   messages that make gradients, shared-out weights, norms and records whole
idle        waiting, in any of them, for ranks that come late

A collective ends when its last rank has come, and the last to come does not wait. So of the seconds that the ranks of
a group spend in the same collective, the fewest are what the message itself takes, and whatever another rank spends in
it beyond them is idle. No rank's clock is compared with another's, and no barrier is added. Where ranks send unevenly,
the rest of a longer transfer counts as idle too; of a message that runs while a rank computes, only what it waits for.

On CPU the host's clock is read; on CUDA events are put into the stream, so nothing is synchronised. Measuring costs a
few microseconds a message, agreeing one small message per group of ranks every few steps.

Dimension key:  N messages of one group   S steps   W ranks   P parts of a step, see PARTS
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moestro.dist.mesh import Axis, Mesh

Kind = Literal["exchange", "reduction"]
PARTS = ("compute", "exchange", "reduction", "idle")
Stamp = float | torch.cuda.Event


@dataclass(slots=True)
class Message:
    """One collective, or the wait for one, as this rank saw it."""

    kind: Kind
    begun: Stamp
    ended: Stamp

    @property
    def seconds(self) -> float:
        """Its length."""
        if isinstance(self.begun, float) and isinstance(self.ended, float):
            return self.ended - self.begun
        assert isinstance(self.begun, torch.cuda.Event)
        assert isinstance(self.ended, torch.cuda.Event)
        self.ended.synchronize()
        return self.begun.elapsed_time(self.ended) / 1e3


@dataclass(slots=True)
class Step:
    """What this rank knows of one step."""

    number: int
    wall_s: float = 0.0
    messages: "dict[Axis, list[Message]]" = field(default_factory=dict)
    """By the group of ranks, in the order in which all of them take part."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of one step on all ranks."""

    step: int
    second_WP: Tensor
    """Columns are PARTS."""

    def of(self, part: str) -> list[float]:
        """Every rank's seconds of one part."""
        seconds: list[float] = self.second_WP[:, PARTS.index(part)].tolist()
        return seconds


class Clock:
    """Times the collectives of this process while a step is open."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        """Closed, and not agreed on yet."""
        self.kind: Kind = "reduction"
        self._open: Step | None = None
        self._begun_s = 0.0

    def begin(self, anew: bool = False) -> None:
        """A step begins, unless it has already; anew: drop what was counted of it."""
        if self._open is None or anew:
            self._open, self._begun_s = Step(0), time.perf_counter()

    def end(self, number: int) -> None:
        """The step has ended and was the `number`th."""
        if self._open is not None:
            self._open.number, self._open.wall_s = number, time.perf_counter() - self._begun_s
            self.steps.append(self._open)
            self._open = None

    def drop(self) -> None:
        """Forget the open step: something else comes between."""
        self._open = None

    @contextmanager
    def during(self, kind: Kind) -> Iterator[None]:
        """Messages inside are of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    @contextmanager
    def message(self, axis: "Axis", cuda: bool) -> Iterator[None]:
        """A collective of a group of ranks, or the wait for one, happens inside."""
        if self._open is None:
            yield
            return
        begun = _stamp(cuda)
        yield
        self.add(axis, begun, _stamp(cuda))

    def add(self, axis: "Axis", begun: Stamp, ended: Stamp) -> None:
        """Count a message between two stamps."""
        if self._open is not None:
            self._open.messages.setdefault(axis, []).append(Message(self.kind, begun, ended))


CLOCK = Clock()


def _stamp(cuda: bool) -> Stamp:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def agree(clock: Clock, mesh: "Mesh") -> list[Spent]:
    """Compare all closed steps with the other ranks; all ranks call it after the same step and get the same."""
    steps, clock.steps = clock.steps, []
    if not steps:
        return []
    own_SP = torch.zeros(len(steps), len(PARTS), dtype=torch.float64)
    own_SP[:, 0] = own_SP.new_tensor([step.wall_s for step in steps])
    axes = sorted({axis for step in steps for axis in step.messages}, key=lambda axis: axis.ranks)
    for axis in axes:  # in one order on all ranks
        taken = [(place, message) for place, step in enumerate(steps) for message in step.messages.get(axis, [])]
        own_N = own_SP.new_tensor([message.seconds for _, message in taken])
        least_N = axis.least(own_N.to(mesh.device)).cpu()
        step_N = torch.tensor([place for place, _ in taken])
        part_N = torch.tensor([PARTS.index(message.kind) for _, message in taken])
        for column, seconds_N in ((0, -own_N), (part_N, least_N), (PARTS.index("idle"), own_N - least_N)):
            own_SP.view(-1).index_add_(0, step_N * len(PARTS) + column, seconds_N)
    second_SWP = own_SP.new_zeros(len(steps), mesh.layout.world, len(PARTS))
    second_SWP[:, mesh.rank] = own_SP
    second_SWP = mesh["world"].sum(second_SWP.to(mesh.device)).cpu()
    return [Spent(step.number, second_WP) for step, second_WP in zip(steps, second_SWP, strict=True)]
