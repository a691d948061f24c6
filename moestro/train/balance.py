"""What a recipe's `[balance]` comes to on this rank: experts in slots, and perhaps a rebalancer that moves them.

    recipe, model, mesh -> open_balance -> Balance(placed, rebalancer) or None: experts stay in order

A network or memory that does not do ends rebalancing with a line, not the run.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moestro.core.errors import ClusterError, ConfigError, Error, PlacementError
from moestro.dist.mesh import Mesh
from moestro.dist.timeline import Spent
from moestro.nn.decoder import Decoder
from moestro.nn.moe import MoE
from moestro.nn.router import RoutingRecord
from moestro.place.compiled import COMPILED
from moestro.place.cost import Placement, contiguous, even_split
from moestro.place.plan_file import read_placements
from moestro.train.balance_spec import default_slots
from moestro.train.device import pick_dtype
from moestro.train.ledger import News
from moestro.train.park import Network, network_of, rows_per_s
from moestro.train.placed import PREFIX, PlacedExperts
from moestro.train.rebalance import Costs, First, Rebalancer, Said, fitting_slots
from moestro.train.recipe import Recipe
from moestro.train.shards import Shards

SLOW = (
    "balance: numba is not installed, so placements are searched a fiftieth as long; pip install 'moestro[place]' for "
    "the whole search"
)


class Balance:
    """Placements in force, and what changes them."""

    def __init__(self, placed: PlacedExperts, rebalancer: Rebalancer | None, news: Sequence[Said]) -> None:
        self.placed, self.rebalancer, self._news = placed, rebalancer, list(news)

    def watch(self, records: Sequence[RoutingRecord]) -> None:
        """Count a step's choices of all ranks."""
        if self.rebalancer:
            self.rebalancer.watch(records)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer, first: First) -> bool:
        """Decide where it is time, and put into force what was decided; True where placements are new."""
        if self.rebalancer is None:
            return False
        new, said = self.rebalancer.after_step(step, first, optimizer)
        if said:
            self._news.append(said)
        return new

    def learn(self, spent: Sequence[Spent]) -> None:
        """Take in where the time of steps went."""
        if self.rebalancer:
            self.rebalancer.whole_steps.learn(spent)

    def news(self, step: int) -> list[News]:
        """What happened since the last call."""
        said, self._news = self._news, []
        return [News("balance", step, one.facts, one.text and f"step {step}  {one.text}") for one in said]

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; called by all ranks."""
        return self.placed.state() | (self.rebalancer.state() if self.rebalancer else {})

    def go_back(self, shards: Shards) -> bool:
        """Take up a checkpoint's placement where it fits and may change; True where it has."""
        if self.rebalancer is None or PREFIX + "expert_LRS" not in shards.shapes:
            return False
        state = {name: shards.read(name) for name in shards.shapes if name.startswith(PREFIX)}
        if not self.placed.go_back(state):
            text = "balance: the checkpoint's placement does not fit these ranks and slots; going on with the first one"
            self._news.append(Said(text, {"problem": text}))
            return False
        self.rebalancer.go_back(state)
        return True


def open_balance(recipe: Recipe, model: Decoder, mesh: Mesh, first: First) -> Balance | None:
    """Called by all ranks before the model is cut; raises ConfigError or PlacementError for a wrong placement file."""
    spec, ranks, layers = recipe.balance, mesh["ep"].size, [m for m in model.modules() if isinstance(m, MoE)]
    if not spec.slotted or ranks == 1 or not layers:
        return None
    experts = layers[0].spec.num_experts
    read: list[Placement] = []
    if spec.placement:
        wanted = {"num_layers": len(layers), "num_experts": experts, "devices": ranks}
        read = first(lambda: read_placements(Path(spec.placement), **wanted))
    needed = max((int(one.held_EG.sum(axis=0).max()) for one in read), default=-(-experts // ranks))
    slots = spec.slots or (max(default_slots(experts, ranks), needed) if spec.enabled else needed)
    news: list[Said] = []
    network: Network | None = None
    if spec.enabled:
        try:
            found = network_of(spec, mesh, first)
            slots = _slots(slots, needed, found, model, layers)
            network = found
            news.append(Said(f"balance: {slots} slots a layer and rank, {found.source}", {"slots": slots}))
        except (ClusterError, ConfigError) as error:
            news.append(_off(error))
        except PlacementError as error:
            slots = needed
            news.append(_off(error))
    if network and not COMPILED:
        news.append(Said(SLOW, {"problem": "numba is not installed"}))
    placements = read or [even_split(contiguous(experts, np.full(ranks, slots)))] * len(layers)
    placed = PlacedExperts(placements, slots, mesh)
    rebalancer = None
    if network:
        costs = _costs(recipe, layers[0], mesh)
        rebalancer = Rebalancer(spec, recipe.train.steps, placed, mesh, network, costs)
    return Balance(placed, rebalancer, news)


def _off(error: Error) -> Said:
    text = f"balance is off: {error}; training goes on with the placement it has"
    return Said(text, {"problem": text})


def _slots(asked: int, needed: int, network: Network, model: Decoder, layers: Sequence[MoE]) -> int:
    """As many slots as memory holds; raises PlacementError where there is no room for a replica."""
    each = sum(parameter[0].numel() for parameter in layers[0].experts.parameters())
    others = sum(parameter.numel() for parameter in model.parameters()) - each * layers[0].spec.num_experts * len(
        layers
    )
    fits = fitting_slots(asked, network, len(layers), each, others)
    if fits < needed or fits == needed < asked:
        raise PlacementError(
            f"memory holds {fits} experts of each layer on a rank and {needed} are needed, so there is no room for a "
            "replica: use more ranks, or correct device.memory_gib"
        )
    return fits


def _costs(recipe: Recipe, layer: MoE, mesh: Mesh) -> Costs:
    """What a row and an expert weigh here; measures the experts' speed."""
    dtype, merges = pick_dtype(recipe.train.precision, mesh.device), recipe.dist.dispatch == "hierarchical"
    extra = 6.0 * layer.spec.router.max_experts if merges else 2.0  # weights and experts go with rows, one way of two
    return Costs(
        token_bytes=layer.experts.width * dtype.itemsize + extra,
        rows_per_s=rows_per_s(layer, dtype, mesh),
        expert_numbers=sum(parameter[0].numel() for parameter in layer.experts.parameters()),
        merges=merges,
    )
