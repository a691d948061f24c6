"""Cut a whole model into what one rank holds, and remember which part of every tensor that is.

    Decoder -> cut(model, mesh) -> the same Decoder with fewer experts, and Held for every tensor

`Held` answers three questions: which box of the whole tensor is here (for checkpoints under any mesh), over which ranks
gradients are summed, and which ranks have copies (for norms, and for who writes it down).

Dimension key:  D width   E experts   F hidden width
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moestro.core.errors import ConfigError
from moestro.dist.dispatch import AllToAll, Hierarchical
from moestro.dist.mesh import Axis, Mesh
from moestro.dist.spec import DistSpec
from moestro.dist.tensor_parallel import Cuts, SplitExperts, TokenParts, split_attention, split_feed_forward
from moestro.nn.attention import GroupedQueryAttention, LatentAttention
from moestro.nn.decoder import Decoder
from moestro.nn.experts import LowRankExperts
from moestro.nn.moe import Dispatcher, FeedForward, MoE

Exchange = AllToAll | Hierarchical
Box = tuple[tuple[int, int], ...]
"""(start, stop) in every dimension."""


@dataclass(frozen=True, slots=True)
class Held:
    """The part of a whole tensor that is here."""

    shape: tuple[int, ...]
    """Of the whole."""
    boxes: tuple[Box, ...]
    """Parts of the whole, one after the other along `dim`."""
    dim: int = 0
    sum_over: str = "dp"
    """The axis over which gradients are summed."""
    same_on: tuple[str, ...] = ("dp", "tp")
    """Axes along which every rank holds this same part."""
    starts: tuple[int, ...] | None = None
    """Where in the tensor here each box begins; None: one after the other."""
    spare: tuple[bool, ...] = ()
    """Boxes that another rank of this expert group holds and counts; empty: none."""

    @property
    def counted(self) -> "Held":
        """Without the boxes that others count."""
        if not self.spare:
            return self
        own = [place for place, spare in enumerate(self.spare) if not spare]
        assert self.starts is not None
        starts = tuple(self.starts[place] for place in own)
        return replace(self, boxes=tuple(self.boxes[place] for place in own), starts=starts, spare=())

    def copies(self, mesh: Mesh) -> int:
        """Ranks of this stage that hold the same part."""
        return prod(mesh[axis].size for axis in self.same_on)

    def writes(self, mesh: Mesh) -> bool:
        """True on the one rank among them that saves it."""
        return all(mesh[axis].index == 0 for axis in self.same_on)


Parts = dict[str, Held]
"""By the names of `state_dict`."""


def whole(tensor: Tensor) -> Held:
    """All of a tensor, on every rank of the stage."""
    return Held(tuple(tensor.shape), (tuple((0, size) for size in tensor.shape),))


CutExperts = Callable[[str, MoE, Exchange], tuple[Parts, Dispatcher]]
"""(name, layer, exchange): leaves this rank's experts in a layer; returns what they are, and an exchange that finds them."""


def cut(model: Decoder, mesh: Mesh, spec: DistSpec, place_experts: CutExperts | None = None) -> Parts:
    """Leave in `model` what this rank holds; raises ConfigError where the mesh does not fit it.

    place_experts   how experts are spread; None: equally many neighbours on every rank
    """
    if model.spec.attention.kind == "transformer_xl":
        raise ConfigError(
            "model.attention.kind is transformer_xl, which carries memory from step to step; it trains on one rank: "
            "leave out dist"
        )
    parts = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            module.router.peers = mesh["dp" if spec.sync == "step" else "dp_shard"]
            inner: Dispatcher = (exchange := exchange_for(mesh, spec))
            if place_experts is None:
                own = {f"{name}.experts.{key}": held for key, held in cut_experts(module, mesh).items()}
            else:
                own, inner = place_experts(f"{name}.experts", module, exchange)
            parts |= own
            module.dispatcher = within_parts(inner, mesh)
        if mesh["tp"].size > 1:
            parts |= {f"{name}.{key}": held for key, held in cut_columns(module, mesh["tp"]).items()}
    return parts if spec.sync == "step" else {name: inside_copy(held) for name, held in parts.items()}


def inside_copy(held: Held) -> Held:
    """The same part where copies learn apart: gradients are summed inside each."""
    inner = {"dp": "dp_shard", "edp": "edp_shard", "stage": "stage_copy"}
    return replace(held, sum_over=inner[held.sum_over])


def cut_columns(module: nn.Module, axis: Axis) -> Parts:
    """Keep this rank's heads or hidden columns of one attention or dense feed-forward layer."""
    cuts: Cuts = {}
    norms: list[str] = []
    if isinstance(module, GroupedQueryAttention | LatentAttention):
        cuts, norms = split_attention(module, axis)
    elif isinstance(module, FeedForward):
        cuts = split_feed_forward(module, axis)
    parts: Parts = {}
    for name, parameter in list(module.named_parameters()):
        held, linear = whole(parameter), name.partition(".")[0]
        if linear in norms:  # sees only our heads: its gradient is a part of the sum
            parts[name] = replace(held, sum_over="stage")
        elif linear in cuts and parameter.dim() > cuts[linear]:
            dim, size = cuts[linear], parameter.shape[cuts[linear]] // axis.size
            start = axis.index * size
            box = tuple((start, start + size) if d == dim else side for d, side in enumerate(held.boxes[0]))
            parts[name] = replace(held, boxes=(box,), dim=dim, same_on=("dp",))
            keep(module.get_submodule(linear), name.partition(".")[2], parameter.narrow(dim, start, size))
    return parts


