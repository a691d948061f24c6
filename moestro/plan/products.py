"""Matrix products of a layer and the seconds they take: a shape-aware roofline.

    products(rows, [(inner, outer), ...]) -> Products -> forward_s, backward_s

A product [rows, inner] x [inner, outer] does 2 x rows x inner x outer operations on rows x inner + inner x outer +
rows x outer elements. Its time is a smooth maximum of computing and of moving operands, plus a fixed time per kernel
(FORMULAS 4.2). Computing slows down where the inner dimension is short: the pipeline of a tile has to fill.
The backward pass is two such products; the second one also adds into the fp32 (or bf16) gradient of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moestro.plan.columns import Number, larger
from moestro.plan.constants import Constants
from moestro.plan.machine import REFERENCE_FLOPS_PER_S, Machine, Precision

NARROW_OPERAND_BYTES = 1.3
"""Of an operand of 8-bit products on average: inputs 1 byte, outputs 2."""
GRADIENT_TRAFFIC_BYTES = 8.0
"""Per weight and micro-batch: the gradient is read and written in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Products:
    """Some products of one layer and micro-batch on one rank, forward."""

    flops: Number
    """With every side rounded up to whole tiles."""
    elements: Number
    """Of operands and results."""
    weights: Number
    inputs: Number
    """Elements of the inputs that are kept and, in narrow formats, quantised."""
    depths: Number
    """Sum of the inner dimensions: what one more tile of every product computes."""
    depths_back: Number
    """The same for the two products of the backward pass."""
    depth: Number
    """Mean inner dimension, weighted by operations over it."""
    kernels: Number


def products(rows: Number, shapes: Sequence[tuple[Number, Number]], tile: Number, copies: Number = 1.0) -> Products:
    """Sum up products of `rows` rows with matrices (inner, outer); a matrix with a side of 0 is not there.

    tile    side of a tile
    copies  matrices of each shape that share the rows: the experts on this rank
    """
    weights: Number = 0.0
    padded: Number = 0.0
    inner_sum: Number = 0.0
    outer_sum: Number = 0.0
    kernels: Number = 0.0
    for inner, outer in shapes:
        there = (np.asarray(inner) > 0) & (np.asarray(outer) > 0)
        weights = weights + np.where(there, inner * outer, 0.0)
        padded = padded + np.where(there, _padded(inner, tile) * _padded(outer, tile), 0.0)
        inner_sum = inner_sum + np.where(there, inner, 0.0)
        outer_sum = outer_sum + np.where(there, outer, 0.0)
        kernels = kernels + np.where(there, 1.0, 0.0)
    return Products(
        flops=2 * rows * padded,
        elements=rows * (inner_sum + outer_sum) + copies * weights,
        weights=copies * weights,
        inputs=rows * inner_sum,
        depths=inner_sum,
        depths_back=outer_sum + kernels * rows,
        depth=weights / np.maximum(outer_sum, 1.0),
        kernels=kernels,
    )


def _padded(side: Number, tile: Number) -> Number:
    """A side of a matrix as tiles see it."""
    return np.asarray(np.ceil(np.asarray(side, dtype=np.float64) / tile) * tile, dtype=np.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a product in the step's format gets on this machine."""

    flops_per_s: Number
    bytes_per_s: Number
    depth_half: Number
    operand_bytes: Number
    narrow: Number
    wave: Number


def rates(machine: Machine, precision: Precision, constants: Constants) -> Rates:
    """Rates of products in the step's format."""
    share = np.where(
        np.asarray(precision.four) > 0,
        constants.fp4_share,
        np.where(
            np.asarray(precision.block) > 0,
            constants.mx_share,
            np.where(np.asarray(precision.narrow) > 0, constants.fp8_share, 1.0),
        ),
    )
    return Rates(
        flops_per_s=machine.matmul_flops_per_s * constants.matmul_share * share,
        bytes_per_s=machine.memory_bytes_per_s * constants.memory_share,
        depth_half=_depth_half(machine, constants) * (1 + precision.narrow),
        operand_bytes=np.where(np.asarray(precision.narrow) > 0, NARROW_OPERAND_BYTES, 2.0 + 2.0 * precision.single),
        narrow=precision.narrow,
        wave=machine.wave,
    )


def wide_rates(machine: Machine, precision: Precision, constants: Constants) -> Rates:
    """Rates of products that stay in 16 bits (32 in an fp32 run): the output head."""
    return Rates(
        flops_per_s=machine.bf16_flops_per_s * constants.matmul_share,
        bytes_per_s=machine.memory_bytes_per_s * constants.memory_share,
        depth_half=_depth_half(machine, constants),
        operand_bytes=2.0 + 2.0 * precision.single,
        narrow=0.0,
        wave=machine.wave,
    )


def _depth_half(machine: Machine, constants: Constants) -> Number:
    """A device that computes faster needs a longer inner dimension to hide its fill."""
    return constants.depth_half * machine.peak_flops_per_s / REFERENCE_FLOPS_PER_S


def forward_s(work: Products, at: Rates, constants: Constants, slowdown: Number = 1.0) -> Number:
    """Seconds of the forward products; slowdown multiplies computing only."""
    traffic_s = constants.operand_weight * at.operand_bytes * work.elements / at.bytes_per_s
    quantise_s = at.narrow * constants.quantise * 3 * work.inputs / at.bytes_per_s
    compute_s = _compute_s(work, at, slowdown) + _tail_s(work.depths, at, constants)
    return larger(compute_s, traffic_s, 2) + work.kernels * constants.kernel_s + quantise_s


def backward_s(work: Products, at: Rates, constants: Constants, slowdown: Number = 1.0) -> Number:
    """Seconds of the products that make the gradients of inputs and of weights."""
    compute_s = _compute_s(work, at, slowdown) + _tail_s(work.depths_back, at, constants) / 2
    traffic_s = constants.operand_weight * at.operand_bytes * work.elements / at.bytes_per_s
    gradient_s = traffic_s + constants.operand_weight * GRADIENT_TRAFFIC_BYTES * work.weights / at.bytes_per_s
    quantise_s = at.narrow * constants.quantise * 6 * work.inputs / at.bytes_per_s
    both_s = larger(compute_s, traffic_s, 2) + larger(compute_s, gradient_s, 2)
    return both_s + 2 * work.kernels * constants.kernel_s + quantise_s


def _compute_s(work: Products, at: Rates, slowdown: Number) -> Number:
    return work.flops / at.flops_per_s * (1 + at.depth_half / np.maximum(work.depth, 1.0)) * slowdown


def _tail_s(depths: Number, at: Rates, constants: Constants) -> Number:
    """Multiprocessors that idle in the last wave of tiles, for products of these inner dimensions."""
    return constants.tail_wave * 2 * at.wave * depths / at.flops_per_s
