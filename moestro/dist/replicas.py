"""Keep the holders of an expert equal, and bring experts to new holders while training goes on.

    backward -> ReplicaSum()          every holder adds up a part of the gradient, and the parts come back to all
    update   -> start_move() -> ... -> Moving.finish()    weights and moments, between an update and the next forward pass

All are exchanges with uneven sizes: who sends what follows from the tables, which all ranks have, so nothing is asked
for. Of an expert with r holders each adds up one r-th, in the order of ranks, so that links carry as much out as in, both
times; all holders apply the same sum to the same weights and moments: they stay equal to the bit. A move runs on process groups of its own (`Mesh.beside`), so that training's exchanges pass it.

Dimension key:  N numbers   E experts   R ranks   S slots of a rank
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moestro.dist.mesh import Axis, Pending
from moestro.dist.slots import LayerSlots, SlotTable


@dataclass(frozen=True, slots=True)
class _Shared:
    """One expert that this rank and others hold."""

    ranks: list[int]
    """Its holders, rising."""
    own: int
    """Our place among them."""
    place: int
    """Of its slot here."""
    parameters: list[nn.Parameter]

    @property
    def others(self) -> list[tuple[int, int]]:
        """Place and rank of every other holder."""
        return [(place, rank) for place, rank in enumerate(self.ranks) if place != self.own]

    def grads(self) -> list[Tensor]:
        """Views of this rank's gradient."""
        return [parameter.grad[self.place] for parameter in self.parameters if parameter.grad is not None]


class ReplicaSum:
    """Sums the gradients of experts that several ranks of the expert axis hold."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.shared: list[_Shared] = []
        """In order of layers and experts, on every rank."""
        self.parameters: list[nn.Parameter] = []
        self.needed, self.sent_bytes = False, 0.0

    def follow(self, layers: Sequence[LayerSlots]) -> None:
        """Learn who holds what from now on."""
        self.shared, self.parameters = [], []
        for layer in layers:
            assert layer.experts is not None
            parameters, size = list(layer.experts.parameters()), layer.table.size
            self.parameters += parameters
            for slot_P in layer.table.slot_EP.tolist():
                ranks, places = zip(*(divmod(slot, size) for slot in sorted(set(slot_P))), strict=True)
                if len(ranks) > 1 and self.axis.index in ranks:
                    own = ranks.index(self.axis.index)
                    self.shared.append(_Shared(list(ranks), own, places[own], parameters))
        self.needed = any(layer.table.replicated for layer in layers)

    @torch.no_grad()
    def __call__(self) -> None:
        """Sum; a parameter without a gradient counts as zero."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if not self.needed:
            return
        cuts = [torch.cat([grad.flatten() for grad in one.grads()]).tensor_split(len(one.ranks)) for one in self.shared]
        parts_R: list[list[Tensor]] = [[] for _ in self.axis.ranks]
        room_R: list[list[int]] = [[] for _ in self.axis.ranks]
        for one, cut in zip(self.shared, cuts, strict=True):
            for place, rank in one.others:
                parts_R[rank].append(cut[place])
                room_R[rank].append(len(cut[one.own]))
        came_R = self._swap(parts_R, room_R)
        sums = []
        for one, cut in zip(self.shared, cuts, strict=True):
            parts = [next(came_R[rank]) if rank != self.axis.index else cut[one.own] for rank in one.ranks]
            sums.append(sum(parts[1:], start=parts[0]))
        back_R: list[list[Tensor]] = [[] for _ in self.axis.ranks]
        for one, total_N in zip(self.shared, sums, strict=True):
            for _, rank in one.others:
                back_R[rank].append(total_N)
        came_R = self._swap(back_R, [[len(part) for part in parts] for parts in parts_R])
        for one, total_N in zip(self.shared, sums, strict=True):
            grads = one.grads()
            whole_N = torch.cat([next(came_R[rank]) if rank != self.axis.index else total_N for rank in one.ranks])
            for grad, part in zip(grads, whole_N.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def _swap(self, parts_R: list[list[Tensor]], room_R: list[list[int]]) -> list[Iterator[Tensor]]:
        """Send parts to every rank; what comes from each, cut as `room_R` says."""
        parts = [part for parts in parts_R for part in parts]
        sent_N = torch.cat(parts) if parts else self.parameters[0].new_zeros(0)
        send = [sum(map(len, parts)) for parts in parts_R]
        receive = [sum(room) for room in room_R]
        came_N = self.axis.begin_swap(sent_N, send, receive).wait()
        self.sent_bytes += 4.0 * sum(send)
        return [iter(one.split(room)) for one, room in zip(came_N.split(receive), room_R, strict=True)]


class Copy(NamedTuple):
    """An expert that gets a further holder."""

    expert: int
    source: int
    """Rank that sends it."""
    to: int


@dataclass(slots=True)
class Moving:
    """Experts of one layer on their way to this rank."""

    pending: Pending | None
    sent_bytes: float
    """By this rank."""
    places: list[Tensor]
    """Where the parts of what comes belong."""

    @torch.no_grad()
    def finish(self) -> None:
        """Wait, and put the experts into their slots."""
        if self.pending is None:
            return
        came_N = self.pending.wait()
        parts = came_N.split([place.numel() for place in self.places]) if self.places else ()
        for place, part in zip(self.places, parts, strict=True):
            place.copy_(part.view_as(place))


@torch.no_grad()
def start_move(
    tensors: Sequence[Tensor], before: SlotTable, after: SlotTable, copies: Sequence[Copy], axis: Axis
) -> Moving:
    """Send experts to their new holders; slots given up are zeroed at once.

    tensors   [slots, ...]: the layer's weights and their moments, in the same order on every rank
    copies    all of this layer's, the same on every rank; the source holds the expert before
    """
    own = axis.index
    here = {expert: place for place, expert in enumerate(before.expert_RS[own].tolist()) if expert >= 0}
    there = {expert: place for place, expert in enumerate(after.expert_RS[own].tolist()) if expert >= 0}
    each = sum(tensor[0].numel() for tensor in tensors)
    send, receive = [0] * axis.size, [0] * axis.size
    out: list[Tensor] = []
    into: list[int] = []
    for copy in sorted(copies, key=lambda copy: (copy.source, copy.to, copy.expert)):
        if copy.source == own:
            send[copy.to] += each
            out += [tensor[here[copy.expert]].flatten() for tensor in tensors]
        if copy.to == own:
            receive[copy.source] += each
            into.append(there[copy.expert])
    sent_N = torch.cat(out) if out else tensors[0].new_zeros(0)
    changed = (before.expert_RS[own] != after.expert_RS[own]).nonzero().flatten().tolist()
    for tensor in tensors:
        tensor[changed] = 0.0
    pending = axis.begin_swap(sent_N, send, receive, beside=True) if copies else None
    return Moving(pending, 4.0 * sent_N.numel(), [tensor[place] for place in into for tensor in tensors])
