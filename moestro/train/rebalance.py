"""Live rebalancing: watch loads, plan, and let experts move while training goes on.

    counts of every step -> each interval: source rank x expert on the leader -> place.planner.Gated per layer
        -> placements for all ranks -> PlacedExperts.adopt: shares at once, experts until the next forward pass

The router is never asked: it chooses experts, not ranks. Whatever goes wrong here (a network that does not cover the
ranks, a search that fails) is said once, and training goes on with the placement it has.

Dimension key:  L sparse layers   S sources (ranks of dist.ep)   E experts   G devices (the same ranks)   T tokens
                K choices   N sampled tokens
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moestro.core.errors import ClusterError, Error
from moestro.core.units import bytes_text
from moestro.dist.mesh import Mesh
from moestro.dist.replicas import Copy
from moestro.nn.router import RoutingRecord
from moestro.place.cost import Layer, Placement, TokenSet, slots_that_fit, step_time
from moestro.place.planner import Gated, Plan
from moestro.place.predict import Predictor
from moestro.train.balance_spec import BalanceSpec
from moestro.train.park import LinkWatch, Network, probed
from moestro.train.placed import PREFIX, PlacedExperts, checked

STATE_BYTES, GRADIENT_BYTES = 12.0, 4.0
"""Of one number: the weight and two moments that move; the gradient that replicas send."""
MEMORY_BYTES = 16.0
"""Of one number: weight, gradient, two moments."""
FAILURES = (Error, ValueError, ArithmeticError, LookupError)
"""What a search may raise without ending the run."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What rows and experts weigh, for the cost model."""

    token_bytes: float
    rows_per_s: float
    expert_numbers: int
    """Parameters of one expert."""
    merges: bool = False
    """A token crosses to a node once (dist.dispatch hierarchical)."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the leader tells all ranks."""

    placements: list[Placement] = field(default_factory=list)
    copies: list[list[Copy]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """Something that people or the log should know."""

    text: str
    """For the screen; empty: only for the log."""
    facts: dict[str, Any]


def fitting_slots(asked: int, network: Network, layers: int, expert_numbers: int, other_numbers: int) -> int:
    """Slots of a layer that every rank's memory holds, at most `asked`; raises PlacementError where not one fits."""
    if not network.known_memory:
        return asked
    each, other = MEMORY_BYTES * layers * expert_numbers, MEMORY_BYTES * other_numbers
    return min(asked, int(slots_that_fit(network.links, each, other).min()))


class Rebalancer:
    """Decides every `balance.interval` steps."""

    def __init__(
        self, spec: BalanceSpec, steps: int, placed: PlacedExperts, mesh: Mesh, network: Network, costs: Costs
    ) -> None:
        self.spec, self.placed, self.mesh, self.links, self.costs = spec, placed, mesh, network.links, costs
        self.first_placements = list(placed.placements)
        self.steps, self.sample, self.counted = steps, 0, 0
        experts = len(placed.placements[0].device_EP)
        self.count_LE = torch.zeros(len(placed.layers), experts, dtype=torch.float64, device=mesh.device)
        self.planners = [self._planner() for _ in placed.layers]
        self.merges = costs.merges
        self.problem = ""
        self.link_watch = LinkWatch(mesh) if network.probed else None

    def _planner(self) -> Gated:
        return Gated(
            interval_steps=self.spec.interval,
            total_steps=self.steps,
            budget_share=self.spec.budget,
            effort=self.spec.effort,
        )

    def watch(self, records: Sequence[RoutingRecord]) -> None:
        """Count a step's choices of this rank."""
        self.count_LE += torch.stack([record.count_E for record in records])
        self.counted += 1

    def due(self, step: int) -> bool:
        """Whether a decision follows this step; not after the last."""
        return step % self.spec.interval == 0 and step < self.steps

    def renew(
        self, first: Callable[[Callable[[], Decision]], Decision], optimizer: torch.optim.Optimizer
    ) -> Said | None:
        """Decide and put the decision into force; called by all ranks between two steps.

        first   lets the leader work and all have the result (`Engine.first`)
        returns what there is to say, once for each problem
        """
        begun_s = time.perf_counter()
        count_LSE, choice_NLK = self.summed_counts().cpu().numpy() / max(self.counted, 1), self.choices()
        self.count_LE.zero_()
        self.counted = 0
        links = self.look_at_links()
        decision = first(lambda: self.decide(count_LSE, choice_NLK))
        if decision.problem:
            known, self.problem = self.problem == decision.problem, decision.problem
            return None if known else Said(decision.problem, {"problem": decision.problem})
        self.problem = ""
        self.sample += 1
        self.placed.adopt(decision.placements, decision.copies, optimizer)
        facts = {**decision.facts, "seconds": round(time.perf_counter() - begun_s, 4), **links}
        return Said(told(facts) if facts["moved"] or links else "", facts)

    def look_at_links(self) -> dict[str, float]:
        """Measure links again where they are not what they were; called by all ranks."""
        times = self.link_watch.changed() if self.link_watch else 0.0
        if not times:
            return {}
        speed_G = self.links.speed_G
        try:
            self.links = replace(probed(self.mesh), speed_G=speed_G)
        except ClusterError:
            return {}  # as they were
        return {"links_slower": round(times, 2)}

    def summed_counts(self) -> Tensor:
        """count_LSE since the last decision, of a mean expert group; called by all ranks."""
        axis, layout = self.placed.axis, self.mesh.layout
        layers, experts = self.count_LE.shape
        count_LSE = self.count_LE.new_zeros(layers, axis.size, experts)
        count_LSE[:, axis.index] = self.count_LE / (layout.dp_replicate * layout.edp_shard * layout.tp)
        return self.mesh["world"].sum(count_LSE)

    def choices(self) -> NDArray[np.int64]:
        """Sampled choices [S * T, L, K], where tokens cross to a node once; called by all ranks."""
        recent = [layer.recent_TK for layer in self.placed.layers]
        stacked = [one for one in recent if one is not None]
        if not self.merges or len(stacked) < len(recent):
            return np.zeros((0, len(recent), 0), np.int64)
        choice_TLK = torch.stack(stacked, 1)
        least = int(self.mesh["world"].gather_even(torch.tensor([len(choice_TLK)], device=choice_TLK.device)).min())
        choice: NDArray[np.int64] = self.placed.axis.gather_even(choice_TLK[:least]).cpu().numpy()
        return choice

    def decide(self, count_LSE: NDArray[np.float64], choice_NLK: NDArray[np.int64]) -> Decision:
        """Leader: the placements for the next interval, or what went wrong."""
        begun_s = time.perf_counter()
        try:
            layers = [self.layer(number, token_SE, choice_NLK) for number, token_SE in enumerate(count_LSE)]
            plans = [planner.consider(one, self.sample) for planner, one in zip(self.planners, layers, strict=True)]
            ranks, slots = self.placed.axis.size, self.placed.slots
            placements = [checked(plan.placement, count_LSE.shape[2], ranks, slots) for plan in plans]
        except FAILURES as error:
            return Decision(problem=f"no new placement: {error}; training goes on with the one it has")
        copies = [
            self.placed.copies(number, placement, layer.nearest_EG)
            for number, (placement, layer) in enumerate(zip(placements, layers, strict=True))
        ]
        first_s = sum(
            step_time(replace(one, held_EG=first.held_EG), first).total_s
            for one, first in zip(layers, self.first_placements, strict=True)
        )
        facts = self._facts(plans, sum(map(len, copies)), first_s, time.perf_counter() - begun_s)
        return Decision(placements=placements, copies=copies, facts=facts)

    def layer(self, number: int, token_SE: NDArray[np.float64], choice_NLK: NDArray[np.int64]) -> Layer:
        """One layer for the cost model."""
        links, numbers = self.links, self.costs.expert_numbers
        speed_G = links.speed_G if links.speed_G.size else np.ones(links.devices)
        return Layer(
            links=links,
            token_SE=token_SE,
            tokens_per_s_G=self.costs.rows_per_s * speed_G,
            slot_G=np.full(links.devices, min(self.placed.slots, token_SE.shape[1])),
            token_bytes=self.costs.token_bytes,
            held_EG=self.placed.placements[number].held_EG,
            gradient_bytes=GRADIENT_BYTES * numbers,
            state_bytes=STATE_BYTES * numbers,
            sync_share=1.0,  # replicas' gradients wait for the backward pass
            homes_move=True,
            sets=token_sets(choice_NLK[:, number], token_SE, links.host_G) if choice_NLK.size else (),
        )

    def _facts(self, plans: list[Plan], moved: int, first_s: float, seconds: float) -> dict[str, Any]:
        moving = [plan for plan in plans if plan.verdict.move]
        return {
            "reason": [str(plan.verdict.reason) for plan in plans],
            "moves": [plan.verdict.move for plan in plans],
            "now_ms": [round(1e3 * plan.now_s, 4) for plan in plans],
            "planned_ms": [round(1e3 * plan.planned_s, 4) for plan in plans],
            "first_ms": round(1e3 * first_s, 4),
            "saved_s": round(sum(plan.verdict.saved_s - plan.verdict.cost_s for plan in moving), 4),
            "moved": moved,
            "moved_bytes": round(moved * STATE_BYTES * self.costs.expert_numbers),
            "search_s": round(seconds, 4),
        }

    def state(self) -> dict[str, Tensor]:
        """What must be remembered to decide as ever: predictions, counts, the speed reckoned with; called by all ranks.

        Only the leader's predictions are alive.
        """
        arrays: dict[str, np.ndarray] = {
            "count_LSE": self.summed_counts().cpu().numpy(),
            "counted": np.array([self.counted]),
            "rows_per_s": np.array([self.costs.rows_per_s]),
            "sample": np.array([self.sample]),
        }
        for number, planner in enumerate(self.planners):
            if planner.predictor is not None:
                for name, value in vars(planner.predictor).items():
                    arrays[f"predictor.{number}.{name}"] = np.asarray(value)
        return {PREFIX + name: torch.from_numpy(np.atleast_1d(array).copy()) for name, array in arrays.items()}

    def go_back(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` said."""
        if PREFIX + "sample" not in state:
            return
        self.sample, self.counted = int(state[PREFIX + "sample"]), int(state[PREFIX + "counted"])
        self.count_LE.copy_(state[PREFIX + "count_LSE"][:, self.placed.axis.index])
        self.costs = replace(self.costs, rows_per_s=float(state[PREFIX + "rows_per_s"]))
        sources, experts = self.placed.axis.size, self.count_LE.shape[1]
        for number, planner in enumerate(self.planners):
            head = f"{PREFIX}predictor.{number}."
            found = {key.removeprefix(head): value.numpy() for key, value in state.items() if key.startswith(head)}
            if found:
                planner.predictor = Predictor(1, sources * experts)
                for name, value in found.items():
                    setattr(planner.predictor, name, int(value[0]) if name == "updates" else value)


def token_sets(
    choice_NK: NDArray[np.int64], token_SE: NDArray[np.float64], host_G: NDArray[np.int64]
) -> tuple[TokenSet, ...]:
    """Which experts tokens chose together, by host, scaled from a sample to a whole step.

    choice_NK   equally many tokens of each source, source after source; the number of experts marks an unused choice
    """
    sources, experts = token_SE.shape
    chosen_NK = np.sort(choice_NK, axis=1)
    host_N = host_G[np.repeat(np.arange(sources), len(chosen_NK) // sources)]
    keyed, times = np.unique(np.column_stack([host_N, chosen_NK]), axis=0, return_counts=True)
    seen = max(int((chosen_NK < experts).sum()), 1)
    scale = float(token_SE.sum()) / seen
    found = []
    for (host, *chosen), number in zip(keyed.tolist(), times.tolist(), strict=True):
        together = tuple(expert for expert in chosen if expert < experts)
        if together:
            found.append(TokenSet(host, together, number * scale))
    return tuple(found)


def told(facts: Mapping[str, Any]) -> str:
    """A decision that moved something, in a line."""
    links = f"exchanges take {facts['links_slower']:g} times as long, links probed; " if "links_slower" in facts else ""
    return (
        f"balance: {links}{facts['moved']} experts copied ({bytes_text(facts['moved_bytes'])}), predicted "
        f"exchange and experts {sum(facts['now_ms']):.3g} -> {sum(facts['planned_ms']):.3g} ms"
    )
