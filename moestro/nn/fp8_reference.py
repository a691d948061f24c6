"""Experts with products in 8 bits in plain torch: what kernels/gpu/fp8.py computes, for its tests and without a GPU.

    x, W1 in 8 bits          -> gate, up in float32 -> act in x's type
    act, W2 in 8 bits        -> rows in x's type -> y
    d_y, W2 in 8 bits        -> d_act in float32 -> d_gate_up, act in x's type -> gradients of weights
    d_gate_up, W1 in 8 bits  -> rows in x's type -> d_x

The kernels multiply 8-bit numbers, scale the sum of every block, and add those sums in float32. Here numbers are scaled
before they are multiplied, so that one product takes all blocks: the same but for float32's rounding.

Dimension key:  T tokens   D width   E experts   K slots   F expert width   N routed rows   R rows   C columns
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moestro.nn.experts import product_loop, swiglu
from moestro.nn.kernels.gpu import BLOCK_FP8 as BLOCK
from moestro.nn.permute import Order, combine_rows, to_slots

SMALLEST = 1e-12
"""The largest number of a block counts as this at least: nothing is divided by zero."""

Narrow = Callable[[Tensor], Tensor]
"""Numbers to what fewer bits hold of them, in float32."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """One scale for every block of numbers, so that the block's largest becomes the largest that 8 bits hold."""

    high: int = 1
    """Rows of a block; 0: all."""
    wide: int = BLOCK
    """Columns of a block; 0: all."""
    kind: torch.dtype = torch.float8_e4m3fn

    def scaled(self, x_RC: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers over their scales [..., rows / high, high, columns / wide, wide] in 8 bits, and the scales."""
        *outer, rows, columns = x_RC.shape
        high, wide = self.high or rows, self.wide or columns
        blocks = x_RC.float().reshape(*outer, rows // max(high, 1), high, columns // wide, wide)
        largest = torch.finfo(self.kind).max
        scale = blocks.abs().amax((-3, -1), keepdim=True).clamp(min=SMALLEST) / largest
        return (blocks / scale).clamp(-largest, largest).to(self.kind), scale

    def __call__(self, x_RC: Tensor) -> Tensor:
        """The numbers that 8 bits and scales stand for."""
        if not x_RC.numel():
            return x_RC.float()
        small, scale = self.scaled(x_RC)
        return (small.float() * scale).view(x_RC.shape)


@dataclass(frozen=True, slots=True)
class Narrowing:
    """How each operand of a product is narrowed; as it stands, the kernels' way."""

    x: Narrow = Blocks()
    act: Narrow = Blocks()
    d_y: Narrow = Blocks()
    d_gate_up: Narrow = Blocks()
    gate_up: Narrow = Blocks(BLOCK, BLOCK)
    down: Narrow = Blocks(BLOCK, BLOCK)


class NarrowExperts(torch.autograd.Function):
    """y = combine(experts(gather(x))), see `narrow_experts`."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor, order: Order, gate_up_EDF: Tensor, down_EFD: Tensor, way: Narrowing
    ) -> Tensor:
        kind, weight_N = x_TD.dtype, weight_TK.flatten()[order.source_N].float()
        gate_up, down = way.gate_up(gate_up_EDF.to(kind)), way.down(down_EFD.to(kind))
        with torch.autocast(x_TD.device.type, enabled=False):
            gate_up_NF = product_loop(way.x(x_TD)[order.token_N], order.count_E, gate_up)
            act_NF = swiglu(gate_up_NF, weight_N).to(kind)
            out_ND = product_loop(way.act(act_NF), order.count_E, down).to(kind)
        ctx.save_for_backward(x_TD, weight_N, gate_up_NF.to(kind), gate_up, down)
        ctx.order, ctx.way, ctx.masters = order, way, (gate_up_EDF.dtype, down_EFD.dtype)
        return combine_rows(out_ND, order)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_N, gate_up_NF, gate_up, down = ctx.saved_tensors
        order, way, kind = ctx.order, ctx.way, x_TD.dtype
        d_y_TD, token_N, count_E = d_outputs[0].to(kind), order.token_N, order.count_E
        with torch.autocast(x_TD.device.type, enabled=False):
            d_act_NF = product_loop(way.d_y(d_y_TD)[token_N], count_E, down.mT)
            gate_NF, up_NF = gate_up_NF.float().chunk(2, -1)
            open_NF = gate_NF.sigmoid()
            silu_NF = gate_NF * open_NF
            act_NF = (silu_NF * up_NF * weight_N[:, None]).to(kind)
            d_weight_N = (d_act_NF * silu_NF * up_NF).sum(1)
            d_act_NF *= weight_N[:, None]
            d_gate_NF = d_act_NF * up_NF * (open_NF + silu_NF * (1 - open_NF))
            d_gate_up_NF = torch.cat([d_gate_NF, d_act_NF * silu_NF], 1).to(kind)
            d_x_ND = product_loop(way.d_gate_up(d_gate_up_NF), count_E, gate_up.mT).to(kind)
            d_gate_up_EDF = _sums_by_expert(x_TD[token_N], d_gate_up_NF, count_E).to(ctx.masters[0])
            d_down_EFD = _sums_by_expert(act_NF, d_y_TD[token_N], count_E).to(ctx.masters[1])
        return combine_rows(d_x_ND, order), to_slots(d_weight_N, order), None, d_gate_up_EDF, d_down_EFD, None


def _sums_by_expert(left_NI: Tensor, right_NO: Tensor, count_E: Tensor) -> Tensor:
    """left^T right over the rows of every expert, in float32: [E, I, O]."""
    counts = count_E.tolist()
    pairs = zip(left_NI.float().split(counts), right_NO.float().split(counts), strict=True)
    return torch.stack([left.T @ right for left, right in pairs])


def narrow_experts(
    x_TD: Tensor, weight_TK: Tensor, order: Order, gate_up_EDF: Tensor, down_EFD: Tensor, way: Narrowing | None = None
) -> Tensor:
    """The whole sparse layer after routing.

    x_TD       bfloat16, float16 or float32: what is kept has its type
    weight_TK  routing weights, float32
    order      the slots grouped by expert, unused ones left out
    way        how operands are narrowed; None: as the kernels do
    returns    y_TD in x's type; a token without experts gets zeros
    """
    y_TD: Tensor = NarrowExperts.apply(x_TD, weight_TK, order, gate_up_EDF, down_EFD, way or Narrowing())
    return y_TD
