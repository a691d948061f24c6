"""The experts of a model in slots, as the engine of several ranks sees them: the placement in force, and changing it.

    [Placement] -> PlacedExperts -> cut (once) -> replicas (every step) -> adopt (new placements, experts move) -> state

All expert groups have the same placement. What is here is exact whatever the placement; which one is good is decided in
`train/rebalance.py`.

Dimension key:  L sparse layers   E experts   P holders of an expert   R ranks of dist.ep   S slots of a rank
                A groups of ranks with one split   G devices (the ranks)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from moestro.core.errors import PlacementError
from moestro.dist.dispatch import Traffic
from moestro.dist.mesh import Mesh
from moestro.dist.replicas import Copy, ReplicaSum, start_move
from moestro.dist.shard import Exchange, Parts
from moestro.dist.slots import EMPTY, LayerSlots, Slotted, assign, cut_slots, table_of
from moestro.nn.moe import MoE
from moestro.place.cost import Placement

PREFIX = "balance."
"""Of what a checkpoint's state says about placements."""
ARRAYS = ("device_LEP", "share_LAEP", "group_G")


def by_rank(placement: Placement) -> Placement:
    """The same with every expert's holders in order of ranks, -1 last."""
    key_EP = np.where(placement.device_EP < 0, placement.devices, placement.device_EP)
    order_EP = np.argsort(key_EP, axis=1, kind="stable")
    return replace(
        placement,
        device_EP=np.take_along_axis(placement.device_EP, order_EP, axis=1),
        share_AEP=np.take_along_axis(placement.share_AEP, order_EP[None], axis=2),
    )


def checked(placement: Placement, experts: int, ranks: int, slots: int) -> Placement:
    """The placement in order of ranks; raises PlacementError where it cannot be put into force here."""
    if placement.devices != ranks or len(placement.device_EP) != experts or len(placement.group_S) != ranks:
        raise PlacementError(
            f"a placement of {len(placement.device_EP)} experts on {placement.devices} devices is given, the model has "
            f"{experts} on dist.ep = {ranks} ranks; make one with moestro place for this model and these ranks"
        )
    held_G = placement.held_EG.sum(axis=0)
    if held_G.max() > slots or (placement.device_EP >= 0).sum() != held_G.sum():
        raise PlacementError(
            f"a placement puts {held_G.max()} experts on rank {held_G.argmax()}, or one expert twice; a rank has "
            f"{slots} slots: raise balance.slots"
        )
    share_AEP = np.where(placement.device_EP < 0, 0.0, placement.share_AEP)
    if not (np.isfinite(share_AEP).all() and (share_AEP >= 0).all() and np.allclose(share_AEP.sum(axis=2), 1.0)):
        raise PlacementError("shares of a placement are not finite, below 0 or do not sum to 1; make it anew")
    return by_rank(placement)


def as_arrays(placements: Sequence[Placement]) -> dict[str, np.ndarray]:
    """Placements of all layers for a checkpoint, by the names in ARRAYS."""
    most = max(one.device_EP.shape[1] for one in placements)

    def padded(values: np.ndarray, fill: float) -> np.ndarray:
        width = [(0, 0)] * (values.ndim - 1) + [(0, most - values.shape[-1])]
        return np.pad(values, width, constant_values=fill)

    return {
        "device_LEP": np.stack([padded(one.device_EP, -1) for one in placements]),
        "share_LAEP": np.stack([padded(one.share_AEP, 0.0) for one in placements]),
        "group_G": placements[0].group_S,
    }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> list[Placement]:
    """The inverse; every rank is a source."""
    group_G = arrays["group_G"]
    return [
        Placement(device_EP=device_EP, share_AEP=share_AEP, group_S=group_G, devices=len(group_G))
        for device_EP, share_AEP in zip(arrays["device_LEP"], arrays["share_LAEP"], strict=True)
    ]


