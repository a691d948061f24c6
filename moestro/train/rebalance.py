"""Live rebalancing: watch loads, plan, and let experts move while training goes on.

    counts of every step, source x expert -> each interval: place.planner.Gated per layer, on the leader, beside steps
        -> AHEAD steps later: placements for all ranks -> PlacedExperts.adopt: shares at once, experts until the next
        forward pass

A decision is made from what was counted up to the step that began it, and comes into force a fixed number of steps
later, however long the search took, so that a run that is resumed decides as it would have. The router is never asked:
it chooses experts, not ranks. Whatever goes wrong here (a network that does not cover the ranks, a search that fails)
is said once, and training goes on with the placement it has.

Dimension key:  L sparse layers   S sources (ranks of dist.ep)   E experts   G devices (the same ranks)   T tokens
                K choices   N sampled tokens
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moestro.core.errors import ClusterError, Error
from moestro.core.units import bytes_text
from moestro.dist.layout import places
from moestro.dist.mesh import Mesh
from moestro.dist.replicas import Copy
from moestro.nn.router import RoutingRecord
from moestro.place.cost import Layer, Placement, StepTime, TokenSet, slots_that_fit, step_time
from moestro.place.loads import spread_sources
from moestro.place.planner import Gated, Plan, compile_searches
from moestro.place.predict import Predictor
from moestro.train.balance_spec import BalanceSpec
from moestro.train.park import LinkWatch, Network, probed
from moestro.train.placed import PREFIX, PlacedExperts, as_arrays, checked, from_arrays
from moestro.train.whole_steps import Measured, WholeSteps, beside

STATE_BYTES, GRADIENT_BYTES = 12.0, 4.0
"""Of one number: the weight and two moments that move; the gradient that replicas send."""
MEMORY_BYTES = 16.0
"""Of one number: weight, gradient, two moments."""
AHEAD = 2
"""Steps from a decision's beginning until it comes into force, at most an interval: the search runs beside them."""
LOOK_EVERY = 10
"""Decisions between two looks at the links where steps take as long as predicted: links may become faster."""
FAILURES = (Error, ValueError, ArithmeticError, LookupError)
"""What a search may raise without ending the run."""


