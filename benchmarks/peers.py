"""Other projects' expert layers behind one call, so that a benchmark can put them beside ours.

    peer(gate_up_EDF, down_EFD) -> layer(x_TD, expert_TK, weight_TK) -> y_TD

Every maker copies the same weights into the peer's own layout. A peer that is not installed is left out by name.
Not part of the package: only benchmarks and their tests import this.

Dimension key:  T tokens   D width   E experts   K slots   F expert width
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.core.specs import MoESpec
from moestro.nn.moe import MoE
from moestro.nn.permute import count_of
from moestro.nn.routing_rules import Choice

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A layer and the parameters its gradient goes to."""

    layer: Layer
    parameters: list[Tensor]


def ours(path: Any) -> Callable[[Tensor, Tensor], Peer]:
    """Our layer after routing, by one of its paths."""

    def make(gate_up_EDF: Tensor, down_EFD: Tensor) -> Peer:
        num_experts, hidden, width = down_EFD.shape
        moe = MoE(width, MoESpec(num_experts=num_experts, expert_width=hidden), path)
        moe.experts.gate_up_EDF.data = gate_up_EDF.clone()
        moe.experts.down_EFD.data = down_EFD.clone()
        return Peer(
            lambda x, expert, weight: moe.dispatcher(x, Choice(expert, weight), moe.experts, path),
            list(moe.experts.parameters()),
        )

    return make


def sort_and_grouped_mm(gate_up_EDF: Tensor, down_EFD: Tensor, every_slot: bool = False) -> Peer:
    """The textbook way: sort, index, grouped_mm, index_add. `every_slot`: none is unused, so none has to be cut off."""
    gate_up, down = (weight.clone().requires_grad_() for weight in (gate_up_EDF, down_EFD))

    def layer(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        num_experts = len(down)
        order = expert_TK.flatten().argsort(stable=True)
        count = count_of(expert_TK.flatten(), num_experts + 1)[:num_experts]
        order = order if every_slot else order[: int(count.sum())]
        token, offs = order // expert_TK.shape[1], count.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x_TD[token], gate_up, offs=offs).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, down, offs=offs) * weight_TK.flatten()[order, None].to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, token, out)

    return Peer(layer, [gate_up, down])


def transformers_experts(implementation: str) -> Callable[[Tensor, Tensor], Peer]:
    """transformers' Mixtral experts, by one of its implementations."""

    def make(gate_up_EDF: Tensor, down_EFD: Tensor) -> Peer:
        from transformers.models.mixtral.configuration_mixtral import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        num_experts, hidden, width = down_EFD.shape
        config = MixtralConfig(
            hidden_size=width, intermediate_size=hidden, num_local_experts=num_experts, num_attention_heads=8
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = MixtralExperts(config)
        experts.gate_up_proj = torch.nn.Parameter(gate_up_EDF.transpose(1, 2).contiguous())
        experts.down_proj = torch.nn.Parameter(down_EFD.transpose(1, 2).contiguous())
        return Peer(lambda x, expert, weight: experts(x, expert, weight.to(x.dtype)), list(experts.parameters()))

    return make


def torchtitan(gate_up_EDF: Tensor, down_EFD: Tensor) -> Peer:
    """torchtitan's grouped experts with its local dispatcher; computes in bfloat16 whatever the input."""
    from torchtitan.models.common.moe import GroupedExperts
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    num_experts, hidden, width = down_EFD.shape
    experts = GroupedExperts(GroupedExperts.Config(dim=width, hidden_dim=hidden, num_experts=num_experts))
    gate, up = gate_up_EDF.transpose(1, 2).chunk(2, 1)
    experts.w1_EFD.data, experts.w3_EFD.data = gate.contiguous(), up.contiguous()
    experts.w2_EDF.data = down_EFD.transpose(1, 2).contiguous()

    def layer(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        config = LocalTokenDispatcher.Config(num_experts=num_experts, top_k=expert_TK.shape[1])
        dispatcher = LocalTokenDispatcher(config)
        count = torch.bincount(expert_TK.flatten(), minlength=num_experts)
        rows, count, note = dispatcher.dispatch(x_TD, weight_TK, expert_TK, count)
        return dispatcher.combine(experts(rows, count), note, x_TD)

    return Peer(layer, list(experts.parameters()))


def deepspeed(gate_up_EDF: Tensor, down_EFD: Tensor) -> Peer:
    """DeepSpeed AutoEP's grouped experts, sorted and combined as its layer does on one rank."""
    from deepspeed.moe.ep_experts import GroupedExperts

    num_experts, hidden, width = down_EFD.shape
    experts = GroupedExperts(width, hidden, num_experts)
    gate, up = gate_up_EDF.transpose(1, 2).chunk(2, 1)
    experts.w1.data, experts.w3.data = gate.contiguous(), up.contiguous()
    experts.w2.data = down_EFD.transpose(1, 2).contiguous()

    def layer(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        order = expert_TK.flatten().argsort(stable=True)
        token = order // expert_TK.shape[1]
        out = experts(x_TD[token], torch.bincount(expert_TK.flatten(), minlength=num_experts))
        out = out * weight_TK.flatten()[order, None].to(out.dtype)
        return torch.zeros_like(x_TD).index_add(0, token, out)

    return Peer(layer, list(experts.parameters()))


PEERS: dict[str, Callable[[Tensor, Tensor], Peer]] = {
    "moestro fused": ours("fused"),
    "moestro grouped": ours("grouped"),
    "sort + grouped_mm": sort_and_grouped_mm,
    "transformers grouped_mm": transformers_experts("grouped_mm"),
    "torchtitan": torchtitan,
    "DeepSpeed": deepspeed,
}
"""Everything that can be put beside each other, ours first."""

BF16_ONLY = ("torchtitan",)
"""Those that compute in bfloat16 whatever they are given, and so are no peers in float32."""

VARIABLE_K = ("moestro fused", "moestro grouped", "sort + grouped_mm")
"""Those that take a token with fewer experts than slots."""
