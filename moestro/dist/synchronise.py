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
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.dist.compression import make, methods_by_tensor, ring_bytes
from moestro.dist.mesh import Axis
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


class Periodic:
    """local and diloco: an outer step every `sync_every` steps; local has rate 1 and no momentum."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], axis: Axis, spec: DistSpec) -> None:
        self.axis, self.spec = axis, spec
        self.rate, self.momentum = (spec.outer_lr, spec.outer_momentum) if spec.sync == "diloco" else (1.0, 0.0)
        methods = methods_by_tensor({name: parameter.numel() for name, parameter in parameters.items()}, spec)
        self.groups = {
            method: [parameters[name] for name in parameters if methods[name] == method]
            for method in sorted(set(methods.values()))
        }
        self.compressors = {method: make(method, spec, axis) for method in self.groups}
        self.anchors = {method: _flat(members) for method, members in self.groups.items()}
        self.velocity = {method: torch.zeros_like(anchor) for method, anchor in self.anchors.items()}
        self.met_bytes = 0.0

    @property
    def sent_bytes(self) -> float:
        """See `Synchroniser`."""
        return self.met_bytes + sum(compressor.sent_bytes for compressor in self.compressors.values())

    def before_step(self) -> None:
        """Nothing to do."""

    def after_step(self, steps_done: int) -> None:
        """See `Synchroniser`."""
        if steps_done <= self.spec.sync_after:  # gradients were summed: the copies are equal
            self.anchors = {method: _flat(members) for method, members in self.groups.items()}
        elif steps_done % self.spec.sync_every == 0:
            self._outer_step()

    @torch.no_grad()
    def _outer_step(self) -> None:
        for method, members in self.groups.items():
            anchor, velocity = self.anchors[method], self.velocity[method]
            change = anchor - _flat(members)
            shapes = [member.shape for member in members]
            gradient = self.compressors[method].sum(change, shapes) / self.axis.size
            velocity.mul_(self.momentum).add_(gradient)
            anchor.sub_(self.rate * (gradient + self.momentum * velocity))
            _fill(members, anchor - self.compressors[method].take_unsent())

    @torch.no_grad()
    def meet(self) -> None:
        """They met at the last outer step, up to what was not sent."""
        if self.spec.compression == "none":
            return
        for method, members in self.groups.items():
            mine = _flat(members)
            self.met_bytes += ring_bytes(mine.numel() * mine.element_size(), self.axis.size)
            self.anchors[method] = self.axis.sum(mine) / self.axis.size
            _fill(members, self.anchors[method])


class BoundedStaleness:
    """stale and hybrid: updates of other copies arrive at most `staleness` steps late."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], axis: Axis, spec: DistSpec) -> None:
        self.members, self.axis, self.staleness, self._sent = list(parameters.values()), axis, spec.staleness, 0.0
        self.under_way: deque[tuple[Any, Tensor, Tensor]] = deque()
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
        total = own.clone()
        work = dist.all_reduce(total, group=self.axis.group, async_op=True)
        self._sent += 2 * (self.axis.size - 1) / self.axis.size * total.numel() * total.element_size()
        self.under_way.append((work, own, total))
        _fill(self.members, self.before + own)
        self._take(self.staleness)

    def _take(self, left: int) -> None:
        """Wait until at most so many updates are under way."""
        while len(self.under_way) > left:
            work, own, total = self.under_way.popleft()
            work.wait()
            _fill(self.members, _flat(self.members) + total - own)

    @torch.no_grad()
    def meet(self) -> None:
        """Take in everything; then the mean, as copies have added up the same updates in other orders."""
        self._take(0)
        _fill(self.members, self.axis.sum(_flat(self.members)) / self.axis.size)


def make_synchroniser(parameters: Mapping[str, nn.Parameter], axis: Axis, spec: DistSpec) -> Synchroniser | None:
    """What the recipe asks for; None where every step is synchronous."""
    if spec.sync == "step" or axis.size == 1:
        return None
    if spec.sync in ("local", "diloco"):
        return Periodic(parameters, axis, spec)
    return BoundedStaleness(parameters, axis, spec)


@torch.no_grad()
def average(tensors: list[Tensor], axis: Axis) -> None:
    """Replace floating-point tensors by their mean over an axis."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.copy_(axis.sum(tensor) / axis.size)


def _flat(members: list[nn.Parameter]) -> Tensor:
    return torch.cat([member.detach().flatten() for member in members])


def _fill(members: list[nn.Parameter], flat: Tensor) -> None:
    for member, part in zip(members, flat.split([member.numel() for member in members]), strict=True):
        member.data.copy_(part.view_as(member))