First = Callable[[Callable[[], Any]], Any]
"""Lets the leader work; all have the result (`Engine.first`)."""


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
        self.count_LSE: Tensor | None = None
        """Since the last decision began."""
        self.planners = [self._planner() for _ in placed.layers]
        self.merges = costs.merges
        self.problem = ""
        self.link_watch = LinkWatch(mesh) if network.probed else None
        self.whole_steps = WholeSteps()
        self.ahead, self.pending = min(AHEAD, spec.interval), 0
        """The step after which what is being decided comes into force; 0: nothing is."""
        self.looked: dict[str, float] = {}
        """What looking at links found when the pending decision began."""
        self.begin_s = 0.0
        """What that took in the way of steps."""
        self.worker = ThreadPoolExecutor(1, "balance") if mesh.rank == 0 else None
        self.decision: Future[Decision] | None = None
        """On the leader, or out of a checkpoint."""
        if self.worker:
            self.worker.submit(compile_searches, self.links)  # while the first steps run

    def _planner(self) -> Gated:
        return Gated(
            interval_steps=self.spec.interval,
            total_steps=self.steps,
            budget_share=self.spec.budget,
            effort=self.spec.effort,
        )

    def watch(self, records: Sequence[RoutingRecord]) -> None:
        """Count a step's choices of all ranks."""
        count_LSE = torch.stack([record.source_SE for record in records if record.source_SE is not None]).double()
        self.count_LSE = count_LSE if self.count_LSE is None else self.count_LSE + count_LSE
        self.counted += 1

    def after_step(self, step: int, first: First, optimizer: torch.optim.Optimizer) -> tuple[bool, Said | None]:
        """Put into force what is due, begin to decide where it is time; called by all ranks between two steps.

        first   lets the leader work and all have the result (`Engine.first`)
        returns whether placements are new, and what there is to say, once for each problem
        """
        new, said = False, None
        if step == self.pending:
            new, said = self.adopt(step, first, optimizer)
        if step % self.spec.interval == 0 and step + self.ahead < self.steps:
            self.begin(step)
        return new, said

    def begin(self, step: int) -> None:
        """Look at links where steps ask for it, and let the leader search while steps go on; called by all ranks."""
        begun_s = time.perf_counter()
        assert self.count_LSE is not None
        count_LSE, choice_NLK = self.mean_group(), self.choices()
        self.count_LSE, self.counted = None, 0
        self.looked = self.look_at_links()
        self.pending = step + self.ahead
        if self.worker:
            measured = self.whole_steps.measured()
            self.decision = self.worker.submit(self.decide, count_LSE, choice_NLK, measured)
        self.begin_s = time.perf_counter() - begun_s

    def adopt(self, step: int, first: First, optimizer: torch.optim.Optimizer) -> tuple[bool, Said | None]:
        """See `after_step`."""
        begun_s = time.perf_counter()
        decision = first(self._decided)
        self.pending, self.decision = 0, None
        self.sample += 1
        if decision.problem:
            known, self.problem = self.problem == decision.problem, decision.problem
            return False, None if known else Said(decision.problem, {"problem": decision.problem})
        self.problem = ""
        self.placed.adopt(decision.placements, decision.copies, optimizer)
        expected_s = decision.facts.get("expected_ms", 0.0) / 1e3
        if any(decision.facts["moves"]):
            self.whole_steps.begin(step, expected_s)
        elif expected_s:
            self.whole_steps.expected_s = expected_s
        seconds = round(self.begin_s + time.perf_counter() - begun_s, 4)
        facts = {**decision.facts, "seconds": seconds, **self.looked}
        return True, Said(told(facts) if facts["moved"] or self.looked else "", facts)

    def _decided(self) -> Decision:
        assert self.decision is not None
        return self.decision.result()

    def look_at_links(self) -> dict[str, float]:
        """Measure links again where they are not what they were; called by all ranks.

        Looking costs an exchange, so it is left out while steps take as long as was predicted for them.
        """
        usual = self.whole_steps.as_expected(self.spec.interval) and self.sample % LOOK_EVERY
        times = self.link_watch.changed() if self.link_watch and not usual else 0.0
        if not times:
            return {}
        speed_G = self.links.speed_G
        try:
            self.links = replace(probed(self.mesh), speed_G=speed_G)
        except ClusterError:
            return {}  # as they were
        return {"links_slower": round(times, 2)}

    def mean_group(self) -> NDArray[np.float64]:
        """count_LGE of a mean step and a mean expert group since the last decision."""
        assert self.count_LSE is not None
        groups, ranks = self.mesh.layout.dp_replicate * self.mesh.layout.edp_shard, self.placed.axis.size
        return spread_sources(self.count_LSE.cpu().numpy() / (max(self.counted, 1) * groups), ranks)

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

    def decide(
        self, count_LSE: NDArray[np.float64], choice_NLK: NDArray[np.int64], measured: Measured | None
    ) -> Decision:
        """Leader: the placements for the next interval, or what went wrong.

        measured   whole steps under the placements in force, where they are known
        """
        begun_s = time.perf_counter()
        try:
            layers = [self.layer(number, token_SE, choice_NLK) for number, token_SE in enumerate(count_LSE)]
            modelled = modelled_times(layers, self.placed.placements)
            plans = [planner.consider(one, self.sample) for planner, one in zip(self.planners, layers, strict=True)]
            ranks, slots = self.placed.axis.size, self.placed.slots
            placements = [checked(plan.placement, count_LSE.shape[2], ranks, slots) for plan in plans]
        except FAILURES as error:
            return Decision(problem=f"no new placement: {error}; training goes on with the one it has")
        copies = [
            self.placed.copies(number, placement, layer.nearest_EG)
            for number, (placement, layer) in enumerate(zip(placements, layers, strict=True))
        ]
        facts = self._facts(plans, sum(map(len, copies)))
        first = modelled_times(layers, self.first_placements)
        facts["first_ms"] = round(1e3 * sum(one.total_s for one in first), 4)
        if measured:
            planned_s = sum(plan.planned_s if plan.verdict.move else plan.now_s for plan in plans)
            facts["measured_ms"] = round(1e3 * measured.step_s, 4)
            facts["expected_ms"] = round(1e3 * beside(measured, modelled).predicted_s(planned_s), 4)
        facts["search_s"] = round(time.perf_counter() - begun_s, 4)
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

    def _facts(self, plans: list[Plan], moved: int) -> dict[str, Any]:
        moving = [plan for plan in plans if plan.verdict.move]
        return {
            "reason": [str(plan.verdict.reason) for plan in plans],
            "moves": [plan.verdict.move for plan in plans],
            "now_ms": [round(1e3 * plan.now_s, 4) for plan in plans],
            "planned_ms": [round(1e3 * plan.planned_s, 4) for plan in plans],
            "saved_s": round(sum(plan.verdict.saved_s - plan.verdict.cost_s for plan in moving), 4),
            "moved": moved,
            "moved_bytes": round(moved * STATE_BYTES * self.costs.expert_numbers),
        }

    def state(self) -> dict[str, Tensor]:
        """What must be remembered to decide as ever: predictions, counts, the speed reckoned with, what is pending.

        Only the leader's is whole; it waits for its search.
        """
        arrays: dict[str, np.ndarray] = {
            "counted": np.array([self.counted]),
            "rows_per_s": np.array([self.costs.rows_per_s]),
            "pending": np.array([self.pending]),
        }
        if self.count_LSE is not None:
            arrays["count_LSE"] = self.count_LSE.cpu().numpy()
        if self.decision is not None:
            decision = self.decision.result()
            said = json.dumps({"facts": decision.facts, "problem": decision.problem})
            arrays["decision.said"] = np.frombuffer(said.encode(), np.uint8)
            if decision.placements:
                copies = [(number, *copy) for number, layer in enumerate(decision.copies) for copy in layer]
                arrays["decision.copies"] = np.array(copies, np.int64).reshape(-1, 4)
                arrays |= {f"decision.{name}": array for name, array in as_arrays(decision.placements).items()}
        arrays["sample"] = np.array([self.sample])
        for number, planner in enumerate(self.planners):
            if planner.predictor is not None:
                for name, value in vars(planner.predictor).items():
                    arrays[f"predictor.{number}.{name}"] = np.asarray(value)
        return {PREFIX + name: torch.from_numpy(np.atleast_1d(array).copy()) for name, array in arrays.items()}

    def go_back(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` said."""
        if PREFIX + "pending" not in state:
            return
        self.sample = int(state[PREFIX + "sample"])
        self.costs = replace(self.costs, rows_per_s=float(state[PREFIX + "rows_per_s"]))
        count_LSE = state.get(PREFIX + "count_LSE")
        if count_LSE is not None and count_LSE.shape[1] == places(self.mesh.layout):
            self.count_LSE, self.counted = count_LSE.to(self.mesh.device), int(state[PREFIX + "counted"])
        if int(state[PREFIX + "pending"]):
            decision = _decision(state)
            if all(one.held_EG.sum(axis=0).max() <= self.placed.slots for one in decision.placements):
                self.pending, self.decision = int(state[PREFIX + "pending"]), Future()
                self.decision.set_result(decision)
        sources, experts = self.placed.axis.size, len(self.placed.placements[0].device_EP)
        for number, planner in enumerate(self.planners):
            head = f"{PREFIX}predictor.{number}."
            found = {key.removeprefix(head): value.numpy() for key, value in state.items() if key.startswith(head)}
            if found:
                planner.predictor = Predictor(1, sources * experts)
                for name, value in found.items():
                    setattr(planner.predictor, name, int(value[0]) if name == "updates" else value)


def _decision(state: Mapping[str, Tensor]) -> Decision:
    """What was pending."""
    head = PREFIX + "decision."
    arrays = {key.removeprefix(head): value.numpy() for key, value in state.items() if key.startswith(head)}
    said = json.loads(arrays["said"].tobytes())
    placements = from_arrays(arrays) if "copies" in arrays else []
    copies: list[list[Copy]] = [[] for _ in placements]
    for number, *copy in arrays["copies"].tolist() if placements else ():
        copies[number].append(Copy(*copy))
    return Decision(placements=placements, copies=copies, **said)


def modelled_times(layers: Sequence[Layer], placements: Sequence[Placement]) -> list[StepTime]:
    """Every layer under a placement that is there already."""
    pairs = zip(layers, placements, strict=True)
    return [step_time(replace(layer, held_EG=one.held_EG), one) for layer, one in pairs]


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
    whole = f", a whole step {facts['expected_ms']:.4g} ms" if "expected_ms" in facts else ""
    return (
        f"balance: {links}{facts['moved']} experts copied ({bytes_text(facts['moved_bytes'])}), predicted "
        f"exchange and experts {sum(facts['now_ms']):.3g} -> {sum(facts['planned_ms']):.3g} ms{whole}"
    )
