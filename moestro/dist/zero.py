"""Share out optimiser state, gradients and weights (ZeRO, Rajbhandari 2020) through torch's fully_shard.

    zero = 1   every rank keeps and updates its share of the optimiser state; gradients are summed once a step
           2   gradients are summed after every micro-batch, each rank keeps its share
           3   weights too: gathered for a layer's forward pass, and again for its backward pass

Experts and everything else are sharded separately: experts over the ranks that hold the same ones, so that ep and zero
multiply. Shares are rows of the first dimension, between copies (dp_replicate) gradients are summed in whole.

In a pipeline every stage is sharded by itself. Its micro-batches sum their gradients here and reduce them once a step,
for zero = 2 and 3 too, and embedding and head stay gathered during a step, as the schedule calls the head outside the
stage. zero_bubble looks for weights before autograd would gather them: there all weights stay gathered during a step.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from moestro.core.errors import ConfigError
from moestro.dist.mesh import Axis, Mesh
from moestro.dist.pipeline import Pipeline
from moestro.dist.spec import DistSpec
from moestro.dist.timeline import CLOCK
from moestro.nn.decoder import Decoder
from moestro.nn.experts import LowRankExperts
from moestro.nn.moe import MoE


def shard(model: Decoder, mesh: Mesh, spec: DistSpec, pipeline: Pipeline | None) -> list[FSDPModule]:
    """Shard every block, its experts, and the rest; returns what has been sharded, inner before outer."""
    layout, roots = mesh.layout, list[nn.Module]([model] if pipeline is None else pipeline.modules.values())
    sizes = {
        "dense": (layout.pp, layout.dp_replicate, layout.dp_shard, layout.tp),
        "expert": (layout.pp, layout.dp_replicate, layout.edp_shard, layout.ep * layout.etp),
    }
    meshes = {name: _data_mesh(mesh, shape, spec.sync == "step") for name, shape in sizes.items()}
    give_back = spec.zero == 3 and not (pipeline and spec.schedule == "zero_bubble")
    done: list[FSDPModule] = []
    for root in roots:
        done += _shard_blocks(list(root.get_submodule("blocks").children()), meshes, give_back)
        done.append(fully_shard(root, mesh=meshes["dense"], reshard_after_forward=give_back and pipeline is None))
    if pipeline is None:
        register_fsdp_forward_method(model, "loss")
    for module in done:
        module.set_gradient_divide_factor(1.0)  # losses are shares already: gradients add up
        module.set_force_sum_reduction_for_comms(True)
        if mesh.device.type == "cpu":  # elsewhere torch runs them beside arithmetic, and their length says nothing
            module.set_custom_all_gather(Gather())
            module.set_custom_reduce_scatter(Scatter())
    return done


def _shard_blocks(blocks: Sequence[nn.Module], meshes: dict[str, DeviceMesh], give_back: bool) -> list[FSDPModule]:
    """Experts over theirs, then what else is in the block."""
    done: list[FSDPModule] = []
    for block in blocks:
        if isinstance(block.feed_forward, MoE):
            experts = block.feed_forward.experts
            if isinstance(experts, LowRankExperts):
                raise ConfigError(
                    "dist.zero is above 0 with model.moe.sharing low_rank, whose base belongs to all experts; "
                    "set dist.zero=0"
                )
            done.append(fully_shard(experts, mesh=meshes["expert"], reshard_after_forward=give_back))
        done.append(fully_shard(block, mesh=meshes["dense"], reshard_after_forward=give_back))
    return done


def _data_mesh(mesh: Mesh, shape: tuple[int, int, int, int], together: bool) -> DeviceMesh:
    """The ranks of one stage and one place in tp or ep: copies x shards, or shards alone where copies learn apart."""
    ranks = torch.arange(mesh.layout.world).view(shape)
    whole = DeviceMesh(mesh.device.type, ranks, mesh_dim_names=("pp", "replicate", "shard", "other"))
    if mesh.timeout:
        for group in whole.get_all_groups():
            _set_pg_timeout(mesh.timeout, group)
    return whole["replicate", "shard"] if mesh.layout.dp_replicate > 1 and together else whole["shard"]


class Gather(DefaultAllGather):
    """Gathers shares of weights as torch does; counted and timed as our own messages are."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """As in torch."""
        with CLOCK.during("reduction"), _axis(group).message(input_tensor):
            return super().__call__(output_tensor, input_tensor, group, async_op)


class Scatter(DefaultReduceScatter):
    """Sums gradients and leaves each rank its share, as torch does; counted and timed as our own messages are."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work:
        """As in torch."""
        with CLOCK.during("reduction"), _axis(group).message(input_tensor):
            return super().__call__(output_tensor, input_tensor, group, op, async_op)


def _axis(group: dist.ProcessGroup) -> Axis:
    ranks = tuple(dist.get_process_group_ranks(group))
    return Axis("zero", ranks, ranks.index(dist.get_rank()), group)
