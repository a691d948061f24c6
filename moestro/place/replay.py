"""What a rebalancing policy would have cost over a trace: steps plus moves, in the cost model.

    loads over time + Policy -> replay -> Replay(step_s, move_s, plans, moved)

Every `interval` steps the policy sees the counts so far and may plan; steps run on the loads that come after. Moving is
blocking: the new replicas' weights and optimiser state over their busiest link. Policies are objects with `plan`; ours
is `planner.Gated`, which training uses too; baselines are in benchmarks/place.py.

Dimension key:  N samples   S sources   E experts   G devices
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moestro.place.cost import Layer, Placement, move_bytes, step_time
from moestro.place.solve import split

Floats = NDArray[np.float64]


class Policy(Protocol):
    """Decides on a placement from the counts up to now."""

    def plan(self, layer: Layer, sample: int) -> Placement:
        """The placement for the next interval; `layer` has the last counts and the placement in force."""
        ...


@dataclass(kw_only=True)
class Replay:
    """Totals."""

    step_s: float = 0.0
    move_s: float = 0.0
    plans: int = 0
    """Plans that moved something."""
    moved: list[int] = field(default_factory=list)
    """Replicas copied by each of them."""
    slots: int = 0

    @property
    def total_s(self) -> float:
        """Steps and moves."""
        return self.step_s + self.move_s

    @property
    def median_moved_share(self) -> float:
        """Of all slots, per accepted plan."""
        return float(np.median(self.moved)) / self.slots if self.moved else 0.0


def replay(
    layer: Layer, load_NSE: Sequence[Floats], policy: Policy, interval_steps: int, plan_every: int = 1
) -> Replay:
    """Run a policy over samples of loads, one every `interval_steps` steps.

    plan_every  ask the policy at every so many samples
    """
    totals = Replay(slots=int(layer.slot_G.sum()))
    held_EG = layer.held_EG
    placement = split(replace(layer, token_SE=load_NSE[0]), held_EG)
    for sample in range(1, len(load_NSE)):
        if (sample - 1) % plan_every == 0:
            seen = replace(layer, token_SE=load_NSE[sample - 1], held_EG=held_EG)
            placement = policy.plan(seen, sample - 1)
            new_EG = placement.held_EG
            moved = int((new_EG & ~held_EG).sum())
            if moved:
                totals.plans += 1
                totals.moved.append(moved)
                totals.move_s += float((move_bytes(seen, new_EG) / layer.links.bytes_per_s_L).max())
            held_EG = new_EG
        now = replace(layer, token_SE=load_NSE[sample], horizon_steps=np.inf)
        totals.step_s += interval_steps * step_time(replace(now, held_EG=held_EG), placement).total_s
    return totals


class Stay:
    """Never moves, never refits: what training does without a balancer."""

    def __init__(self) -> None:
        self.first: Placement | None = None

    def plan(self, layer: Layer, sample: int) -> Placement:
        """The first placement for ever."""
        if self.first is None:
            self.first = split(layer, layer.held_EG)
        return self.first
