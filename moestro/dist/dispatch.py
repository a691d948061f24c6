"""Carry token rows to the ranks that hold their experts, and the experts' outputs back.

    x_TD -> sort by expert -> exchange -> sort by local expert -> experts -> sort back -> exchange -> sum slots -> y_TD

Rank r of an expert axis holds experts r * L .. (r + 1) * L, so rows sorted by expert are sorted by rank. What arrives is
sorted by sending rank, then expert; sorting it by expert once more keeps the ranks' order, which is the order the tokens
have on one rank, so every expert sees the rows it would see there. How many rows go where crosses to the host in one
small copy; ranks and experts without rows are nothing special, and neither are tokens with few experts.

`Hierarchical` does this inside each node, and between nodes sends each token once to every node that has one of its
experts, to the rank in the sender's own place there; what the node's experts make of it is added up before it returns.
With k experts per token spread evenly over n nodes a token visits n (1 - (1 - 1/n)^k) of them instead of k.

With chunks > 1 the tokens go in as many parts, and a part's rows travel while the part before is computed:

    send 0 | send 1  compute 0 | return 0  send 2  compute 1 | return 1  compute 2 | return 2

Backward does the same in reverse: autograd runs nodes in the reverse order of their making, on every rank alike, `_Finish`
starts the gradient's way and `_Begin` waits for it. Between nodes (`Hierarchical`) only the slow link is overlapped.

Dimension key:  T tokens   D width   K slots   N rows we send   M rows we receive   L experts here   R ranks   C chunks
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moestro.dist.mesh import Axis, Pending
from moestro.nn.experts import TILED, AnyExperts, Path
from moestro.nn.permute import Order, combine_rows, gather_rows, sort_by_expert
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


@dataclass(frozen=True, slots=True)
class Leg:
    """The way of one chunk's rows, there and back."""

    order: Order
    """Of the chunk's slots, by rank."""
    send: list[int]
    receive: list[int]
    came_RL: Tensor
    """Rows for each expert here from each rank, or for each rank's node."""


class AllToAll:
    """One exchange between all ranks of the expert axis; rows go to each of their experts separately.

    node    neighbouring ranks that share a node, for counting bytes; 0: all do
    chunks  parts of the tokens, each exchanged while another is computed
    """

    def __init__(self, axis: Axis, node: int = 0, chunks: int = 1) -> None:
        self.axis, self.node, self.chunks, self.traffic = axis, node, chunks, Traffic()

    def __call__(self, x_TD: Tensor, choice: Choice, experts: AnyExperts, path: Path) -> Tensor:
        """See `nn.moe.Dispatcher`; `experts` are the ones of this rank."""
        if self.axis.group is None:
            order = sort_by_expert(choice.expert_TK, experts.num_experts, tiled=path in TILED)
            y_TD: Tensor = experts(x_TD, choice.weight_TK, order, path)
            return y_TD
        sizes = chunk_sizes(len(x_TD), self.chunks)
        legs = self.legs(choice.expert_TK.split(sizes), experts.num_experts)
        return self.carry(x_TD.split(sizes), choice.weight_TK.split(sizes), legs, experts, path)

    def legs(self, expert_CTK: Sequence[Tensor], local: int) -> list[Leg]:
        """Where the rows of every chunk go and come from; `local` experts are here."""
        axis = self.axis
        orders = [sort_by_expert(expert_TK, local * axis.size) for expert_TK in expert_CTK]
        sent_RCL = torch.stack([order.count_E.view(axis.size, local) for order in orders], 1)
        came_RCL = axis.swap_even(sent_RCL)
        sums_2RC = torch.stack([sent_RCL.sum(2), came_RCL.sum(2)])
        send_CR, receive_CR = sums_2RC.transpose(1, 2).tolist()  # the one copy to the host
        ways = zip(orders, send_CR, receive_CR, came_RCL.unbind(1), strict=True)
        return [Leg(*way) for way in ways]

    def rows(self, x_TD: Tensor, weight_TK: Tensor, leg: Leg) -> list[Tensor]:
        """What one chunk sends: a row and a weight for every slot."""
        row_bytes = x_TD.shape[1] * x_TD.element_size()
        self.traffic.count(self.axis, leg.send, row_bytes + 4, self.node)
        self.traffic.count(self.axis, leg.receive, row_bytes, self.node)  # outputs on their way back
        return [gather_rows(x_TD, leg.order), weight_TK.flatten()[leg.order.source_N]]

    def carry(
        self,
        x_CTD: Sequence[Tensor],
        weight_CTK: Sequence[Tensor],
        legs: Sequence[Leg],
        experts: AnyExperts,
        path: Path,
    ) -> Tensor:
        """All chunks there, through the experts, and back."""

        def compute(chunk: int, rows: list[Tensor]) -> Tensor:
            x_MD, weight_M = rows
            expert_M = expert_of_rows(legs[chunk].came_RL, len(x_MD))
            order = sort_by_expert(expert_M[:, None], experts.num_experts, tiled=path in TILED)
            out_MD: Tensor = experts(x_MD, weight_M[:, None], order, path)
            return out_MD

        def rows(chunk: int) -> list[Tensor]:
            return self.rows(x_CTD[chunk], weight_CTK[chunk], legs[chunk])

        return joined(in_turns(self.axis, legs, rows, compute))


