"""One step played event by event: every stage of every pipeline, devices of unequal speed, any schedule.

    Layout, StepTime -> order (which work a rank does next) -> play (when, on all pipelines at once) -> trace.json

The order comes from a greedy scheduler on one undisturbed pipeline: backward first, then forward while fewer than the
schedule's micro-batches are in flight, then gradients of weights (for 1F1B this is exactly 1F1B). Interleaved stages
have Megatron's fixed order (2104.04473). Then times follow for all pipelines together as columns: a rank is as fast as
its slowest device. Checks schedule.bubble_s, and shows what stragglers do. The trace opens in ui.perfetto.dev.

Dimension key:  D data-parallel pipelines   S stages
"""

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moestro.core.errors import PlanError
from moestro.core.files import write_text
from moestro.plan.columns import Array
from moestro.plan.layout import Layout
from moestro.plan.schedule import DUALPIPE, INTERLEAVED, ONE_F_ONE_B, ZERO_BUBBLE, ZERO_BUBBLE_V
from moestro.plan.step import FACTORS, StepTime

FORWARD, BACKWARD, WEIGHT = 0, 1, 2
KINDS = ("F", "B", "W")
MOST_TASKS = 400_000
"""Tasks of one pipeline that the scheduler takes."""
MOST_DRAWN = 400_000
"""Events of a trace file; of more, the slowest pipeline and others evenly are drawn."""
Task = tuple[int, int, int]
"""(kind, micro-batch, place along the model, from 0)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a schedule looks like, without times."""

    schedule: int
    ranks: int
    chunks: int
    """Places along the model on one rank."""
    micro_batches: int

    @property
    def places(self) -> int:
        """Model chunks from input to output."""
        return self.ranks * self.chunks

    @property
    def split(self) -> bool:
        """Whether gradients of weights are work of their own."""
        return self.schedule in (ZERO_BUBBLE, ZERO_BUBBLE_V, DUALPIPE)

    def rank(self, micro_batch: int, place: int) -> int:
        """Who does a place's work: in turns, there and back (V), or from both ends."""
        if self.schedule == ZERO_BUBBLE_V and place >= self.ranks:
            return 2 * self.ranks - 1 - place
        if self.schedule == DUALPIPE and micro_batch % 2:
            return self.ranks - 1 - place
        return place % self.ranks

    def most_in_flight(self, rank: int) -> int:
        """Chunks a rank may hold: what memory.in_flight counts."""
        if self.schedule == ONE_F_ONE_B:
            return self.ranks - rank
        return {ZERO_BUBBLE_V: 2 * self.ranks, DUALPIPE: self.ranks + 1}.get(self.schedule, self.ranks)

    def needs(self, task: Task) -> Task | None:
        """The task whose result a task waits for."""
        kind, micro_batch, place = task
        if kind == FORWARD:
            return (FORWARD, micro_batch, place - 1) if place else None
        if kind == WEIGHT:
            return (BACKWARD, micro_batch, place)
        last = place == self.places - 1
        return (FORWARD, micro_batch, place) if last else (BACKWARD, micro_batch, place + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """A played step."""

    step_s: float
    busy_share: float
    """Of the pipeline's time that ranks of the median pipeline work."""
    num_events: int
    """Tasks of all devices."""
    tasks: tuple[Task, ...]
    rank_N: np.ndarray
    start_ND: Array
    end_ND: Array
    tail_s: float
    """Gradient reduction, optimiser and the rest after the pipeline."""


def play(layout: Layout, step: StepTime, *, jitter: float = 0.0, seed: int = 0) -> Played:
    """Play one step of one layout.

    jitter  standard deviation of the logarithm of a device's speed
    raises  PlanError where a pipeline has more tasks than can be played
    """
    ranks, batches = int(layout.pp), round(float(layout.micro_batches))
    schedule = int(layout.schedule) if ranks > 1 else ONE_F_ONE_B
    chunks = 2 if schedule == ZERO_BUBBLE_V else int(layout.virtual)
    shape = Shape(schedule=schedule, ranks=ranks, chunks=chunks, micro_batches=batches)
    if shape.places * batches * 3 > MOST_TASKS:
        raise PlanError(
            f"a pipeline of {shape.places} places and {batches} micro-batches is too long to play; take fewer "
            "sequences, the schedule repeats itself"
        )
    spans = _spans(shape, step)
    tasks = interleaved_order(shape) if schedule == INTERLEAVED else greedy_order(shape, spans)
    slow_SD = _slowness(layout, jitter, seed)
    start_ND, end_ND, rank_N = _times(shape, tasks, spans, slow_SD)
    pipeline_s = float(end_ND.max())
    tail_s = _tail_s(step)
    busy = float((end_ND - start_ND).sum(axis=0).mean() / (ranks * end_ND.max(axis=0).mean()))
    return Played(
        step_s=pipeline_s + tail_s,
        busy_share=busy,
        num_events=len(tasks) * int(layout.devices) // ranks,
        tasks=tuple(tasks),
        rank_N=rank_N,
        start_ND=start_ND,
        end_ND=end_ND,
        tail_s=tail_s,
    )


def _spans(shape: Shape, step: StepTime) -> tuple[float, float, float]:
    """Seconds of forward, backward and weight gradients of one chunk; the last is 0 where it is part of backward."""
    whole = float(step.stage_s) / shape.chunks
    forward = float(step.forward_share) * whole
    weight = min(float(step.weight_share) * whole, 0.9 * (whole - forward)) if shape.split else 0.0
    return forward, whole - forward - weight, weight


def _tail_s(step: StepTime) -> float:
    """What comes after the last backward pass, with the step's overall factors."""
    names = ("gradient reduction", "optimiser", "fixed")
    plain = sum(float(value) for name, value in step.parts.items() if name not in FACTORS)
    return sum(float(step.parts[name]) for name in names) * float(step.total_s) / plain


def _slowness(layout: Layout, jitter: float, seed: int) -> Array:
    """Of every rank of every pipeline: that of the slowest of its devices, 1 on average over devices."""
    ranks, data = int(layout.pp), round(float(layout.dp))
    together = int(layout.tp) * int(layout.cp)
    if not jitter:
        return np.ones((ranks, data))
    draw = np.random.default_rng(seed)
    return np.exp(draw.normal(0.0, jitter, (ranks, data, together)).max(axis=2))


def greedy_order(shape: Shape, spans: tuple[float, float, float]) -> list[Task]:
    """Tasks in the order in which they start on one undisturbed pipeline."""
    ready: list[list[tuple[int, int, Task]]] = [[] for _ in range(shape.ranks)]
    held, done_in, order = [0] * shape.ranks, [0.0] * shape.ranks, []
    events: list[tuple[float, int, Task]] = []
    idle = [True] * shape.ranks
    for micro_batch in range(shape.micro_batches):
        _offer(ready, shape, (FORWARD, micro_batch, 0))
    now, count = 0.0, 0
    while True:
        for rank in range(shape.ranks):
            task = _next(ready[rank], held[rank] < shape.most_in_flight(rank)) if idle[rank] else None
            if task is None:
                continue
            idle[rank] = False
            order.append(task)
            held[rank] += task[0] == FORWARD
            done_in[rank] = now + spans[task[0]]
            count += 1
            heapq.heappush(events, (done_in[rank], count, task))
        if not events:
            return order
        now, _, task = heapq.heappop(events)
        finished = [task]
        while events and events[0][0] <= now * (1 + 1e-12):
            finished.append(heapq.heappop(events)[2])
        for task in finished:
            rank = shape.rank(task[1], task[2])
            idle[rank] = True
            held[rank] -= task[0] == (WEIGHT if shape.split else BACKWARD)
            for follower in _followers(shape, task):
                _offer(ready, shape, follower)


def _offer(ready: list[list[tuple[int, int, Task]]], shape: Shape, task: Task) -> None:
    """Backward before forward before weights; later places first, so that work flows out."""
    kind, micro_batch, place = task
    urgency = (1, 0, 2)[kind]
    queue = ready[shape.rank(micro_batch, place)]
    heapq.heappush(queue, (urgency, micro_batch * shape.places - (place if kind == FORWARD else -place), task))


def _next(queue: list[tuple[int, int, Task]], may_forward: bool) -> Task | None:
    """The most urgent task a rank may start."""
    if not queue:
        return None
    if queue[0][2][0] != FORWARD or may_forward:
        return heapq.heappop(queue)[2]
    later = [entry for entry in queue if entry[2][0] != FORWARD]
    if not later:
        return None
    chosen = min(later)
    queue.remove(chosen)
    heapq.heapify(queue)
    return chosen[2]


def _followers(shape: Shape, task: Task) -> Iterator[Task]:
    """Tasks that become possible when a task is done."""
    kind, micro_batch, place = task
    if kind == FORWARD:
        last = place == shape.places - 1
        yield (BACKWARD, micro_batch, place) if last else (FORWARD, micro_batch, place + 1)
    if kind == BACKWARD:
        if place:
            yield (BACKWARD, micro_batch, place - 1)
        if shape.split:
            yield (WEIGHT, micro_batch, place)


def interleaved_order(shape: Shape) -> list[Task]:
    """Megatron's interleaved 1F1B, ranks merged into one order that respects what tasks wait for."""
    per_rank = [list(_interleaved_of(shape, rank)) for rank in range(shape.ranks)]
    nexts, done = [0] * shape.ranks, set()
    order: list[Task] = []
    total = sum(len(tasks) for tasks in per_rank)
    while len(order) < total:
        before = len(order)
        for rank in range(shape.ranks):
            while nexts[rank] < len(per_rank[rank]):
                task = per_rank[rank][nexts[rank]]
                needed = shape.needs(task)
                if needed is not None and needed not in done:
                    break
                done.add(task)
                order.append(task)
                nexts[rank] += 1
        assert len(order) > before, "an interleaved schedule waits for itself"
    return order


def _interleaved_of(shape: Shape, rank: int) -> Iterator[Task]:
    """Tasks of one rank: warm-up forwards, then one forward and one backward in turn, then the backwards left."""
    p, v, total = shape.ranks, shape.chunks, shape.micro_batches * shape.chunks
    warm = min((p - rank - 1) * 2 + (v - 1) * p, total)

    def task(kind: int, number: int) -> Task:
        chunk = number % (p * v) // p
        micro_batch = number // (p * v) * p + number % p
        place = (chunk if kind == FORWARD else v - 1 - chunk) * p + rank
        return kind, micro_batch, place

    yield from (task(FORWARD, number) for number in range(warm))
    for number in range(total - warm):
        yield task(FORWARD, warm + number)
        yield task(BACKWARD, number)
    yield from (task(BACKWARD, number) for number in range(total - warm, total))


def _times(
    shape: Shape, tasks: list[Task], spans: tuple[float, float, float], slow_SD: Array
) -> tuple[Array, Array, np.ndarray]:
    """(start, end) of every task on every pipeline, and its rank."""
    data = slow_SD.shape[1]
    start_ND, end_ND = np.empty((len(tasks), data)), np.empty((len(tasks), data))
    free_SD = np.zeros((shape.ranks, data))
    place_of: dict[Task, int] = {}
    rank_N = np.array([shape.rank(micro_batch, place) for _, micro_batch, place in tasks])
    for number, task in enumerate(tasks):
        rank, needed = rank_N[number], shape.needs(task)
        begin = free_SD[rank] if needed is None else np.maximum(free_SD[rank], end_ND[place_of[needed]])
        start_ND[number] = begin
        end_ND[number] = free_SD[rank] = begin + spans[task[0]] * slow_SD[rank]
        place_of[task] = number
    return start_ND, end_ND, rank_N


def write_trace(path: Path, played: Played) -> int:
    """Write Chrome's trace format: a process per pipeline, a thread per stage; returns the events written."""
    data = played.start_ND.shape[1]
    fit = max(MOST_DRAWN // len(played.tasks), 1)
    slowest = int(played.end_ND.max(axis=0).argmax())
    drawn = sorted({slowest, *np.linspace(0, data - 1, min(fit, data)).astype(int).tolist()})
    names = [f"{KINDS[kind]}{micro_batch}" for kind, micro_batch, _ in played.tasks]
    lines = []
    for pipeline in drawn:
        note = " (slowest)" if pipeline == slowest and data > 1 else ""
        lines.append(_named("process_name", pipeline, 0, f"pipeline {pipeline}{note}"))
        lines += [
            _named("thread_name", pipeline, rank, f"stage {rank}") for rank in range(int(played.rank_N.max()) + 1)
        ]
        starts = (played.start_ND[:, pipeline] * 1e6).round(1).tolist()
        lasts = ((played.end_ND - played.start_ND)[:, pipeline] * 1e6).round(1).tolist()
        lines += [
            f'{{"name":"{name}","ph":"X","pid":{pipeline},"tid":{rank},"ts":{start},"dur":{last}}}'
            for name, rank, start, last in zip(names, played.rank_N.tolist(), starts, lasts, strict=True)
        ]
        end = played.end_ND[:, pipeline].max() * 1e6
        lines.append(
            f'{{"name":"reduce and update","ph":"X","pid":{pipeline},"tid":0,"ts":{end:.1f},'
            f'"dur":{played.tail_s * 1e6:.1f}}}'
        )
    write_text(path, '{"displayTimeUnit":"ms","traceEvents":[' + ",\n".join(lines) + "]}\n")
    return len(lines)


def _named(kind: str, process: int, thread: int, name: str) -> str:
    return json.dumps({"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}})
