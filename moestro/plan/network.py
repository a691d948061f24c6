"""Seconds that ranks spend exchanging, on a network of any number of levels.

A group of `ranks` ranks, `stride` devices apart, has n_l of them in one unit of level l; f_l = n_l / n_(l-1) groups
meet at that level. A ring collective moves S bytes through every level at once (NCCL pipelines its rings), so the
slowest level counts:   t_l = (f_l - 1) / f_l x S / n_(l-1) / B_l   (hierarchical form, n_(l-1) links side by side).
Latency is one hop per rank of the ring, or 2 log2 n of a tree. Checked against cases done by hand in the tests.
"""

from collections.abc import Iterator

import numpy as np

from moestro.plan.columns import Number, larger
from moestro.plan.constants import Constants
from moestro.plan.machine import Level, Machine, rank_sizes


def collective_s(
    payload_bytes: Number,
    ranks: Number,
    stride: Number,
    machine: Machine,
    constants: Constants,
    *,
    count: Number = 1.0,
    tree: Number = 0.0,
) -> Number:
    """All-gather or reduce-scatter; an all-reduce is two of them.

    payload_bytes  of the whole, gathered tensor, over all `count` calls
    tree           1 where latency grows with log2 of the ranks (all-reduce on trees), else a ring
    """
    slowest: Number = 0.0
    hop_s: Number = 0.0
    for place, (level, inside, fan) in enumerate(_fans(machine, ranks, stride)):
        rate = level.bytes_per_s * (constants.across_share if place else constants.inside_share)
        crowd = 1 + constants.congestion * np.log2(fan) if place else 1.0
        slowest = larger(slowest, (fan - 1) / fan * payload_bytes / inside / rate * crowd)
        hop = (constants.hop_across_s if place else constants.hop_inside_s) * level.slowness
        hop_s = np.where(fan > 1, hop, hop_s)
    hops = np.where(np.asarray(tree) > 0, 2 * np.log2(np.maximum(ranks, 1)), np.maximum(ranks, 1) - 1)
    return slowest + count * np.where(np.asarray(ranks) > 1, hops * hop_s + constants.collective_s, 0.0)


def _fans(machine: Machine, ranks: Number, stride: Number) -> Iterator[tuple[Level, Number, Number]]:
    """(level, ranks in a unit of the level below, units of the level below that meet here), from inside out."""
    inside: Number = 1.0
    ranks = np.maximum(ranks, 1.0)
    for level in machine.levels:
        here = rank_sizes(level, stride, ranks)
        yield level, inside, np.maximum(here / inside, 1.0)
        inside = here


def exchange_s(
    payload_bytes: Number,
    ranks: Number,
    choices: Number,
    machine: Machine,
    constants: Constants,
    deduplicating: Number,
) -> Number:
    """One direction of the token exchange among `ranks` neighbouring ranks.

    payload_bytes  of all routed rows of one rank: tokens x experts per token x row
    choices        experts per token. With de-duplication a row crosses to each distinct unit once, n (1 - (1 - 1/n)^k)
                   of n units, and is spread inside it, to each distinct rank once (FORMULAS 4.5); without, every copy
                   goes straight to its rank
    """
    slowest: Number = 0.0
    smart = np.asarray(deduplicating) > 0
    choices = np.maximum(choices, 1.0)
    for place, (level, _, fan) in enumerate(_fans(machine, ranks, 1.0)):
        if place:
            rate = np.where(smart, constants.dispatch_across, constants.alltoall_across)
            copies = np.where(smart, np.minimum(fan * (1 - (1 - 1 / fan) ** choices) / choices, 1.0), 1.0)
            crossing = copies * (fan - 1) / fan
        else:
            rate = np.where(smart, constants.dispatch_inside, constants.alltoall_inside)
            once = np.minimum(fan * (1 - (1 - 1 / fan) ** choices) / choices, 1.0)
            crossing = np.where(smart, once * (fan - 1) / fan, (fan - 1) / np.maximum(ranks, 1.0))
        slowest = larger(slowest, crossing * payload_bytes / (level.bytes_per_s * rate))
    return np.where(np.asarray(ranks) > 1, slowest + constants.exchange_s, 0.0)


def message_s(payload_bytes: Number, distance: Number, machine: Machine, constants: Constants) -> Number:
    """One message between two ranks `distance` devices apart, through the lowest level that joins them."""
    seconds: Number = 0.0
    joined = np.asarray(False)
    for place, level in enumerate(machine.levels):
        share = constants.across_share if place else constants.inside_share
        here = ~joined & (np.asarray(distance) < level.devices)
        last = place == len(machine.levels) - 1
        here = ~joined if last else here
        seconds = np.where(here, payload_bytes / (level.bytes_per_s * share), seconds)
        joined = joined | here
    return seconds + 1e-5