class Hierarchical:
    """Between nodes once per token and node, then `AllToAll` inside the node."""

    def __init__(self, inside: Axis, rail: Axis, node: int = 0, chunks: int = 1) -> None:
        self.inside, self.rail, self.node, self.chunks = AllToAll(inside, node, chunks), rail, node, chunks
        self.traffic = self.inside.traffic

    def __call__(self, x_TD: Tensor, choice: Choice, experts: AnyExperts, path: Path) -> Tensor:
        """See `nn.moe.Dispatcher`."""
        if self.rail.group is None:
            return self.inside(x_TD, choice, experts, path)
        sizes = chunk_sizes(len(x_TD), self.chunks)
        per_node = experts.num_experts * self.inside.axis.size
        legs = self.legs(choice.expert_TK.split(sizes), per_node)
        ways = [self.there(*part, per_node) for part in zip(choice.expert_TK.split(sizes), legs, strict=True)]
        inner = self.inner_legs([expert_MK for expert_MK, _ in ways], experts.num_experts)
        x_CTD, weight_CTK = x_TD.split(sizes), choice.weight_TK.split(sizes)

        def rows(chunk: int) -> list[Tensor]:
            order, here_NK = legs[chunk].order, ways[chunk][1]
            weight_NK = weight_CTK[chunk][order.token_N].where(here_NK, 0.0)
            self.count(x_CTD[chunk], weight_NK.shape[1], legs[chunk])
            return [gather_rows(x_CTD[chunk], order), weight_NK]

        def compute(chunk: int, arrived: list[Tensor]) -> Tensor:
            if inner is None:
                return self.inside(arrived[0], Choice(ways[chunk][0], arrived[1]), experts, path)
            return self.inside.carry(arrived[:1], arrived[1:], inner[chunk : chunk + 1], experts, path)

        return joined(in_turns(self.rail, legs, rows, compute))

    def legs(self, expert_CTK: Sequence[Tensor], per_node: int) -> list[Leg]:
        """Which tokens of every chunk go to which node."""
        nodes, rail = self.rail.size, self.rail
        orders = [sort_by_expert(nodes_of(expert_TK, per_node, nodes), nodes) for expert_TK in expert_CTK]
        sent_RC = torch.stack([order.count_E for order in orders], 1)
        came_RC = rail.swap_even(sent_RC)
        send_CR, receive_CR = torch.stack([sent_RC, came_RC]).transpose(1, 2).tolist()
        return [Leg(*way) for way in zip(orders, send_CR, receive_CR, came_RC.unbind(1), strict=True)]

    def there(self, expert_TK: Tensor, leg: Leg, per_node: int) -> tuple[Tensor, Tensor]:
        """The slots of the tokens that came, counted within our node; and which slots of those we send are meant."""
        nodes, order = self.rail.size, leg.order
        node_N1 = torch.arange(nodes, device=expert_TK.device).repeat_interleave(order.count_E)[:, None]
        expert_NK = expert_TK[order.token_N]
        here_NK = (expert_NK // per_node == node_N1) & (expert_NK < nodes * per_node)
        expert_NK = (expert_NK - node_N1 * per_node).where(here_NK, per_node)
        return self.rail.begin_swap(expert_NK, leg.send, leg.receive).wait(), here_NK

    def inner_legs(self, expert_CMK: Sequence[Tensor], local: int) -> list[Leg] | None:
        """The ways inside the node, of all chunks at once; None where a node is one rank."""
        return None if self.inside.axis.group is None else self.inside.legs(expert_CMK, local)

    def count(self, x_TD: Tensor, slots: int, leg: Leg) -> None:
        """Bytes between nodes: a row with weights and experts of its slots there, a row back."""
        row_bytes = x_TD.shape[1] * x_TD.element_size()
        self.traffic.count(self.rail, leg.send, row_bytes + slots * (4 + 8), self.node)
        self.traffic.count(self.rail, leg.receive, row_bytes, self.node)


def in_turns(
    axis: Axis,
    legs: Sequence[Leg],
    rows: Callable[[int], list[Tensor]],
    compute: Callable[[int, list[Tensor]], Tensor],
) -> list[Tensor]:
    """Send the rows of every chunk, compute on what came, send it back and sum each token's slots.

    The next chunk leaves before this one is computed; results return while others are computed.
    """

    def leave(chunk: int) -> list[Arriving]:
        leg = legs[chunk]
        return [begin(tensor, leg.send, leg.receive, axis, beside) for tensor in rows(chunk)]

    beside = len(legs) > 1
    under_way, returning = [leave(0)], []
    for chunk, leg in enumerate(legs):
        if chunk + 1 < len(legs):
            under_way.append(leave(chunk + 1))
        out_MD = compute(chunk, [finish(arriving) for arriving in under_way[chunk]])
        returning.append(begin(out_MD, leg.receive, leg.send, axis, beside))
    return [combine_rows(finish(arriving), leg.order) for arriving, leg in zip(returning, legs, strict=True)]


def chunk_sizes(tokens: int, chunks: int) -> list[int]:
    """Parts as equal as can be; some are empty where there are fewer tokens than chunks."""
    return [tokens * (chunk + 1) // chunks - tokens * chunk // chunks for chunk in range(chunks)]


def joined(part_CTD: Sequence[Tensor]) -> Tensor:
    """Chunks after each other; one alone is not copied."""
    return part_CTD[0] if len(part_CTD) == 1 else torch.cat(list(part_CTD))


def nodes_of(expert_TK: Tensor, per_node: int, nodes: int) -> Tensor:
    """node_TC: every node that has one of the token's experts, in its own column; `nodes` where it has none."""
    bound_TC = torch.zeros(len(expert_TK), nodes + 1, dtype=torch.bool, device=expert_TK.device)
    bound_TC.scatter_(1, expert_TK // per_node, True)  # the last column: unused slots
    return torch.arange(nodes, device=expert_TK.device).where(bound_TC[:, :nodes], nodes)


def expert_of_rows(came_RL: Tensor, rows: int) -> Tensor:
    """expert_M: the local expert of every received row; rows are sorted by sending rank, then expert."""
    ranks, local = came_RL.shape
    expert_A = torch.arange(local, device=came_RL.device).repeat(ranks)
    return expert_A.repeat_interleave(came_RL.flatten(), output_size=rows)


@dataclass(slots=True)
class Crossing:
    """Rows on their way to other ranks, and later their gradient on its way back."""

    axis: Axis
    send: list[int]
    receive: list[int]
    beside: bool
    """See `Axis.begin_swap`."""
    pending: Pending | None = None

    def start(self, rows_NX: Tensor, back: bool = False) -> Tensor:
        """Send rows, or gradients `back`; the numbers of the result are undefined until `wait` has returned it."""
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        self.pending = self.axis.begin_swap(rows_NX, send, receive, self.beside)
        return self.pending.result

    def wait(self) -> Tensor:
        """What has come; what was sent is freed."""
        pending, self.pending = self.pending, None
        assert pending is not None
        return pending.wait()


Arriving = tuple[Tensor, Crossing]
"""Rows that autograd knows already, and what to wait for before they are read."""


def begin(rows_NX: Tensor, send: list[int], receive: list[int], axis: Axis, beside: bool) -> Arriving:
    """Send the first send[0] rows to rank 0, the next send[1] to rank 1, ...; `finish` returns what comes."""
    crossing = Crossing(axis, send, receive, beside)
    return _Begin.apply(rows_NX, crossing), crossing


def finish(arriving: Arriving) -> Tensor:
    """The rows that came, differentiable."""
    rows_MX: Tensor = _Finish.apply(*arriving)
    return rows_MX


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NX: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        return crossing.start(rows_NX)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.crossing.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MX: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.wait()
        return rows_MX.view_as(rows_MX)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, None]:
        ctx.crossing.start(d_outputs[0], back=True)
        return d_outputs[0], None  # stands for the gradient that `_Begin` waits for
