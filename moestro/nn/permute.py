"""Token order to expert order and back, without atomics: both directions, forward and backward, are gathers.

    sort_by_expert(expert_TK) -> Order
    gather_rows(x_TD, order)  -> x_ND     its gradient is combine
    combine_rows(out_ND, order) -> y_TD   its gradient is gather

Dimension key:  T tokens   D width   K slots per token   N routed rows   E experts   A = T*K places
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moestro.nn.kernels import cpu
from moestro.nn.kernels.gpu.tiles import Tiles


@dataclass(frozen=True, slots=True)
class Order:
    """A permutation of used slots that groups them by expert."""

    count_E: Tensor
    """Rows of each expert, int64."""
    source_N: Tensor
    """The flat place in expert_TK behind each row."""
    slot_TK: Tensor
    """The row of each slot; -1 where it is unused."""
    tiles: Tiles | None = None
    """The same for the Triton kernels, where they are to compute."""
    unused_too: bool = False
    """True where rows of unused slots follow the used ones; what is computed there is never looked at."""

    @property
    def token_N(self) -> Tensor:
        """The token behind each row."""
        return self.source_N // self.slot_TK.shape[1]


def sort_by_expert(expert_TK: Tensor, num_experts: int, tiled: bool = False, unused_too: bool = False) -> Order:
    """Group slots by expert, stable; num_experts marks an unused slot.

    tiled        by the Triton kernels, and with the tiles they work on
    unused_too   leave rows of unused slots in, after the others: how many there are is then not asked of the device
    """
    if tiled:
        from moestro.nn.kernels.gpu.experts import sort_tiles

        tiles = sort_tiles(expert_TK, num_experts)
        return Order(tiles.offset_X[:-1].diff(), tiles.source_A, tiles.row_A.view_as(expert_TK), tiles, True)
    if expert_TK.device.type == "cpu" and cpu.library() is not None:
        return Order(*cpu.count_sort(expert_TK.contiguous(), num_experts))
    flat_A = expert_TK.flatten()
    count_E = count_of(flat_A, num_experts + 1)[:num_experts]
    source_A, row_A = flat_A.argsort(stable=True), torch.empty_like(flat_A)
    row_A[source_A] = torch.arange(len(source_A), device=flat_A.device)
    slot_TK = row_A.where(flat_A < num_experts, -1).view_as(expert_TK)
    source_N = source_A if unused_too else source_A[: int(count_E.sum())]
    return Order(count_E, source_N, slot_TK, unused_too=unused_too)


def count_of(index_A: Tensor, num: int) -> Tensor:
    """How often each of 0..num-1 occurs, int64; bincount asks a GPU for the largest first, this does not."""
    if index_A.device.type == "cpu":
        return torch.bincount(index_A, minlength=num)
    count_X = torch.zeros(num, dtype=torch.int64, device=index_A.device)
    return count_X.scatter_add_(0, index_A.long(), torch.ones_like(index_A, dtype=torch.int64))


def to_slots(value_N: Tensor, order: Order) -> Tensor:
    """value_TK: the number of each row at its slot, 0 where that is unused."""
    value_A = value_N.new_zeros(order.slot_TK.numel())
    value_A[order.source_N] = value_N
    return value_A.view(order.slot_TK.shape)


def pairs_of(expert_TK: Tensor, num_experts: int) -> Tensor:
    """pair_X, float32: how many tokens chose both of two experts, pairs in the order (0,1) (0,2) ... (1,2) ..."""
    chosen_TE = torch.zeros(len(expert_TK), num_experts + 1, device=expert_TK.device).scatter_(1, expert_TK, 1.0)
    chosen_TE = chosen_TE[:, :num_experts]
    first_X, second_X = torch.triu_indices(num_experts, num_experts, 1, device=expert_TK.device)
    return (chosen_TE.T @ chosen_TE)[first_X, second_X]


def row_weights(weight_TK: Tensor, order: Order) -> Tensor:
    """weight_N: the routing weight of every row; 0, also to the gradient, where a row is of an unused slot."""
    weight_N = weight_TK.flatten()[order.source_N]
    if not order.unused_too:
        return weight_N
    used_N = torch.arange(len(weight_N), device=weight_N.device) < order.count_E.sum()
    return weight_N.where(used_N, 0.0)


def gather_rows(x_TD: Tensor, order: Order) -> Tensor:
    """x_ND: the token's row for every assignment, grouped by expert."""
    x_ND: Tensor = _Gather.apply(x_TD, order)
    return x_ND


def combine_rows(out_ND: Tensor, order: Order) -> Tensor:
    """y_TD: every token's rows summed in slot order; a token without experts stays zero."""
    y_TD: Tensor = _Combine.apply(out_ND, order)
    return y_TD


def _sum_slots(rows_ND: Tensor, slot_TK: Tensor) -> Tensor:
    if cpu.usable(rows_ND):
        return cpu.combine(rows_ND.contiguous(), slot_TK)
    padded_ND = torch.cat([rows_ND, rows_ND.new_zeros(1, rows_ND.shape[1])])
    sum_TD = padded_ND.new_zeros(len(slot_TK), rows_ND.shape[1])
    for slot_T in slot_TK.where(slot_TK >= 0, len(rows_ND)).unbind(1):
        sum_TD += padded_ND[slot_T]
    return sum_TD


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Order) -> Tensor:
        ctx.slot_TK = order.slot_TK
        return x_TD.index_select(0, order.token_N)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, None]:
        return _sum_slots(d_outputs[0], ctx.slot_TK), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_ND: Tensor, order: Order) -> Tensor:
        ctx.token_N = order.token_N
        return _sum_slots(out_ND, order.slot_TK)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, None]:
        return d_outputs[0].index_select(0, ctx.token_N), None
