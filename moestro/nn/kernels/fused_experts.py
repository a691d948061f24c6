"""The expert layer as one autograd function on CPU: gather -> gate and up -> SwiGLU -> down -> combine.

Every expert's rows go through all five while they are in the cache, forward and backward, so that nearly all time is
matrix products. Kept for the backward pass: x and the gate-up product; gathers and activations are done again.
Sums have a fixed order: the result is the same from run to run.

Weights may be float32 while x is bfloat16 (autocast): each expert's slice is converted as it is used.

Dimension key:  T tokens   D width   E experts   K slots   F expert width   N routed rows
                M rows of the busiest expert   P padded rows of one
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moestro.nn.kernels import cpu
from moestro.nn.permute import Order

Span = tuple[int, int, int, int]


class FusedExperts(torch.autograd.Function):
    """y = combine(experts(gather(x))), see `fused_experts`.

    Products run on padded row counts: oneDNN compiles bfloat16 products per shape, which costs as much as running
    one, and routed row counts are new in every step. Extra rows of inputs are zero; extra rows of outputs fall on the
    next expert's place, which is written after.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor, order: Order, gate_up_EDF: Tensor, down_EFD: Tensor
    ) -> Tensor:
        weight_N, spans, token_N = (
            weight_TK.flatten()[order.source_N],
            spans_of(order.count_E, x_TD.dtype),
            order.token_N,
        )
        room, (hidden, width) = _room(spans), down_EFD.shape[1:]
        gate_up_NF, out_ND = (x_TD.new_empty(room.rows, size) for size in (2 * hidden, width))
        gate_up_NF[room.used :].zero_()
        x_MD, act_MF = (x_TD.new_zeros(room.most, size) for size in (width, hidden))
        gate_up, down = _Slices(gate_up_EDF, x_TD.dtype), _Slices(down_EFD, x_TD.dtype)
        for expert, start, size, padded in spans:
            wide = slice(start, start + padded)
            cpu.gather(x_TD, token_N[start : start + size], x_MD[:padded])
            torch.mm(x_MD[:padded], gate_up[expert], out=gate_up_NF[wide])
            cpu.swiglu(gate_up_NF[start:], weight_N[start:], act_MF[:size])
            torch.mm(act_MF[:padded], down[expert], out=out_ND[wide])
        ctx.save_for_backward(x_TD, gate_up_EDF, down_EFD, weight_N, gate_up_NF)
        ctx.order = order
        return cpu.combine(out_ND, order.slot_TK)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_up_EDF, down_EFD, weight_N, gate_up_NF = ctx.saved_tensors
        d_y_TD, order, (hidden, width) = d_outputs[0].to(x_TD.dtype).contiguous(), ctx.order, down_EFD.shape[1:]
        spans = spans_of(order.count_E, x_TD.dtype)
        room, token_N = _room(spans), order.token_N
        d_weight_N, d_rows_ND = torch.empty_like(weight_N), x_TD.new_empty(room.rows, width)
        x_MD, d_MD, act_MF, d_act_MF = (x_TD.new_zeros(room.most, size) for size in (width, width, hidden, hidden))
        d_gate_up_MF = x_TD.new_zeros(room.most, 2 * hidden)
        gate_up, down = _Slices(gate_up_EDF, x_TD.dtype), _Slices(down_EFD, x_TD.dtype)
        d_gate_up, d_down = _GradientSlices(gate_up_EDF, x_TD.dtype), _GradientSlices(down_EFD, x_TD.dtype)
        for expert, start, size, padded in spans:
            d_act_NF, act_NF = d_act_MF[:padded], act_MF[:padded]
            cpu.gather(d_y_TD, token_N[start : start + size], d_MD[:padded])
            torch.mm(d_MD[:padded], down[expert].t(), out=d_act_NF)
            tensors = (gate_up_NF[start:], weight_N[start:], d_act_NF, act_NF[:size], d_gate_up_MF, d_weight_N[start:])
            cpu.swiglu_backward(*tensors)
            d_down.write(expert, act_NF.t(), d_MD[:padded])
            cpu.gather(x_TD, token_N[start : start + size], x_MD[:padded])
            d_gate_up.write(expert, x_MD[:padded].t(), d_gate_up_MF[:padded])
            torch.mm(d_gate_up_MF[:padded], gate_up[expert].t(), out=d_rows_ND[start : start + padded])
        for expert in (order.count_E == 0).nonzero().flatten().tolist():
            d_gate_up.gradient[expert].zero_()
            d_down.gradient[expert].zero_()
        d_weight_A = weight_N.new_zeros(order.slot_TK.numel())
        d_weight_A[order.source_N] = d_weight_N
        d_x_TD, d_weight_TK = cpu.combine(d_rows_ND, order.slot_TK), d_weight_A.view(order.slot_TK.shape)
        return d_x_TD, d_weight_TK, None, d_gate_up.gradient, d_down.gradient


@dataclass(frozen=True, slots=True)
class _Room:
    """Sizes of buffers that padded products may write to."""

    used: int
    rows: int
    most: int


def _room(spans: list[Span]) -> _Room:
    ends = [start + padded for _, start, _, padded in spans]
    used = sum(size for _, _, size, _ in spans)
    return _Room(used, max(ends, default=0), max((padded for *_, padded in spans), default=0))


def spans_of(count_E: Tensor, dtype: torch.dtype) -> list[Span]:
    """(expert, first row, rows, padded rows) of every expert that has rows."""
    spans, start = [], 0
    for expert, size in enumerate(count_E.tolist()):
        if size:
            spans.append((expert, start, size, padded_rows(size) if dtype == torch.bfloat16 else size))
        start += size
    return spans


def padded_rows(size: int) -> int:
    """The next row count with at most four significant binary digits below the first, so that few shapes occur."""
    grain = max(1 << max(size.bit_length() - 5, 0), 8)
    return -(-size // grain) * grain


class _Slices:
    """One expert's weight at a time, in the type of the activations."""

    def __init__(self, weight_EIO: Tensor, dtype: torch.dtype) -> None:
        self.weights = weight_EIO.detach().unbind(0)
        same = weight_EIO.dtype == dtype
        self.scratch_IO = None if same else torch.empty_like(weight_EIO[0], dtype=dtype)

    def __getitem__(self, expert: int) -> Tensor:
        if self.scratch_IO is None:
            return self.weights[expert]
        cpu.convert(self.weights[expert], self.scratch_IO)
        return self.scratch_IO


class _GradientSlices:
    """The gradient of a weight, written one expert at a time."""

    def __init__(self, weight_EIO: Tensor, dtype: torch.dtype) -> None:
        self.gradient = torch.empty_like(weight_EIO)
        self.slices = self.gradient.unbind(0)
        same = weight_EIO.dtype == dtype
        self.scratch_IO = None if same else torch.empty_like(weight_EIO[0], dtype=dtype)

    def write(self, expert: int, left: Tensor, right: Tensor) -> None:
        """gradient[expert] = left @ right."""
        if self.scratch_IO is None:
            torch.mm(left, right, out=self.slices[expert])
        else:
            cpu.convert(torch.mm(left, right, out=self.scratch_IO), self.slices[expert])


def fused_experts(x_TD: Tensor, weight_TK: Tensor, order: Order, gate_up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
    """The whole sparse layer after routing.

    x_TD       float32 or bfloat16, on the CPU
    weight_TK  routing weights, float32
    order      the slots grouped by expert
    returns    y_TD in x's type; a token without experts gets zeros
    """
    y_TD: Tensor = FusedExperts.apply(x_TD.contiguous(), weight_TK, order, gate_up_EDF, down_EFD)
    return y_TD
