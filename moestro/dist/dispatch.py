"""Carry token rows to the ranks that hold their experts, and the experts' outputs back.

    x_TD -> sort by expert -> exchange -> sort by local expert -> experts -> sort back -> exchange -> sum slots -> y_TD

Rank r of an expert axis holds experts r * L .. (r + 1) * L, so rows sorted by expert are sorted by rank. What arrives is
sorted by sending rank, then expert; sorting it by expert once more keeps the ranks' order, which is the order the tokens
have on one rank, so every expert sees the rows it would see there. How many rows go where crosses to the host in one
small copy; ranks and experts without rows are nothing special, and neither are tokens with few experts.

`Hierarchical` does this inside each node, and between nodes sends each token once to every node that has one of its
experts, to the rank in the sender's own place there; what the node's experts make of it is added up before it returns.
With k experts per token spread evenly over n nodes a token visits n (1 - (1 - 1/n)^k) of them instead of k.

Dimension key:  T tokens   D width   K slots   N rows we send   M rows we receive   L experts here   R ranks
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moestro.dist.mesh import PULSE, Axis, begin_pairs
from moestro.nn.experts import AnyExperts, Path
from moestro.nn.permute import combine_rows, gather_rows, sort_by_expert
from moestro.nn.routing_rules import Choice


@dataclass(slots=True)
class Traffic:
    """Bytes this rank has sent in forward exchanges; the backward pass sends as many again."""

    inside_bytes: int = 0
    """To other ranks of the same node."""
    between_bytes: int = 0
    """To ranks of other nodes."""

    def count(self, axis: Axis, send: list[int], row_bytes: int, node: int) -> None:
        """Add rows; `node` is the number of neighbouring ranks that share a node, 0 for all."""
        for rank, rows in zip(axis.ranks, send, strict=True):
            if node and rank // node != axis.ranks[axis.index] // node:
                self.between_bytes += rows * row_bytes
            elif rank != axis.ranks[axis.index]:
                self.inside_bytes += rows * row_bytes


class AllToAll:
    """One exchange between all ranks of the expert axis; rows go to each of their experts separately.

    node   neighbouring ranks that share a node, for counting bytes; 0: all do
    """

    def __init__(self, axis: Axis, node: int = 0) -> None:
        self.axis, self.node, self.traffic = axis, node, Traffic()

    def __call__(self, x_TD: Tensor, choice: Choice, experts: AnyExperts, path: Path) -> Tensor:
        """See `nn.moe.Dispatcher`; `experts` are the ones of this rank."""
        local, axis = experts.num_experts, self.axis
        order = sort_by_expert(choice.expert_TK, local * axis.size)
        if axis.group is None:
            y_TD: Tensor = experts(x_TD, choice.weight_TK, order, path)
            return y_TD
        sent_RL = order.count_E.view(axis.size, local)
        came_RL = swap_even(sent_RL, axis)
        send, receive = torch.stack([sent_RL.sum(1), came_RL.sum(1)]).tolist()  # the one copy to the host
        self.traffic.count(axis, send, x_TD.shape[1] * x_TD.element_size() + 4, self.node)
        self.traffic.count(axis, receive, x_TD.shape[1] * x_TD.element_size(), self.node)  # outputs on their way back
        weight_N = choice.weight_TK.flatten()[order.source_N]
        x_MD = exchange(gather_rows(x_TD, order), send, receive, axis)
        weight_M = exchange(weight_N, send, receive, axis)
        inner = sort_by_expert(expert_of_rows(came_RL, sum(receive))[:, None], local)
        out_MD = experts(x_MD, weight_M[:, None], inner, path)
        return combine_rows(exchange(out_MD, receive, send, axis), order)


class Hierarchical:
    """Between nodes once per token and node, then `AllToAll` inside the node."""

    def __init__(self, inside: Axis, rail: Axis, node: int = 0) -> None:
        self.inside, self.rail, self.node = AllToAll(inside, node), rail, node
        self.traffic = self.inside.traffic

    def __call__(self, x_TD: Tensor, choice: Choice, experts: AnyExperts, path: Path) -> Tensor:
        """See `nn.moe.Dispatcher`."""
        nodes, per_node, rail = self.rail.size, experts.num_experts * self.inside.axis.size, self.rail
        if rail.group is None:
            return self.inside(x_TD, choice, experts, path)
        expert_TK, slots = choice.expert_TK, choice.expert_TK.shape[1]
        bound_TC = torch.zeros(len(x_TD), nodes + 1, dtype=torch.bool, device=x_TD.device)
        bound_TC.scatter_(1, expert_TK // per_node, True)  # the last column: unused slots
        node_TC = torch.arange(nodes, device=x_TD.device).where(bound_TC[:, :nodes], nodes)
        order = sort_by_expert(node_TC, nodes)
        came_R = swap_even(order.count_E, rail)
        send, receive = torch.stack([order.count_E, came_R]).tolist()
        row_bytes = x_TD.shape[1] * x_TD.element_size()
        self.traffic.count(rail, send, row_bytes + slots * (4 + 8), self.node)
        self.traffic.count(rail, receive, row_bytes, self.node)
        node_N1 = torch.arange(nodes, device=x_TD.device).repeat_interleave(order.count_E)[:, None]
        expert_NK, weight_NK = expert_TK[order.token_N], choice.weight_TK[order.token_N]
        here_NK = (expert_NK // per_node == node_N1) & (expert_NK < nodes * per_node)
        expert_NK = (expert_NK - node_N1 * per_node).where(here_NK, per_node)
        x_MD = exchange(gather_rows(x_TD, order), send, receive, rail)
        weight_MK = exchange(weight_NK.where(here_NK, 0.0), send, receive, rail)
        there = Choice(_swap(expert_NK, send, receive, rail), weight_MK)
        y_MD = self.inside(x_MD, there, experts, path)
        return combine_rows(exchange(y_MD, receive, send, rail), order)


def expert_of_rows(came_RL: Tensor, rows: int) -> Tensor:
    """expert_M: the local expert of every received row; rows are sorted by sending rank, then expert."""
    ranks, local = came_RL.shape
    expert_A = torch.arange(local, device=came_RL.device).repeat(ranks)
    return expert_A.repeat_interleave(came_RL.flatten(), output_size=rows)


def swap_even(rows_RX: Tensor, axis: Axis) -> Tensor:
    """Row r goes to rank r; what comes back is row r from rank r."""
    out_RX = torch.empty_like(rows_RX)
    PULSE.entered += 1
    dist.all_to_all_single(out_RX, rows_RX.contiguous(), group=axis.group)
    return out_RX


def exchange(rows_NX: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
    """Send the first send[0] rows to rank 0, the next send[1] to rank 1, ...; returns what came, differentiable."""
    rows_MX: Tensor = _Exchange.apply(rows_NX, send, receive, axis)
    return rows_MX


def _swap(rows_NX: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
    out_MX = rows_NX.new_empty(sum(receive), *rows_NX.shape[1:])
    PULSE.entered += 1
    if rows_NX.is_cuda:
        dist.all_to_all_single(out_MX, rows_NX.contiguous(), receive, send, group=axis.group)
    else:
        for work in begin_pairs(rows_NX.contiguous().split(send), out_MX.split(receive), axis):
            work.wait()
    return out_MX


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NX: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
        ctx.back = (receive, send, axis)
        return _swap(rows_NX, send, receive, axis)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return _swap(d_outputs[0], *ctx.back), None, None, None
