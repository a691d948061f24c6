"""Experts in slots: any rank may hold any expert, popular ones several ranks, and each serves a share of its tokens.

    expert_TK -> SlotTable.slots -> slot_TK -> AllToAll / Hierarchical, which see slots as they would see experts

Every rank of the expert axis has S slots per layer; a slot holds one expert or is empty, and a slot's number is
rank * S + place. Of a rank's tokens of one expert, in the order of tokens, the first share goes to the expert's first
holder, the next to the second, and so on: a pure function of the choice and the table, so the router is not touched,
and what tokens of two experts have in common stays together. The first holder is the expert's home: it counts in norms and
writes checkpoints.

Dimension key:  T tokens   K choices   N routed rows   E experts   P holders of an expert   R ranks   S slots of a rank
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from moestro.core.errors import ConfigError
from moestro.dist.mesh import Axis
from moestro.dist.shard import Held, Parts, keep, whole
from moestro.nn.experts import AnyExperts, LowRankExperts, Path
from moestro.nn.moe import Dispatcher, MoE
from moestro.nn.permute import sort_by_expert
from moestro.nn.routing_rules import Choice

EMPTY = -1
ALIGNED = 16
"""Numbers of an expert must fill whole vectors, else an update rounds by where in the tensor it lies."""
SAMPLE = 512
"""Tokens of a forward pass whose choice is kept for whoever asks what is chosen together."""


class Arrival(Protocol):
    """Experts on their way."""

    def finish(self) -> None:
        """Wait, and put them into their slots."""
        ...


@dataclass(frozen=True, slots=True)
class SlotTable:
    """One layer's slots, as one rank uses them."""

    expert_RS: Tensor
    """The expert in every slot, `EMPTY` for none; on the CPU."""
    slot_EP: Tensor
    """Numbers of the slots that hold an expert, rising; the last one fills up."""
    bound_EP: Tensor
    """Where the share of each holder ends, in 0..1; float64."""

    @property
    def size(self) -> int:
        """Slots of one rank."""
        return self.expert_RS.shape[1]

    @property
    def replicated(self) -> bool:
        """Whether any expert has two holders."""
        return self.slot_EP.shape[1] > 1

    def home(self, expert: int) -> int:
        """The slot of an expert's first holder."""
        return int(self.slot_EP[expert, 0])

    def slots(self, expert_TK: Tensor) -> Tensor:
        """slot_TK; R * S marks an unused choice, as the number of experts does in expert_TK."""
        none, experts = self.expert_RS.numel(), len(self.slot_EP)
        if not self.replicated:
            return torch.cat([self.slot_EP[:, 0], self.slot_EP.new_tensor([none])])[expert_TK]
        order = sort_by_expert(expert_TK, experts)
        end_EP = (self.bound_EP * order.count_E[:, None] + 0.5).floor().long()
        count_EP = end_EP.diff(dim=1, prepend=end_EP.new_zeros(experts, 1))
        slot_TK = torch.full_like(expert_TK, none)
        slot_TK.view(-1)[order.source_N] = self.slot_EP.flatten().repeat_interleave(
            count_EP.flatten(), output_size=len(order.source_N)
        )
        return slot_TK


def table_of(expert_RS: Tensor, share_EP: Tensor, device: torch.device) -> SlotTable:
    """The table of a rank whose tokens are served by each expert's holders, in order of ranks, in these shares."""
    experts, most = share_EP.shape
    flat = expert_RS.flatten()
    filled = (flat >= 0).nonzero().flatten()
    by_expert = filled[flat[filled].argsort(stable=True)]
    count_E = torch.bincount(flat[filled], minlength=experts)
    last_E = count_E.cumsum(0)
    place_EP = (last_E - count_E)[:, None] + torch.arange(most)
    slot_EP = by_expert[place_EP.minimum((last_E - 1)[:, None])]
    bound_EP = share_EP.double().cumsum(1).masked_fill(torch.arange(most) >= (count_E - 1)[:, None], 1.0)
    return SlotTable(expert_RS, slot_EP.to(device), bound_EP.clamp(max=1.0).to(device))