def exchange_for(mesh: Mesh, spec: DistSpec) -> Exchange:
    """What carries tokens between experts."""
    if spec.dispatch == "hierarchical":
        return Hierarchical(mesh["ep_node"], mesh["ep_rail"], mesh.layout.node, spec.chunks)
    return AllToAll(mesh["ep"], mesh.layout.node, spec.chunks)


def within_parts(inner: Dispatcher, mesh: Mesh) -> Dispatcher:
    """The exchange where ranks of tp share tokens or experts."""
    if mesh["tp"].size == 1:
        return inner
    return SplitExperts(inner, mesh["tp"]) if mesh.layout.expert_tp else TokenParts(inner, mesh["tp"])


def cut_experts(moe: MoE, mesh: Mesh) -> Parts:
    """Keep this rank's experts of one layer; what low-rank experts share stays whole."""
    axis, experts = mesh["ep"], moe.experts
    if mesh.layout.etp > 1 and isinstance(experts, LowRankExperts):
        raise ConfigError("dist.expert_tp cannot split experts of model.moe.sharing low_rank; leave it out")
    if moe.spec.num_experts % axis.size:
        raise ConfigError(
            f"dist.ep is {axis.size}; it must divide model.moe.num_experts = {moe.spec.num_experts}: "
            f"choose one of {[n for n in range(1, moe.spec.num_experts + 1) if moe.spec.num_experts % n == 0]}"
        )
    experts.num_experts = moe.spec.num_experts // axis.size
    first = axis.index * experts.num_experts
    parts: Parts = {}
    for name, weight in list(experts.named_parameters()):
        held = whole(weight)
        if weight.dim() == 3:
            boxes, dim = own_columns(name, held, mesh)
            boxes = tuple(((first, first + experts.num_experts), *box[1:]) for box in boxes)
            parts[name] = replace(held, boxes=boxes, dim=dim, sum_over="edp", same_on=("edp",))
            keep(experts, name, torch.cat([weight[tuple(slice(*side) for side in box)] for box in boxes], dim))
        elif isinstance(experts, LowRankExperts):
            parts[name] = replace(held, sum_over="stage", same_on=("stage",))
    return parts


def own_columns(name: str, held: Held, mesh: Mesh) -> tuple[tuple[Box, ...], int]:
    """Which hidden columns of the experts are here: of gate and up, or rows of down; and along which dimension."""
    _, inner, outer = held.boxes[0]
    parts, index = mesh.layout.etp, mesh["tp"].index
    if parts == 1:
        return held.boxes, 0
    hidden = outer[1] // 2 if name.startswith("gate_up") else inner[1]
    if hidden % parts:
        raise ConfigError(f"dist.tp is {parts}; with dist.expert_tp it must divide model.moe.expert_width = {hidden}")
    start, stop = index * hidden // parts, (index + 1) * hidden // parts
    if name.startswith("gate_up"):
        halves = ((start, stop), (hidden + start, hidden + stop))
        return tuple((held.boxes[0][0], inner, half) for half in halves), 2
    return ((held.boxes[0][0], (start, stop), outer),), 1


def keep(module: nn.Module, name: str, part: Tensor) -> None:
    """Replace a parameter by a part of it, and free the rest."""
    setattr(module, name, nn.Parameter(part.detach().clone(memory_format=torch.contiguous_format)))


def local(tensor: Tensor) -> Tensor:
    """The numbers that are here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_rows(tensor: Tensor, held: Held) -> Held:
    """What is here of a tensor that fully_shard has cut further, along its first dimension."""
    if not isinstance(tensor, DTensor):
        return held
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert held.dim != 0 or len(held.boxes) == 1
    low = [(box[0][0] + offset[0], box[0][0] + offset[0] + shape[0]) for box in held.boxes]
    axes = tuple({"dp": "dp_replicate", "edp": "dp_replicate"}.get(axis, axis) for axis in held.same_on)
    boxes = tuple((rows, *box[1:]) for rows, box in zip(low, held.boxes, strict=True))
    return replace(held, boxes=boxes, same_on=axes)


def pieces(name: str, tensor: Tensor, held: Held) -> Iterator[tuple[str, Box, Tensor]]:
    """(name, box, numbers) of every box of a tensor that is here and not empty."""
    here = held_rows(tensor, held)
    if not here.shape:
        yield name, (), local(tensor)
        return
    sizes = [box[here.dim][1] - box[here.dim][0] for box in here.boxes]
    starts = list(accumulate(sizes, initial=0))[:-1] if here.starts is None else here.starts
    for box, start, size in zip(here.boxes, starts, sizes, strict=True):
        part = local(tensor).narrow(here.dim, start, size)
        if part.numel():
            yield name, box, part
