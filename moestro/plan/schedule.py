"""Pipeline schedules: who idles, who holds how many micro-batches, and how layers are cut into stages.

    bubble_s(...)      seconds a rank idles in one step (FORMULAS 4.4)
    in_flight(...)     micro-batches whose activations a stage holds at its fullest, in units of all its layers
    slowest_stage(...) seconds of the fullest stage
    cut(...)           the exact best cut of given layer costs into stages, for plan.toml

F and B are a stage's seconds per micro-batch, forward and backward; W is the part of B that makes weight gradients and
may be done later. `p` ranks, `v` chunks each, `m` micro-batches. The event simulation in timeline.py agrees with these
formulas on even stages; the tests compare them.
"""

from collections.abc import Sequence

import numpy as np

from moestro.plan.columns import Number
from moestro.plan.layout import SCHEDULES, Layout

ONE_F_ONE_B, INTERLEAVED, ZERO_BUBBLE, ZERO_BUBBLE_V, DUALPIPE = range(len(SCHEDULES))


def bubble_s(layout: Layout, forward_s: Number, backward_s: Number, weight_s: Number) -> Number:
    """Idle seconds of a step on the critical rank.

    1f1b           (p - 1)(F + B)                2104.04473
    interleaved    (p - 1)(F + B) / v            2104.04473
    zero_bubble    (p - 1)(F + B - 2 W)          2401.10241, ZB-H1: its B is split, ours holds both parts
    zero_bubble_v  (p - 1)(F + B) / 6            2405.15362, as measured: (p - 1) / (p - 1 + 6 m) of the step
    dualpipe       (p / 2 - 1)(F + 2 B - 3 W)    DualPipe's README, F and B of two directions overlapped

    The three that fill bubbles with gradients of weights have fewer of them where there are fewer micro-batches than
    ranks: (p - m) W more, as played event by event.
    """
    p, both = layout.pp, forward_s + backward_s
    unfilled = np.maximum(p - layout.micro_batches, 0.0) * weight_s
    kinds = [
        (p - 1) * both,
        (p - 1) * both / layout.virtual,
        (p - 1) * np.maximum(both - 2 * weight_s, 0.0) + unfilled,
        (p - 1) * both / 6 + unfilled,
        np.maximum(p / 2 - 1, 0.0) * np.maximum(both + backward_s - 3 * weight_s, 0.0) + unfilled,
    ]
    schedule = np.asarray(layout.schedule)
    idle = np.select([schedule == code for code in range(len(kinds))], kinds)
    return np.where(np.asarray(p) > 1, idle, 0.0)


def in_flight(layout: Layout, stage: Number) -> Number:
    """Micro-batches held by stage `stage` (from 0), in units of all layers of the stage; a chunk counts 1 / v.

    1f1b and zero_bubble hold p - i; interleaved holds chunks of 2 (p - i - 1) + (v - 1) p + 1 warm-up forwards;
    zero_bubble_v holds p everywhere, dualpipe p + 1.
    """
    p, m, v = layout.pp, layout.micro_batches, layout.virtual
    warm = np.minimum((2 * (p - stage - 1) + (v - 1) * p + 1) / v, m)
    plain = np.minimum(p - stage, m)
    kinds = [plain, np.where(np.asarray(v) > 1, warm, plain), plain, np.minimum(p, m), np.minimum(p + 1, m)]
    schedule = np.asarray(layout.schedule)
    held = np.select([schedule == code for code in range(len(kinds))], kinds)
    return np.where(np.asarray(p) > 1, held, 1.0)


def even_layers(layout: Layout, num_layers: Number) -> Number:
    """1 where layers divide evenly over all chunks."""
    per_chunk = num_layers / (layout.pp * layout.virtual)
    return np.where(np.abs(per_chunk - np.round(per_chunk)) < 1e-9, 1.0, 0.0)


def slowest_stage(layout: Layout, num_layers: Number, layer_s: Number, head_s: Number) -> Number:
    """Seconds per micro-batch of the slowest stage.

    layer_s  of one (mean) layer        head_s  of what only the last stage has: output head, further heads

    Where layers divide evenly, stages are even and the last one carries the head on top, as Megatron cuts by default.
    Otherwise, and with by_cost, whole layers are split so that the fullest stage is as light as possible.
    """
    alone = num_layers * layer_s + head_s
    even = alone / layout.pp + head_s * (1 - 1 / layout.pp)
    by_cost = _best_split(layout.pp, num_layers, head_s / np.maximum(layer_s, 1e-12)) * layer_s
    staged = np.where((even_layers(layout, num_layers) > 0) & (np.asarray(layout.by_cost) <= 0), even, by_cost)
    return np.where(np.asarray(layout.pp) > 1, staged, alone)


def _best_split(stages: Number, num_layers: Number, head_layers: Number) -> Number:
    """Load of the fullest stage, in layers, under the best split of whole layers with a head on the last stage."""
    others = np.maximum(stages - 1, 1.0)
    best = np.asarray(np.inf)
    ideal = (num_layers + head_layers) / stages - head_layers
    for last in (np.floor(ideal), np.ceil(ideal)):
        held = np.clip(last, 0.0, num_layers)
        best = np.minimum(best, np.maximum(np.ceil((num_layers - held) / others), held + head_layers))
    return best


def cut(cost_L: Sequence[float], stages: int, last_extra: float = 0.0) -> list[int]:
    """Layers per stage so that the costliest stage is as cheap as possible (exact, by bisection on its cost).

    cost_L      cost of every layer, in order
    last_extra  cost that the last stage has besides
    """
    loads = [*cost_L, last_extra]
    low, high = max(*loads, sum(loads) / stages), sum(loads)
    for _ in range(60):
        middle = (low + high) / 2
        if len(_greedy(cost_L, middle, last_extra)) <= stages:
            high = middle
        else:
            low = middle
    sizes = _greedy(cost_L, high * (1 + 1e-12), last_extra)
    return _spread(sizes, stages)


def _greedy(cost_L: Sequence[float], most: float, last_extra: float) -> list[int]:
    """Fill stages from the back, so that the head's stage is not overfull; sizes from the front."""
    sizes, load = [0], last_extra
    for cost in reversed(cost_L):
        if load + cost > most:
            sizes.append(0)
            load = 0.0
        sizes[-1] += 1
        load += cost
    return sizes[::-1]


def _spread(sizes: list[int], stages: int) -> list[int]:
    """Exactly `stages` stages: halve the largest until there are enough (no stage gets costlier)."""
    sizes = list(sizes)
    while len(sizes) < stages:
        largest = max(range(len(sizes)), key=lambda place: sizes[place])
        if sizes[largest] < 2:
            sizes.insert(0, 0)
            continue
        half = sizes[largest] // 2
        sizes[largest : largest + 1] = [sizes[largest] - half, half]
    return sizes
