"""The expert layer as one autograd function on CPU: gather -> gate and up -> SwiGLU -> down -> combine.

The arithmetic is in experts.cpp: gathers, transpositions and the conversion of float32 weights to bfloat16 (autocast)
happen while operands are packed for the products, and threads share out experts instead of meeting in every product.
Kept for the backward pass: x and the gate-up product; the rest is done again. Sums have a fixed order: the result is
the same from run to run and for any number of threads.

Dimension key:  T tokens   D width   E experts   K slots   F expert width   N routed rows
"""

from typing import Any

import torch
from torch import Tensor

from moestro.nn.kernels import cpu
from moestro.nn.permute import Order, to_slots


class FusedExperts(torch.autograd.Function):
    """y = combine(experts(gather(x))), see `fused_experts`."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor, order: Order, gate_up_EDF: Tensor, down_EFD: Tensor
    ) -> Tensor:
        weight_N, token_N = weight_TK.flatten()[order.source_N], order.token_N
        gate_up_NF, out_ND = (x_TD.new_empty(len(token_N), size) for size in (gate_up_EDF.shape[2], x_TD.shape[1]))
        cpu.experts_forward(x_TD, token_N, weight_N, order.count_E, gate_up_EDF, down_EFD, gate_up_NF, out_ND)
        ctx.save_for_backward(x_TD, gate_up_EDF, down_EFD, weight_N, gate_up_NF)
        ctx.order = order
        return cpu.combine(out_ND, order.slot_TK)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_up_EDF, down_EFD, weight_N, gate_up_NF = ctx.saved_tensors
        d_y_TD, order = d_outputs[0].to(x_TD.dtype).contiguous(), ctx.order
        act_NF, d_x_ND = (x_TD.new_empty(len(weight_N), size) for size in down_EFD.shape[1:])
        d_gate_up_NF, d_weight_N = torch.empty_like(gate_up_NF), torch.empty_like(weight_N)
        d_gate_up_EDF, d_down_EFD = torch.empty_like(gate_up_EDF), torch.empty_like(down_EFD)
        inputs = (x_TD, d_y_TD, order.token_N, weight_N, order.count_E, gate_up_EDF, down_EFD, gate_up_NF)
        cpu.experts_backward(*inputs, act_NF, d_gate_up_NF, d_x_ND, d_weight_N, d_gate_up_EDF, d_down_EFD)
        return cpu.combine(d_x_ND, order.slot_TK), to_slots(d_weight_N, order), None, d_gate_up_EDF, d_down_EFD


def fused_experts(x_TD: Tensor, weight_TK: Tensor, order: Order, gate_up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
    """The whole sparse layer after routing.

    x_TD       float32 or bfloat16, on the CPU
    weight_TK  routing weights, float32
    order      the slots grouped by expert
    returns    y_TD in x's type; a token without experts gets zeros
    """
    weights = gate_up_EDF.contiguous(), down_EFD.contiguous()
    y_TD: Tensor = FusedExperts.apply(x_TD.contiguous(), weight_TK, order, *weights)
    return y_TD
