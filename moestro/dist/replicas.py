"""Keep the holders of an expert equal, and bring experts to new holders while training goes on.

    backward -> ReplicaSum()          every holder's gradient goes home, the sum comes back
    update   -> start_move() -> ... -> Moving.finish()    weights and moments, between an update and the next forward pass

Both are one exchange with uneven sizes: who sends what follows from the tables, which all ranks have, so nothing is asked
for. The home adds in the order of ranks and all holders apply the same sum to the same weights and moments: they stay
equal to the bit. A move runs on process groups of its own (`Mesh.beside`), so that training's exchanges pass it.

Dimension key:  N numbers   E experts   R ranks   S slots of a rank
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moestro.dist.mesh import Axis, Pending
from moestro.dist.slots import LayerSlots, SlotTable


class _Piece(NamedTuple):
    """One expert's gradient between this rank and a peer."""

    peer: int
    place: int
    """Of its slot on this rank."""
    parameters: list[nn.Parameter]


class ReplicaSum:
    """Sums the gradients of experts that several ranks of the expert axis hold."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.away: list[_Piece] = []
        """Ours whose home is elsewhere, by home."""
        self.home: list[_Piece] = []
        """Others' whose home is here, by their rank."""
        self.parameters: list[nn.Parameter] = []
        self.needed, self.sent_bytes = False, 0.0

    def follow(self, layers: Sequence[LayerSlots]) -> None:
        """Learn who holds what from now on."""
        own = self.axis.index
        self.away, self.home, self.parameters = [], [], []
        for layer in layers:
            assert layer.experts is not None
            parameters, size = list(layer.experts.parameters()), layer.table.size
            self.parameters += parameters
            for slot_P in layer.table.slot_EP.tolist():
                (home, home_place), *others = (divmod(slot, size) for slot in sorted(set(slot_P)))
                for rank, place in others:
                    if rank == own:
                        self.away.append(_Piece(home, place, parameters))
                    if home == own:
                        self.home.append(_Piece(rank, home_place, parameters))
        self.away.sort(key=lambda piece: piece.peer)  # stable: layers and experts stay in order
        self.home.sort(key=lambda piece: piece.peer)
        self.needed = any(layer.table.replicated for layer in layers)

    @torch.no_grad()
    def __call__(self) -> None:
        """Sum; a parameter without a gradient counts as zero."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if not self.needed:
            return
        out, into = self._sizes(self.away), self._sizes(self.home)
        came_N = self.axis.begin_swap(self._flat(self.away), out, into).wait()
        for grad, part in _with(self.home, came_N):
            grad += part
        back_N = self.axis.begin_swap(self._flat(self.home), into, out).wait()
        for grad, part in _with(self.away, back_N):
            grad.copy_(part)
        self.sent_bytes += 4.0 * (sum(out) + sum(into))

    def _sizes(self, pieces: list[_Piece]) -> list[int]:
        """Numbers to or from every rank."""
        sizes = [0] * self.axis.size
        for piece in pieces:
            sizes[piece.peer] += sum(parameter[0].numel() for parameter in piece.parameters)
        return sizes

    def _flat(self, pieces: list[_Piece]) -> Tensor:
        parts = [grad.flatten() for grad in _grads(pieces)]
        return torch.cat(parts) if parts else torch.zeros(0, device=self.parameters[0].device)


def _grads(pieces: Iterable[_Piece]) -> list[Tensor]:
    return [
        parameter.grad[piece.place]
        for piece in pieces
        for parameter in piece.parameters
        if parameter.grad is not None
    ]


def _with(pieces: list[_Piece], flat_N: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Every gradient beside its part of a message."""
    grads = _grads(pieces)
    parts = flat_N.split([grad.numel() for grad in grads]) if grads else ()
    return [(grad, part.view_as(grad)) for grad, part in zip(grads, parts, strict=True)]


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
