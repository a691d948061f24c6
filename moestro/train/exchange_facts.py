"""What dispatch did in a step, for the log: rows of every rank beside their mean, bytes inside and between nodes.

Each rank says which rows it sent where, from its routing counts and its shares, and what it counted in exchanges; the
numbers travel with the loss in one message (`Ranks.total`).

Dimension key:  L sparse layers   E experts   R ranks of dist.ep
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moestro.dist.dispatch import Traffic
from moestro.dist.mesh import Mesh
from moestro.nn.decoder import Decoder
from moestro.nn.moe import MoE
from moestro.nn.router import RoutingRecord
from moestro.place.cost import Placement, contiguous, even_split


def exchange_facts(model: Decoder, mesh: Mesh, placements: Sequence[Placement] | None) -> "ExchangeFacts | None":
    """For a model that is cut; None where all experts are on one rank. Without placements experts are in order."""
    moe, axis = model.spec.moe, mesh["ep"]
    if moe is None or axis.size == 1 or not model.spec.moe_layers:
        return None
    in_order = even_split(contiguous(moe.num_experts, np.full(axis.size, moe.num_experts)))
    traffic = [traffic_of(module.dispatcher) for module in model.modules() if isinstance(module, MoE)]
    layers = model.spec.moe_layers
    return ExchangeFacts(traffic, layers, placements or [in_order] * len(layers), axis.index)


def traffic_of(dispatcher: Any) -> Traffic:
    """The counter of the exchange inside a dispatcher."""
    while not hasattr(dispatcher, "traffic"):
        dispatcher = dispatcher.inner
    traffic: Traffic = dispatcher.traffic
    return traffic


class ExchangeFacts:
    """Of one rank, step after step."""

    def __init__(
        self, traffic: Sequence[Traffic], layers: Sequence[int], placements: Sequence[Placement], index: int
    ) -> None:
        """`index` is our place among the ranks of dist.ep."""
        self.traffic, self.layers, self.index = traffic, layers, index
        self.facts: dict[str, Any] = {}
        self._before_bytes = (0, 0)
        self.share_LER = torch.zeros(0)
        self.follow(placements)

    def follow(self, placements: Sequence[Placement]) -> None:
        """Learn which rank serves what share of our rows from now on."""
        experts, ranks = len(placements[0].device_EP), placements[0].devices
        share_LER = np.zeros((len(placements), experts, ranks))
        for share_ER, one in zip(share_LER, placements, strict=True):
            expert_N, place_N = np.nonzero(one.device_EP >= 0)
            share_EP = one.share_AEP[one.group_S[self.index]]
            share_ER[expert_N, one.device_EP[expert_N, place_N]] = share_EP[expert_N, place_N]
        self.share_LER = torch.from_numpy(share_LER)

    def begin(self) -> None:
        """A step's exchanges begin."""
        self._before_bytes = self._bytes()

    def _bytes(self) -> tuple[int, int]:
        return sum(one.inside_bytes for one in self.traffic), sum(one.between_bytes for one in self.traffic)

    def numbers(self, records: Mapping[int, RoutingRecord]) -> Tensor:
        """What adds up over ranks; `records` by layer of the model."""
        count_LE = torch.zeros(self.share_LER.shape[:2], dtype=torch.float64)
        for place, layer in enumerate(self.layers):
            if layer in records:
                count_LE[place] = records[layer].count_E
        rows_LR = torch.bmm(count_LE[:, None], self.share_LER)
        sent = [now - before for now, before in zip(self._bytes(), self._before_bytes, strict=True)]
        return torch.cat([rows_LR.flatten(), torch.tensor(sent, dtype=torch.float64)])

    def read(self, numbers: Tensor) -> None:
        """Take in the sums."""
        layers, _, ranks = self.share_LER.shape
        rows_LR = numbers[: layers * ranks].view(layers, ranks).cpu()
        over_L = rows_LR.amax(1) / rows_LR.mean(1).clamp(min=1)
        inside, between = numbers[layers * ranks :].tolist()
        self.facts = {
            "rank_imbalance": [round(float(over), 4) for over in over_L],
            "inside_bytes": round(inside),
            "between_bytes": round(between),
        }
