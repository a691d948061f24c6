"""Plan one layer again and again: predict loads, refit shares, search near the placement in force, move when it pays.

    Layer (last counts, placement in force) -> Gated.consider -> Plan(placement, verdict, now_s, planned_s)

The same object decides in `place.replay`, over recorded loads, and live in `train.rebalance`.

Dimension key:  S sources   E experts
"""

from dataclasses import dataclass, field, replace

import numpy as np

from moestro.cluster.links import Links
from moestro.place.cost import Layer, Placement, step_time
from moestro.place.policy import FADING, MARGIN, Reason, Verdict, decide, life_steps, trust
from moestro.place.predict import Predictor
from moestro.place.solve import solve, split


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The placement for the next interval."""

    placement: Placement
    verdict: Verdict
    """Of the best search; its `move` says whether `placement` is that search's."""
    now_s: float
    """Predicted step time of the placement in force, shares fitted."""
    planned_s: float
    """Of the best one found, moving not counted."""
    moved: int
    """Replicas to copy."""


def compile_searches(links: Links) -> None:
    """Let kernels compile now, some seconds the first time on a machine, instead of in the middle of a run."""
    devices = links.devices
    layer = Layer(
        links=links,
        token_SE=np.ones((devices, devices)),
        tokens_per_s_G=np.ones(devices),
        slot_G=np.full(devices, 2),
        token_bytes=1.0,
        held_EG=np.eye(devices, dtype=bool),
    )
    Gated(interval_steps=1, total_steps=10, effort=1e-9).consider(layer, 0)


@dataclass(kw_only=True)
class Gated:
    """The planner of one layer."""

    interval_steps: int
    """Steps between two calls."""
    total_steps: int
    budget_share: float = 0.15
    """Most slots that one plan may copy."""
    effort: float = 1.0
    """Of either search; see `solve`."""
    predictor: Predictor | None = None
    verdicts: list[Verdict] = field(default_factory=list)

    def plan(self, layer: Layer, sample: int) -> Placement:
        """See `replay.Policy`."""
        return self.consider(layer, sample).placement

    def consider(self, layer: Layer, sample: int) -> Plan:
        """The placement in force with fresh shares, or a better one; `sample` counts the calls from 0."""
        sources, experts = layer.token_SE.shape
        if self.predictor is None:
            self.predictor = Predictor(1, sources * experts)
        self.predictor.update(layer.token_SE.reshape(1, -1))
        load_LX, error_L = self.predictor.predict()
        token_SE = load_LX[0].reshape(sources, experts)
        watched = float((sample + 1) * self.interval_steps)
        life = life_steps(
            drift=float(self.predictor.drift_L[0]),
            interval_steps=self.interval_steps,
            watched_steps=max(watched, 10.0 * self.interval_steps),
            left_steps=self.total_steps - watched,
        )
        # the search weighs every single replica as the gate weighs the plan
        counted = life * FADING * trust(float(error_L[0])) / MARGIN
        expected = replace(layer, token_SE=token_SE, horizon_steps=max(counted, 1.0))
        stay = split(expected, layer.held_EG)
        now_s = step_time(expected, stay).total_s
        nothing = Verdict(move=False, reason=Reason.SAME, saved_s=0.0, cost_s=0.0, life_steps=life)
        best, chosen = Plan(placement=stay, verdict=nothing, now_s=now_s, planned_s=now_s, moved=0), 0.0
        most_new = max(int(self.budget_share * layer.slot_G.sum()), 1)
        for gentle in (True, False):  # near the placement in force, and as far away as the budget goes
            answer = solve(expected, effort=self.effort, gentle=gentle, most_new=most_new)
            planned_s = answer.time.total_s - answer.time.move_s
            verdict = decide(
                now_s=now_s,
                planned_s=planned_s,
                move_s=answer.time.move_s * expected.horizon_steps,
                life=life,
                error=float(error_L[0]),
            )
            self.verdicts.append(verdict)
            if verdict.move and verdict.saved_s - verdict.cost_s > chosen:
                chosen = verdict.saved_s - verdict.cost_s
                best = Plan(
                    placement=answer.placement, verdict=verdict, now_s=now_s, planned_s=planned_s, moved=answer.moved
                )
            elif not best.verdict.move and planned_s < best.planned_s:
                best = replace(best, verdict=verdict, planned_s=planned_s)
        return best
