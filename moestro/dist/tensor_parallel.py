"""Split attention and feed-forward layers by heads and hidden columns (Megatron, Shoeybi 2019).

    x_BSD -> copy_in -> columns of q, k, v or gate, up -> rows of out or down -> sum_out -> y_BSD

`copy_in` changes nothing forward and sums gradients backward; `sum_out` sums forward and changes nothing backward: one
sum per layer and direction. The stream between layers, norms, routers, embedding and head are whole on every rank.
Experts either keep their width and take turns with tokens (`TokenParts`: each tp rank dispatches its part of them), or
are split by hidden columns too (`SplitExperts`, dist.expert_tp).

Dimension key:  T tokens   D width   K slots   F hidden width
"""

from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.errors import ConfigError
from moestro.dist.mesh import Axis
from moestro.nn.attention import GroupedQueryAttention, LatentAttention
from moestro.nn.experts import AnyExperts, Path
from moestro.nn.moe import Dispatcher, FeedForward
from moestro.nn.routing_rules import Choice

COLUMNS, ROWS = 0, 1
"""The dimension of a linear map's weight that is cut: its outputs, or its inputs."""
Cuts = dict[str, int]
"""Names of linear maps below a module, and where each is cut."""


def copy_in(x: Tensor, axis: Axis) -> Tensor:
    """The same numbers; their gradient is the sum over the ranks."""
    y: Tensor = _CopyIn.apply(x, axis)
    return y


def sum_out(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the ranks; its gradient goes to each of them as it is."""
    y: Tensor = _SumOut.apply(x, axis)
    return y


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.sum(d_outputs[0].contiguous()), None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return axis.sum(x.contiguous())

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, None]:
        return d_outputs[0], None


class _TakePart(torch.autograd.Function):
    """Our part of the rows; the gradient is gathered from all ranks."""

    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.rows = axis, len(x_TX)
        return x_TX[part_of(len(x_TX), axis)].clone()

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, None]:
        return _whole(d_outputs[0], ctx.rows, ctx.axis), None


class _JoinParts(torch.autograd.Function):
    """All ranks' parts of the rows; the gradient is our part of it."""

    @staticmethod
    def forward(ctx: Any, part_PX: Tensor, rows: int, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _whole(part_PX, rows, axis)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, None, None]:
        return d_outputs[0][part_of(len(d_outputs[0]), ctx.axis)].contiguous(), None, None


def part_of(rows: int, axis: Axis) -> slice:
    """Which of so many rows are ours: equal parts, the last ones shorter."""
    each = -(-rows // axis.size)
    return slice(min(axis.index * each, rows), min((axis.index + 1) * each, rows))


def _whole(part_PX: Tensor, rows: int, axis: Axis) -> Tensor:
    each = -(-rows // axis.size)
    padded_PX = part_PX.new_zeros(each, *part_PX.shape[1:])
    padded_PX[: len(part_PX)] = part_PX
    return axis.gather_even(padded_PX)[:rows]


class TokenParts:
    """Every tp rank dispatches its own part of the tokens; all get all outputs."""

    def __init__(self, inner: Dispatcher, axis: Axis) -> None:
        self.inner, self.axis = inner, axis

    def __call__(self, x_TD: Tensor, choice: Choice, experts: AnyExperts, path: Path) -> Tensor:
        """See `nn.moe.Dispatcher`."""
        expert_PK = choice.expert_TK[part_of(len(x_TD), self.axis)]
        weight_PK: Tensor = _TakePart.apply(choice.weight_TK, self.axis)
        part = self.inner(_TakePart.apply(x_TD, self.axis), Choice(expert_PK, weight_PK), experts, path)
        y_TD: Tensor = _JoinParts.apply(part, len(x_TD), self.axis)
        return y_TD


class SplitExperts:
    """Every tp rank dispatches all tokens to its columns of their experts; outputs are summed."""

    def __init__(self, inner: Dispatcher, axis: Axis) -> None:
        self.inner, self.axis = inner, axis

    def __call__(self, x_TD: Tensor, choice: Choice, experts: AnyExperts, path: Path) -> Tensor:
        """See `nn.moe.Dispatcher`."""
        split = Choice(choice.expert_TK, copy_in(choice.weight_TK, self.axis))
        return sum_out(self.inner(copy_in(x_TD, self.axis), split, experts, path), self.axis)


def split_attention(attention: nn.Module, axis: Axis) -> tuple[Cuts, list[str]]:
    """Give every rank its heads; returns what to cut, and norms that see only our heads."""
    assert isinstance(attention, GroupedQueryAttention | LatentAttention)
    num_heads = attention.num_heads
    if num_heads % axis.size:
        raise ConfigError(f"dist.tp is {axis.size}; it must divide model.attention.num_heads = {num_heads}")
    attention.num_heads //= axis.size
    _sum_output(attention.out, axis)
    if isinstance(attention, LatentAttention):
        _copy_input(attention.q, axis)
        attention.kv_down.register_forward_hook(lambda _m, _x, y: copy_in(y, axis))
        return {"q": COLUMNS, "kv_up": COLUMNS, "out": ROWS}, ["kv_norm"]
    if attention.kv_heads % axis.size or attention.norm_rows:
        raise ConfigError(
            f"dist.tp is {axis.size}; it must divide model.attention.num_kv_heads = {attention.kv_heads}, "
            "and model.attention.qk_norm must not be row"
        )
    attention.kv_heads //= axis.size
    _copy_input(attention, axis)
    return {"q": COLUMNS, "k": COLUMNS, "v": COLUMNS, "out": ROWS}, ["q_norm", "k_norm"]


def split_feed_forward(layer: FeedForward, axis: Axis) -> Cuts:
    """Give every rank its hidden columns."""
    hidden = layer.gate.out_features
    if hidden % axis.size:
        raise ConfigError(f"dist.tp is {axis.size}; it must divide the hidden width {hidden} of every feed-forward")
    _copy_input(layer, axis)
    _sum_output(layer.down, axis)
    return {"gate": COLUMNS, "up": COLUMNS, "down": ROWS}


def _copy_input(module: nn.Module, axis: Axis) -> None:
    module.register_forward_pre_hook(lambda _module, x: (copy_in(x[0], axis), *x[1:]))


def _sum_output(linear: nn.Linear, axis: Axis) -> None:
    """Sum what the ranks' parts make; a bias, which is whole on each, counts once."""

    def hook(_module: nn.Module, _x: Any, y: Tensor) -> Tensor:
        total = sum_out(y, axis)
        return total if linear.bias is None else total - (axis.size - 1) * linear.bias.detach()

    linear.register_forward_hook(hook)