def assign(held_ER: Tensor, expert_RS: Tensor) -> Tensor:
    """Slots for new holders: who stays keeps its slot, newcomers take the first free ones, in order of experts."""
    new_RS = expert_RS.clone()
    for rank, row_S in enumerate(new_RS):
        held_E = held_ER[:, rank]
        for place, expert in enumerate(row_S.tolist()):
            if expert >= 0 and not held_E[expert]:
                row_S[place] = EMPTY
        there = set(row_S.tolist())
        free = (row_S == EMPTY).nonzero().flatten().tolist()
        wanted = [expert for expert in held_E.nonzero().flatten().tolist() if expert not in there]
        assert len(wanted) <= len(free)
        for place, expert in zip(free, wanted, strict=False):
            row_S[place] = expert
    return new_RS


@dataclass(slots=True)
class LayerSlots:
    """One layer's slots while training goes on."""

    name: str
    """Of its experts in the model."""
    table: SlotTable
    experts: AnyExperts | None = None
    arrival: Arrival | None = None
    """What must be here before the next forward pass."""
    recent_TK: Tensor | None = None
    """What some tokens of the last forward pass chose."""

    def arrive(self) -> None:
        """Wait for experts on their way."""
        if self.arrival is not None:
            self.arrival.finish()
            self.arrival = None

    def held(self, rank: int) -> Parts:
        """What a rank holds of the layer's parameters, by their names in the model."""
        assert self.experts is not None
        own_S, experts = self.table.expert_RS[rank].tolist(), len(self.table.slot_EP)
        parts: Parts = {}
        for name, weight in self.experts.named_parameters():
            sides = tuple((0, size) for size in weight.shape[1:])
            filled = [(place, expert) for place, expert in enumerate(own_S) if expert >= 0]
            parts[f"{self.name}.{name}"] = Held(
                shape=(experts, *weight.shape[1:]),
                boxes=tuple(((expert, expert + 1), *sides) for _, expert in filled),
                sum_over="edp",
                same_on=("edp",),
                starts=tuple(place for place, _ in filled),
                spare=tuple(self.table.home(expert) != rank * self.table.size + place for place, expert in filled),
            )
        return parts


class Slotted:
    """Sends tokens to slots instead of experts."""

    def __init__(self, inner: Dispatcher, layer: LayerSlots) -> None:
        self.inner, self.layer = inner, layer

    def __call__(self, x_TD: Tensor, choice: Choice, experts: AnyExperts, path: Path) -> Tensor:
        """See `nn.moe.Dispatcher`."""
        self.layer.arrive()
        self.layer.recent_TK = choice.expert_TK[:SAMPLE]
        return self.inner(x_TD, replace(choice, expert_TK=self.layer.table.slots(choice.expert_TK)), experts, path)


def cut_slots(name: str, moe: MoE, layer: LayerSlots, axis: Axis) -> Parts:
    """Leave in a layer the experts of this rank's slots, zeros in empty ones."""
    experts = moe.experts
    if isinstance(experts, LowRankExperts):
        raise ConfigError("balance does not go with model.moe.sharing low_rank; set balance.enabled=false")
    own_S = layer.table.expert_RS[axis.index]
    for key, weight in list(experts.named_parameters()):
        if weight[0].numel() % ALIGNED:
            raise ConfigError(
                f"model.width x model.moe.expert_width is {experts.width} x {experts.hidden}; with balance it must be "
                f"a multiple of {ALIGNED}, so that copies of an expert round alike"
            )
        own = torch.zeros(len(own_S), *weight.shape[1:], dtype=weight.dtype, device=weight.device)
        own[own_S >= 0] = weight.detach()[own_S[own_S >= 0]]
        keep(experts, key, own)
    experts.num_experts = len(own_S)
    layer.name, layer.experts = name, experts
    return layer.held(axis.index)