class PlacedExperts:
    """One placement per sparse layer, in force."""

    def __init__(self, placements: Sequence[Placement], slots: int, mesh: Mesh) -> None:
        self.mesh, self.axis, self.slots = mesh, mesh["ep"], slots
        self.beside = mesh.beside("ep")
        self.replicas = ReplicaSum(self.axis)
        self.traffic: list[Traffic] = []
        nowhere = torch.full((self.axis.size, slots), EMPTY)
        self.placements = [checked(one, len(one.device_EP), self.axis.size, slots) for one in placements]
        self.layers = [
            LayerSlots("", table_of(assign(_held(one), nowhere), self._own_share(one), mesh.device))
            for one in self.placements
        ]

    def _own_share(self, placement: Placement) -> Tensor:
        return torch.from_numpy(placement.share_AEP[placement.group_S[self.axis.index]])

    def cut(self, name: str, moe: MoE, exchange: Exchange) -> tuple[Parts, Slotted]:
        """See `dist.shard.CutExperts`; called for one layer after the other."""
        layer = next(layer for layer in self.layers if layer.experts is None)
        parts = cut_slots(name, moe, layer, self.axis)
        self.replicas.follow([layer for layer in self.layers if layer.experts is not None])
        return parts, Slotted(exchange, layer)

    @property
    def parts(self) -> Parts:
        """What this rank holds now."""
        held: Parts = {}
        for layer in self.layers:
            held |= layer.held(self.axis.index)
        return held

    def arrive(self) -> None:
        """Wait for all experts on their way."""
        for layer in self.layers:
            layer.arrive()

    def copies(self, number: int, placement: Placement, nearest_EG: np.ndarray) -> list[Copy]:
        """What a new placement of a layer has to copy, each from the nearest holder."""
        held_EG = self.placements[number].held_EG
        expert_N, to_N = np.nonzero(placement.held_EG & ~held_EG)
        return [Copy(int(e), int(nearest_EG[e, to]), int(to)) for e, to in zip(expert_N, to_N, strict=True)]

    def adopt(
        self, placements: Sequence[Placement], copies: Sequence[Sequence[Copy]], optimizer: torch.optim.Optimizer
    ) -> float:
        """Put placements into force; experts and their moments begin to move. Returns the bytes this rank sends."""
        sent_bytes = 0.0
        for number, (layer, placement) in enumerate(zip(self.layers, placements, strict=True)):
            layer.arrive()
            assert layer.experts is not None
            before = layer.table
            expert_RS = assign(_held(placement), before.expert_RS)
            layer.table = table_of(expert_RS, self._own_share(placement), self.mesh.device)
            self.placements[number] = placement
            if not torch.equal(expert_RS, before.expert_RS):
                tensors = with_moments(layer, optimizer)
                layer.arrival = moving = start_move(tensors, before, layer.table, copies[number], self.beside)
                sent_bytes += moving.sent_bytes
        self.replicas.follow(self.layers)
        return sent_bytes

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint says of the placements."""
        arrays = as_arrays(self.placements)
        arrays["expert_LRS"] = torch.stack([layer.table.expert_RS for layer in self.layers]).numpy()
        return {PREFIX + name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def go_back(self, state: Mapping[str, Tensor]) -> bool:
        """Take up a checkpoint's placements, weights still to be read; False where they do not fit these ranks."""
        expert_LRS = state[PREFIX + "expert_LRS"]
        layers, ranks, _ = expert_LRS.shape
        most = int((expert_LRS >= 0).sum(2).max())
        if (layers, ranks) != (len(self.layers), self.axis.size) or most > self.slots:
            return False
        if expert_LRS.shape[2] != self.slots:  # the same holders, in other slots
            expert_LRS = _packed(expert_LRS, self.slots)
        self.placements = from_arrays({name: state[PREFIX + name].numpy() for name in ARRAYS})
        for number, (layer, placement) in enumerate(zip(self.layers, self.placements, strict=True)):
            layer.table = table_of(expert_LRS[number], self._own_share(placement), self.mesh.device)
        self.replicas.follow(self.layers)
        return True


def _packed(expert_LRS: Tensor, slots: int) -> Tensor:
    """The same experts in the first of so many slots."""
    front_LRS = expert_LRS.sort(dim=2, descending=True).values[:, :, :slots]
    missing = slots - front_LRS.shape[2]
    return torch.nn.functional.pad(front_LRS, (0, missing), value=EMPTY)


def _held(placement: Placement) -> Tensor:
    return torch.from_numpy(placement.held_EG)


def with_moments(layer: LayerSlots, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """A layer's weights, each followed by what the optimiser keeps of it per number."""
    assert layer.experts is not None
    tensors: list[Tensor] = []
    for parameter in layer.experts.parameters():
        entries = optimizer.state.get(parameter, {})
        tensors += [parameter.detach(), *(entries[key] for key in sorted(entries) if entries[key].dim())]
    return tensors
