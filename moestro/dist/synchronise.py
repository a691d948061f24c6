"""Copies of a model that learn apart and meet now and then, in place of summing gradients in every step.

    local    every `sync_every` steps weights become their mean over the copies (local SGD, Stich 2019); before
             `sync_after` steps gradients are summed in every step (post-local SGD, Lin 2020)
    diloco   the mean change of the weights is the gradient of an outer optimiser with Nesterov momentum (Douillard 2023)
    stale    every copy applies its own update at once and the others' when they arrive, at most `staleness` steps late:
             no copy runs further ahead than that (stale synchronous parallel, Ho 2013)
    hybrid   stale between copies that are themselves several ranks, inside which every step is synchronous

A copy is all ranks with one place on dp_replicate. What travels between copies may be compressed (dist.compression);
what of its change a copy has not sent stays in its own weights, so that it goes on learning from what it has learned,
and is sent later. `local` with sync_every = 1 compresses what the optimiser makes of gradients instead of gradients:
Adam divides a number that is sent now and then by its own rarity, and so undoes error feedback.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moestro.dist.compression import Compressor, below, make, methods_by_tensor, ring_bytes
from moestro.dist.mesh import Axis, Pending
from moestro.dist.shard import Parts, local
from moestro.dist.spec import DistSpec


class Synchroniser(Protocol):
    """Called before and after every optimiser step of a copy."""

    @property
    def sent_bytes(self) -> float:
        """Sent by this rank to other copies so far."""
        ...

    def before_step(self) -> None:
        """The optimiser is about to move the weights."""
        ...

    def after_step(self, steps_done: int) -> None:
        """It has."""
        ...

    def meet(self) -> None:
        """Make all copies equal now; on all ranks at the same step."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What it must remember to go on exactly, after a meeting."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        ...


@dataclass(slots=True)
class _Group:
    """Weights that travel together."""

    members: list[nn.Parameter]
    compressor: Compressor
    anchor: Tensor
    """The weights of the last meeting."""
    velocity: Tensor

    @classmethod
    def of(cls, members: list[nn.Parameter], compressor: Compressor) -> "_Group":
        """From here on."""
        anchor = _flat(members)
        return cls(members, compressor, anchor, torch.zeros_like(anchor))


class Periodic:
    """local and diloco: an outer step every `sync_every` steps; local has rate 1 and no momentum.

    Only weights that the same ranks of a copy hold are compressed together: they all decode the same.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], parts: Parts, axis: Axis, spec: DistSpec) -> None:
        self.axis, self.spec, self.moved = axis, spec, False
        self.rate, self.momentum = (spec.outer_lr, spec.outer_momentum) if spec.sync == "diloco" else (1.0, 0.0)
        tied = [name for name in parameters if "ends" in parts[name].same_on]  # both choose a method from other sizes
        methods = methods_by_tensor({name: parameter.numel() for name, parameter in parameters.items()}, spec, tied)
        names: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for name in parameters:
            names.setdefault((methods[name], parts[name].same_on), []).append(name)
        self.groups = {
            members[0]: _Group.of([parameters[name] for name in members], make(method, spec, axis))
            for (method, _), members in names.items()
        }
        self.met_bytes = 0.0

    @property
    def sent_bytes(self) -> float:
        """See `Synchroniser`."""
        return self.met_bytes + sum(group.compressor.sent_bytes for group in self.groups.values())

    def before_step(self) -> None:
        """Nothing to do."""

    def after_step(self, steps_done: int) -> None:
        """See `Synchroniser`."""
        self.moved = steps_done > self.spec.sync_after
        if not self.moved:  # gradients were summed: the copies are equal
            for group in self.groups.values():
                group.anchor = _flat(group.members)
        elif steps_done % self.spec.sync_every == 0:
            self._outer_step()

    @torch.no_grad()
    def _outer_step(self) -> None:
        self.moved = False
        for group in self.groups.values():
            change = group.anchor - _flat(group.members)
            shapes = [local(member.detach()).shape for member in group.members]
            gradient = group.compressor.sum(change, shapes) / self.axis.size
            group.velocity.mul_(self.momentum).add_(gradient)
            group.anchor.sub_(self.rate * (gradient + self.momentum * group.velocity))
            _fill(group.members, group.anchor - group.compressor.take_unsent())

    @torch.no_grad()
    def meet(self) -> None:
        """They met at the last outer step, up to what was not sent, unless the run ends between two."""
        if self.moved:
            self._outer_step()
        if self.spec.compression == "none":
            return
        for group in self.groups.values():
            mine = _flat(group.members)
            self.met_bytes += ring_bytes(mine.numel() * mine.element_size(), self.axis.size)
            group.anchor = self.axis.sum(mine) / self.axis.size
            _fill(group.members, group.anchor)

    def state(self) -> dict[str, Tensor]:
        """The outer momentum, and what compressors owe; anchors are the weights."""
        found: dict[str, Tensor] = {}
        for name, group in self.groups.items():
            found |= {f"{name}.{key}": value for key, value in group.compressor.state().items()}
            found |= {f"{name}.velocity": group.velocity} if self.momentum else {}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Synchroniser`."""
        for name, group in self.groups.items():
            mine = below(name, tensors)
            group.velocity = mine.pop("velocity", group.velocity)
            group.compressor.load(mine)


