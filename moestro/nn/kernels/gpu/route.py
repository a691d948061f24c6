"""The router's choice as torch operators around routing.py.

    logit_TE, bias_E, threshold, seen_E -> route -> expert_TK, weight_TK, and what the record needs

Dimension key:  T tokens   E experts   K slots   B histogram bins   X scratch
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from moestro.nn.kernels.gpu import interpreted, on_its_device, routing
from moestro.nn.kernels.gpu.interpreter import repair
from moestro.nn.routing_budget import BINS

ELEMENTS = 1024
"""Scores that one program holds."""
PROGRAMS = 264
"""Two for each multiprocessor of a Hopper GPU; fixed, so that sums do not depend on the GPU."""


@dataclass(frozen=True, slots=True)
class Routed:
    """What the kernels give."""

    expert_TK: Tensor
    weight_TK: Tensor
    used_T: Tensor
    """Experts of each token."""
    gap_T: Tensor
    """What the threshold was held against; gap only."""
    decision_B: Tensor
    """Histogram of it, int32."""
    count_E: Tensor
    loss: Tensor
    """aux * balance + z * z-loss; the one that has a gradient besides weight_TK."""
    balance: Tensor
    entropy: Tensor


torch.library.define(
    "moestro::route",
    "(Tensor logit, Tensor bias, Tensor threshold, Tensor seen, int slots, bool softmax, bool biased, bool gap, "
    "int mode, float scale, float aux, float z) -> Tensor[]",
)
torch.library.define(
    "moestro::route_backward",
    "(Tensor logit, Tensor expert, Tensor weight, Tensor second, Tensor share, Tensor d_weight, Tensor d_loss, "
    "bool softmax, int mode, float scale, float aux, float z) -> Tensor",
)


def _sizes(experts: int) -> tuple[int, int]:
    """Experts rounded up to a power of two, and tokens of a program."""
    wide = triton.next_power_of_2(max(experts, 2))
    return wide, 16 if interpreted() else max(min(ELEMENTS // wide, 64), 1)


def _shapes(tokens: int, experts: int, slots: int, gap: bool) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """expert, weight, used, gap, second, histogram, count, share, loss, balance, entropy."""
    whole, real, pair = torch.int64, torch.float32, tokens if gap else 0
    tall: list[tuple[tuple[int, ...], torch.dtype]] = [((tokens, slots), whole), ((tokens, slots), real)]
    tall += [((tokens,), whole), ((pair,), real), ((pair,), torch.int32), ((BINS if gap else 0,), torch.int32)]
    return [*tall, ((experts,), real), ((experts,), real), ((), real), ((), real), ((), real)]


@torch.library.impl("moestro::route", "default")
@on_its_device
def _route(
    logit_TE: Tensor, bias_E: Tensor, threshold: Tensor, seen_E: Tensor, slots: int, softmax: bool, biased: bool,
    gap: bool, mode: int, scale: float, aux: float, z: float,
) -> list[Tensor]:  # fmt: skip
    tokens, experts = logit_TE.shape
    wide, rows = _sizes(experts)
    blocks = min(triton.cdiv(tokens, rows), PROGRAMS)
    made = [logit_TE.new_empty(shape, dtype=dtype) for shape, dtype in _shapes(tokens, experts, slots, gap)[:8]]
    expert_TK, weight_TK, used_T, gap_T, second_T, decision_B, count_E, share_E = made
    decision_B.zero_()
    block_X, number_3 = logit_TE.new_empty(max(blocks, 1), 2 * wide + 2), logit_TE.new_empty(3)
    if tokens:
        routing.route_tokens[(blocks,)](
            logit_TE, bias_E, threshold, expert_TK, weight_TK, used_T, gap_T, second_T, decision_B, block_X, tokens,
            blocks,
            EXPERTS=experts, WIDE=wide, SLOTS=slots, ROWS=rows, SOFTMAX=softmax, BIASED=biased, GAP=gap, MODE=mode,
            WEIGHT_SCALE=scale,
        )  # fmt: skip
    routing.sum_blocks[(1,)](
        block_X, seen_E, count_E, share_E, number_3, blocks, tokens, aux, z,
        EXPERTS=experts, WIDE=wide, HIGH=max(min(4096 // wide, 64), 1),
    )  # fmt: skip
    return [*made, *(number.clone() for number in number_3.unbind())]


@torch.library.register_fake("moestro::route")
def _(
    logit_TE: Tensor, bias_E: Tensor, threshold: Tensor, seen_E: Tensor, slots: int, softmax: bool, biased: bool,
    gap: bool, mode: int, scale: float, aux: float, z: float,
) -> list[Tensor]:  # fmt: skip
    tokens, experts = logit_TE.shape
    shapes = _shapes(tokens, experts, slots, gap)
    return [logit_TE.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


@torch.library.impl("moestro::route_backward", "default")
@on_its_device
def _backward(
    logit_TE: Tensor, expert_TK: Tensor, weight_TK: Tensor, second_T: Tensor, share_E: Tensor, d_weight_TK: Tensor,
    d_loss: Tensor, softmax: bool, mode: int, scale: float, aux: float, z: float,
) -> Tensor:  # fmt: skip
    tokens, experts = logit_TE.shape
    wide, rows = _sizes(experts)
    d_logit_TE = torch.empty_like(logit_TE)
    if tokens:
        routing.route_backward[(triton.cdiv(tokens, rows),)](
            logit_TE, expert_TK, weight_TK, second_T, share_E, d_weight_TK, d_loss, d_logit_TE, tokens, aux, z,
            EXPERTS=experts, WIDE=wide, SLOTS=expert_TK.shape[1], ROWS=rows, SOFTMAX=softmax, MODE=mode,
            WEIGHT_SCALE=scale,
        )  # fmt: skip
    return d_logit_TE


@torch.library.register_fake("moestro::route_backward")
def _(logit_TE: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logit_TE)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    logit_TE, softmax, (mode, scale, aux, z) = inputs[0], inputs[5], inputs[8:]
    expert_TK, weight_TK, second_T, share_E = output[0], output[1], output[4], output[7]
    ctx.save_for_backward(logit_TE, expert_TK, weight_TK, second_T, share_E)
    ctx.settings = (softmax, mode, scale, aux, z)


def _gradients(ctx: Any, d_outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    d_weight_TK, d_loss = d_outputs[1].contiguous(), d_outputs[8]
    d_logit_TE = torch.ops.moestro.route_backward(*ctx.saved_tensors, d_weight_TK, d_loss, *ctx.settings)
    return d_logit_TE, *[None] * 11


torch.library.register_autograd("moestro::route", _gradients, setup_context=_remember)


def route(
    logit_TE: Tensor, bias_E: Tensor | None, threshold: Tensor, seen_E: Tensor, *,
    slots: int, softmax: bool, gap: bool, weights: str, scale: float, aux: float, z: float,
) -> Routed:  # fmt: skip
    """Choose experts.

    logit_TE   float32
    bias_E     added to scores for the selection only; None: nothing is
    threshold  gap: the second expert is taken where the gap is at most this
    seen_E     assignments of earlier micro-batches that count for the balance
    weights    a key of routing.MODES
    """
    if interpreted():
        repair()
    expert_TK, weight_TK, used_T, gap_T, _, decision_B, count_E, _, loss, balance, entropy = torch.ops.moestro.route(
        logit_TE.contiguous(), seen_E if bias_E is None else bias_E, threshold, seen_E, slots, softmax,
        bias_E is not None, gap, routing.MODES[weights], scale, aux, z,
    )  # fmt: skip
    return Routed(expert_TK, weight_TK, used_T, gap_T, decision_B, count_E, loss, balance.detach(), entropy.detach())
