"""The experts' arithmetic: rows grouped by expert in, rows out.

    gate_up = x @ W1[e]      act = silu(gate) * up * weight      out = act @ W2[e]

Weights are [experts, in, out], so one expert is one contiguous slice of each parameter, ready to be moved or saved.
Four ways that give the same result, and one that nearly does:

    loop      one expert after the other in plain torch: the reference, any device and type
    grouped   torch.nn.functional.grouped_mm: one launch for all experts (no float64; rows of 16 bytes)
    fused     nn/kernels/experts.cpp: own products on CPU threads, gathers and conversions while packing
    triton    nn/kernels/gpu/: the same on a GPU, nothing stored between products that is cheap to make again
    fp8       the same with products in 8 bits, but for the weights' gradients: an approximation, only where asked for

Dimension key:  T tokens, or rows that came from other ranks   K slots of each   N routed rows   D width   E experts
                F expert width   R rank of what experts do not share
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moestro.core.specs import MoESpec
from moestro.nn.kernels.fused_experts import fused_experts
from moestro.nn.permute import Order, combine_rows, gather_rows, row_weights

Path = Literal["loop", "grouped", "fused", "triton", "fp8"]
TILED: tuple[Path, ...] = ("triton", "fp8")
"""Paths that need an order with tiles."""


def swiglu(gate_up_NF: Tensor, weight_N: Tensor) -> Tensor:
    """silu(gate) * up * weight (Shazeer 2020); the two halves of the last dimension are gate and up."""
    gate_NF, up_NF = gate_up_NF.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF * weight_N[:, None].to(gate_up_NF.dtype)


def product_loop(x_NI: Tensor, count_E: Tensor, weight_EIO: Tensor) -> Tensor:
    """x @ W[e] for the rows of every expert, one expert after the other.

    count_E   rows of each expert, in order; their sum may be less than N, later rows come out 0
    """
    parts = list(x_NI.split([*count_E.tolist(), len(x_NI) - int(count_E.sum())]))
    rest_NO = x_NI.new_zeros(len(parts.pop()), weight_EIO.shape[2])
    outs = [part @ weight_IO.to(part.dtype) for part, weight_IO in zip(parts, weight_EIO.unbind(0), strict=True)]
    return torch.cat([*outs, rest_NO])


def product_grouped(x_NI: Tensor, count_E: Tensor, weight_EIO: Tensor) -> Tensor:
    """The same by grouped_mm; rows beyond the counts come out undefined."""
    offset_E = count_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_NI, weight_EIO.to(x_NI.dtype), offs=offset_E)


def takes_grouped(x_NI: Tensor, *widths: int) -> bool:
    """True where grouped_mm accepts the type and the row strides (multiples of 16 bytes)."""
    size = x_NI.element_size()
    return x_NI.dtype != torch.float64 and x_NI.dtype.is_floating_point and all(w * size % 16 == 0 for w in widths)


def applied(apply: Callable[..., Tensor], recompute: bool, *inputs: Any) -> Tensor:
    """apply(*inputs); where asked for, done again in the backward pass (nothing in it is drawn at random)."""
    if not (recompute and torch.is_grad_enabled()):
        return apply(*inputs)
    y_TD: Tensor = checkpoint(apply, *inputs, use_reentrant=False, preserve_rng_state=False)
    return y_TD


class Experts(nn.Module):
    """Experts with weights of their own."""

    def __init__(self, width: int, spec: MoESpec) -> None:
        super().__init__()
        num, hidden = spec.num_experts, spec.expert_width
        self.num_experts, self.width, self.hidden = num, width, hidden
        self.recompute = False
        """Keep nothing but the input for the backward pass."""
        self.gate_up_EDF = nn.Parameter(torch.empty(num, width, 2 * hidden))
        self.down_EFD = nn.Parameter(torch.empty(num, hidden, width))

    def forward(self, x_TD: Tensor, weight_TK: Tensor, order: Order, path: Path = "loop") -> Tensor:
        """Apply to every row its experts, and add up.

        x_TD       rows, one per token
        weight_TK  routing weights, float32
        order      the rows' slots grouped by expert, counted from the first expert here
        returns    y_TD in x's type; a row without experts gets zeros
        """
        if path in TILED:
            from moestro.nn.kernels.gpu.experts import triton_experts

            assert order.tiles is not None
            weights, keep = (self.gate_up_EDF, self.down_EFD), "input" if self.recompute else "product"
            return triton_experts(x_TD, weight_TK, order.tiles, *weights, keep, eight=path == "fp8")
        return applied(self.apply_tokens, self.recompute, x_TD, weight_TK, order, path)

    def apply_tokens(self, x_TD: Tensor, weight_TK: Tensor, order: Order, path: Path) -> Tensor:
        """`forward` by torch or on the CPU."""
        if path == "fused":
            return fused_experts(x_TD, weight_TK, order, self.gate_up_EDF, self.down_EFD)
        weight_N = row_weights(weight_TK, order)
        return combine_rows(self.apply_rows(gather_rows(x_TD, order), weight_N, order.count_E, path), order)

    def apply_rows(self, x_ND: Tensor, weight_N: Tensor, count_E: Tensor, path: Path) -> Tensor:
        """out_ND: expert e applied to its count_E rows; rows are grouped by expert."""
        product = product_grouped if path == "grouped" else product_loop
        act_NF = swiglu(product(x_ND, count_E, self.gate_up_EDF), weight_N)
        return product(act_NF, count_E, self.down_EFD)

    @torch.no_grad()
    def initialise(self, std: float, out_std: float) -> None:
        """Normal weights; `out_std` for the product that writes to the residual stream."""
        self.gate_up_EDF.normal_(0, std)
        self.down_EFD.normal_(0, out_std)


class LowRankExperts(nn.Module):
    """Experts that share one base weight: W_e = base + a_e b_e. Far fewer parameters, the base product done once."""

    def __init__(self, width: int, spec: MoESpec) -> None:
        super().__init__()
        num, hidden, rank = spec.num_experts, spec.expert_width, spec.sharing_rank
        self.num_experts, self.width, self.hidden = num, width, hidden
        self.recompute = False
        """As `Experts.recompute`."""
        self.gate_up_DF = nn.Parameter(torch.empty(width, 2 * hidden))
        self.gate_up_a_EDR = nn.Parameter(torch.empty(num, width, rank))
        self.gate_up_b_ERF = nn.Parameter(torch.empty(num, rank, 2 * hidden))
        self.down_FD = nn.Parameter(torch.empty(hidden, width))
        self.down_a_EFR = nn.Parameter(torch.empty(num, hidden, rank))
        self.down_b_ERD = nn.Parameter(torch.empty(num, rank, width))

    def forward(self, x_TD: Tensor, weight_TK: Tensor, order: Order, path: Path = "loop") -> Tensor:
        """As `Experts.forward`."""
        return applied(self.apply_tokens, self.recompute, x_TD, weight_TK, order, path)

    def apply_tokens(self, x_TD: Tensor, weight_TK: Tensor, order: Order, path: Path) -> Tensor:
        """As `Experts.apply_tokens`."""
        weight_N = row_weights(weight_TK, order)
        return combine_rows(self.apply_rows(gather_rows(x_TD, order), weight_N, order.count_E, path), order)

    def apply_rows(self, x_ND: Tensor, weight_N: Tensor, count_E: Tensor, path: Path) -> Tensor:
        """As `Experts.apply_rows`."""
        product = product_grouped if path == "grouped" else product_loop
        own_NF = product(product(x_ND, count_E, self.gate_up_a_EDR), count_E, self.gate_up_b_ERF)
        act_NF = swiglu(x_ND @ self.gate_up_DF.to(x_ND.dtype) + own_NF, weight_N)
        own_ND = product(product(act_NF, count_E, self.down_a_EFR), count_E, self.down_b_ERD)
        return act_NF @ self.down_FD.to(x_ND.dtype) + own_ND

    @torch.no_grad()
    def initialise(self, std: float, out_std: float) -> None:
        """The base as usual; a_e b_e with the base's spread, so that experts differ from the first step."""
        rank = self.gate_up_a_EDR.shape[-1]
        for weight, spread in ((self.gate_up_DF, std), (self.down_FD, out_std)):
            weight.normal_(0, spread)
        for weight_a, weight_b, spread in (
            (self.gate_up_a_EDR, self.gate_up_b_ERF, std),
            (self.down_a_EFR, self.down_b_ERD, out_std),
        ):
            weight_a.normal_(0, 1 / math.sqrt(rank))
            weight_b.normal_(0, spread)


AnyExperts = Experts | LowRankExperts