class BoundedStaleness:
    """stale and hybrid: updates of other copies arrive at most `staleness` steps late."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], axis: Axis, spec: DistSpec) -> None:
        self.members, self.axis, self.staleness, self._sent = list(parameters.values()), axis, spec.staleness, 0.0
        self.under_way: deque[tuple[Tensor, Pending]] = deque()
        self.before = _flat(self.members)

    @property
    def sent_bytes(self) -> float:
        """See `Synchroniser`."""
        return self._sent

    def before_step(self) -> None:
        """Remember the weights."""
        self.before = _flat(self.members)

    @torch.no_grad()
    def after_step(self, steps_done: int) -> None:
        """Apply our share of our update, send it, and take in what has to be here by now."""
        own = (_flat(self.members) - self.before) / self.axis.size
        self.under_way.append((own, self.axis.begin_sum(own)))
        self._sent += ring_bytes(own.numel() * own.element_size(), self.axis.size)
        _fill(self.members, self.before + own)
        self._take(self.staleness)

    def _take(self, left: int) -> None:
        """Wait until at most so many updates are under way."""
        while len(self.under_way) > left:
            own, total = self.under_way.popleft()
            _fill(self.members, _flat(self.members) + total.wait() - own)

    @torch.no_grad()
    def meet(self) -> None:
        """Take in everything; then the mean, as copies have added up the same updates in other orders."""
        self._take(0)
        _fill(self.members, self.axis.sum(_flat(self.members)) / self.axis.size)

    def state(self) -> dict[str, Tensor]:
        """Nothing: no update is under way after a meeting."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing."""


def make_synchroniser(
    parameters: Mapping[str, nn.Parameter], parts: Parts, axis: Axis, spec: DistSpec
) -> Synchroniser | None:
    """What the recipe asks for; None where every step is synchronous."""
    if spec.sync == "step" or axis.size == 1:
        return None
    if spec.sync in ("local", "diloco"):
        return Periodic(parameters, parts, axis, spec)
    return BoundedStaleness(parameters, axis, spec)


@torch.no_grad()
def average(tensors: list[Tensor], axis: Axis) -> None:
    """Replace floating-point tensors by their mean over an axis."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.copy_(axis.sum(tensor) / axis.size)


def _flat(members: list[nn.Parameter]) -> Tensor:
    return torch.cat([local(member.detach()).flatten() for member in members])


def _fill(members: list[nn.Parameter], flat: Tensor) -> None:
    here = [local(member.detach()) for member in members]
    for tensor, part in zip(here, flat.split([tensor.numel() for tensor in here]), strict=True):
        tensor.copy_(part.view_as(tensor))
