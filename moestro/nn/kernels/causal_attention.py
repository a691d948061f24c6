"""Causal attention on CPU for short sequences: batched products with one-pass softmax between them.

torch's CPU flash attention spends two thirds of its time in a slow backward pass at the lengths small models train
on; keeping the weights costs S*S numbers a head and is faster there (docs/LOG.md).

Dimension key:  N = B * G matrices   Q = S * H/G queries, the group's heads one after the other   S positions   C width
"""

import math
from typing import Any

import torch
from torch import Tensor

from moestro.nn.kernels import cpu

LONGEST = 512
"""Sequences above this keep too many weights; torch's flash attention takes over."""


class CausalAttention(torch.autograd.Function):
    """softmax(q k^T scale) v with S*S weights kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q_NQC: Tensor, k_NSC: Tensor, v_NSC: Tensor, scale: float) -> Tensor:
        weight_NQS = q_NQC @ k_NSC.transpose(1, 2)
        cpu.causal_softmax_(by_head(weight_NQS), scale)
        ctx.save_for_backward(q_NQC, k_NSC, v_NSC, weight_NQS)
        ctx.scale = scale
        return weight_NQS @ v_NSC

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_NQC, k_NSC, v_NSC, weight_NQS = ctx.saved_tensors
        d_y_NQC = d_outputs[0].contiguous()
        d_v_NSC = weight_NQS.transpose(1, 2) @ d_y_NQC
        d_score_NQS = d_y_NQC @ v_NSC.transpose(1, 2)
        cpu.causal_softmax_backward_(by_head(weight_NQS), by_head(d_score_NQS), ctx.scale)
        return d_score_NQS @ k_NSC, d_score_NQS.transpose(1, 2) @ q_NQC, d_v_NSC, None


def by_head(score_NQS: Tensor) -> Tensor:
    """[N, H/G * S, S] -> [N * H/G, S, S]."""
    matrices, queries, length = score_NQS.shape
    return score_NQS.view(matrices * queries // length, length, length)


def takes(q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor) -> bool:
    """True where this is the fast way: CPU kernels at hand, one short whole sequence."""
    short = q_BHSC.shape[-2] == k_BGSC.shape[-2] <= LONGEST
    return short and q_BHSC.dtype == k_BGSC.dtype == v_BGSC.dtype and cpu.usable(q_BHSC)


def causal_attention(q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, scale: float | None) -> Tensor:
    """Causal attention of whole sequences; H is a multiple of G."""
    batch, num_heads, length, width = q_BHSC.shape
    groups = k_BGSC.shape[1]
    q_NQC = q_BHSC.reshape(batch * groups, num_heads // groups * length, width)
    k_NSC, v_NSC = (x.reshape(batch * groups, length, x.shape[-1]) for x in (k_BGSC, v_BGSC))
    y_NQC: Tensor = CausalAttention.apply(q_NQC, k_NSC, v_NSC, 1 / math.sqrt(width) if scale is None else scale)
    return y_NQC.view(batch, num_heads, length, v_BGSC.shape[-1])
