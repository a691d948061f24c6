"""Share out optimiser state, gradients and weights (ZeRO, Rajbhandari 2020) through torch's fully_shard.

    zero = 1   every rank keeps and updates its share of the optimiser state; gradients are summed once a step
           2   gradients are summed after every micro-batch, each rank keeps its share
           3   weights too: gathered for a layer's forward pass, and again for its backward pass

Experts and everything else are sharded separately: experts over the ranks that hold the same ones, so that ep and zero
multiply. Shares are rows of the first dimension, between copies (dp_replicate) gradients are summed in whole.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from moestro.core.errors import ConfigError
from moestro.dist.mesh import Mesh
from moestro.nn.decoder import Decoder
from moestro.nn.experts import LowRankExperts
from moestro.nn.moe import MoE


def shard(model: Decoder, mesh: Mesh, zero: int) -> list[FSDPModule]:
    """Shard every block, its experts, and the rest; returns what has been sharded, inner before outer."""
    layout = mesh.layout
    sizes = {
        "dense": (layout.pp, layout.dp_replicate, layout.dp_shard, layout.tp),
        "expert": (layout.pp, layout.dp_replicate, layout.edp_shard, layout.ep * layout.etp),
    }
    meshes = {name: _data_mesh(mesh, shape) for name, shape in sizes.items()}
    done: list[FSDPModule] = []
    for block in model.blocks:
        if isinstance(block.feed_forward, MoE):
            experts = block.feed_forward.experts
            if isinstance(experts, LowRankExperts):
                raise ConfigError(
                    f"dist.zero is {zero} with model.moe.sharing low_rank, whose base belongs to all experts; "
                    "set dist.zero=0"
                )
            done.append(fully_shard(experts, mesh=meshes["expert"], reshard_after_forward=zero == 3))
        done.append(fully_shard(block, mesh=meshes["dense"], reshard_after_forward=zero == 3))
    done.append(fully_shard(model, mesh=meshes["dense"], reshard_after_forward=zero == 3))
    register_fsdp_forward_method(model, "loss")
    for module in done:
        module.set_gradient_divide_factor(1.0)  # losses are shares already: gradients add up
        module.set_force_sum_reduction_for_comms(True)
    return done


def _data_mesh(mesh: Mesh, shape: tuple[int, int, int, int]) -> DeviceMesh:
    """The ranks of one stage and one place in tp or ep: copies x shards, or shards alone."""
    ranks = torch.arange(mesh.layout.world).view(shape)
    whole = DeviceMesh(mesh.device.type, ranks, mesh_dim_names=("pp", "replicate", "shard", "other"))
    return whole["replicate", "shard"] if mesh.layout.dp_replicate > 1 else whole["shard"]
