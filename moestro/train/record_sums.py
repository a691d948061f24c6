"""What of routing records adds up over ranks, as rows of the one message that a step's loss travels in.

    own records -> rows -> [sum over ranks] -> read -> records of the whole batch

Counts keep apart where tokens come from: a source is a place in an expert group, or a part of the batch where every
rank holds all experts. Each rank fills the row of its own source.

Dimension key:  L sparse layers   N numbers   S sources   E experts
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moestro.dist.mesh import Axis
from moestro.nn.decoder import Decoder
from moestro.nn.router import RoutingRecord
from moestro.nn.routing_budget import BINS

Shapes = Mapping[str, tuple[int, ...]]


def record_sums(model: Decoder, split: Axis, places: int) -> "RecordSums":
    """For a model with experts.

    split    the ranks that share the rows of a batch
    places   of an expert group, see `dist.layout.places`; 0: each part of the batch is a source
    """
    moe, sources = model.spec.moe, places or split.size
    assert moe is not None
    nothing, count_E = torch.zeros(()), torch.zeros(moe.num_experts)
    bins = torch.zeros(BINS) if moe.router.rule in ("gap", "topp") else None
    blank = RoutingRecord(count_E, 0, nothing, nothing, nothing, torch.zeros(0), bins)
    return RecordSums(layers=model.spec.moe_layers, blank=blank, source=split.index % sources, sources=sources)


@dataclass(frozen=True, kw_only=True)
class RecordSums:
    """Of one rank."""

    layers: Sequence[int]
    """Sparse ones of the whole model."""
    blank: RoutingRecord
    """For layers that are on other ranks."""
    source: int
    """Ours."""
    sources: int

    def shapes(self, pairs: bool) -> Shapes:
        """What is sent of every layer, in order."""
        experts, bins = len(self.blank.count_E), self.blank.decision_B
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("loss", "balance", "entropy", "tokens"), ())
        shapes["source_SE"] = (self.sources, experts)
        if bins is not None:
            shapes["decision_B"] = (len(bins),)
        if pairs:
            shapes["pair_X"] = (experts * (experts - 1) // 2,)
        return shapes

    def rows(self, own: Mapping[int, RoutingRecord], pairs: bool, device: torch.device) -> Tensor:
        """rows_LN, float64; `own` by layer, zero where it is on other ranks."""
        shapes = self.shapes(pairs)
        rows_LN = torch.zeros(
            len(self.layers), sum(map(math.prod, shapes.values())), dtype=torch.float64, device=device
        )
        for row_N, layer in zip(rows_LN, self.layers, strict=True):
            if layer in own:
                row_N.copy_(self._numbers(own[layer], shapes))
        return rows_LN

    def _numbers(self, record: RoutingRecord, shapes: Shapes) -> Tensor:
        source_SE = record.count_E.new_zeros(shapes["source_SE"])
        source_SE[self.source] = record.count_E
        made = {"source_SE": source_SE, "tokens": source_SE.new_tensor(record.tokens)}
        parts = [made[name] if name in made else getattr(record, name).detach() for name in shapes]
        return torch.cat([part.double().flatten() for part in parts])

    def read(self, own: Mapping[int, RoutingRecord], rows_LN: Tensor, pairs: bool) -> list[RoutingRecord]:
        """Records of all layers with the sums of all ranks."""
        shapes = self.shapes(pairs)
        sizes = [math.prod(shape) for shape in shapes.values()]
        records = []
        for layer, row_N in zip(self.layers, rows_LN, strict=True):
            parts = zip(shapes.items(), row_N.split(sizes), strict=True)
            sums = {name: part.view(shape).float() for (name, shape), part in parts}
            tokens, count_E = int(sums.pop("tokens")), sums["source_SE"].sum(0)
            records.append(replace(own.get(layer, self.blank), **sums, tokens=tokens, count_E=count_E))
        return records
