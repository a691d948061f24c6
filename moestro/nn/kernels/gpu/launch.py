"""Allocate what a kernel writes, and launch it: one function per kernel.

Outputs are allocated for every place, used or not, since how many are used is known on the device only; rows beyond
the used ones are never written and never read.

Dimension key:  T tokens   K slots   A = T*K places   D width   F expert width   E experts
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moestro.nn.kernels.gpu import combine, interpreted, products, weight_gradient
from moestro.nn.kernels.gpu.blocks import Blocks, Kernel, blocks_for
from moestro.nn.kernels.gpu.tiles import Tiles


@functools.cache
def has_copy_engine(device_type: str, index: int) -> bool:
    """True where tiles can be copied by descriptor: Hopper and later, and the interpreter."""
    return device_type == "cpu" or torch.cuda.get_device_capability(index) >= (9, 0)


def _engine(x: Tensor) -> bool:
    return has_copy_engine(x.device.type, x.device.index or 0)


def pick(kernel: Kernel, x: Tensor, down_EFD: Tensor) -> Blocks:
    """What to launch a kernel with for these tensors."""
    num_experts, hidden, width = down_EFD.shape
    return blocks_for(kernel, x.dtype, (width, hidden, num_experts), interpreted())


def _options(blocks: Blocks, tma: bool) -> dict[str, Any]:
    return {
        "COLUMNS": blocks.columns,
        "INNER": blocks.inner,
        "GROUP": blocks.group,
        "TMA": tma,
        "UPCAST": interpreted(),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _slices(weight_EIO: Tensor, high: int, wide: int, tma: bool) -> Any:
    return TensorDescriptor.from_tensor(weight_EIO, [1, high, wide]) if tma else weight_EIO


def gate_up_act(
    x_TD: Tensor, share_TK: Tensor, tiles: Tiles, gate_up_EDF: Tensor, keep: bool, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """act_AF = silu(x Wg) * (x Wu) * share, and the product before SwiGLU where `keep` (else empty)."""
    num_experts, width, double = gate_up_EDF.shape
    hidden, places, tma = double // 2, tiles.source_A.numel(), _engine(x_TD)
    act_AF = x_TD.new_empty(places, hidden)
    gate_up_AF = x_TD.new_empty(places if keep else 0, double)
    most, columns = tiles.tile_2M.shape[1], triton.cdiv(hidden, blocks.columns)
    if places:
        products.gate_up_act[(most * columns,)](
            x_TD, _slices(gate_up_EDF, blocks.inner, blocks.columns, tma), share_TK, tiles.source_A, tiles.offset_X,
            tiles.tile_2M, gate_up_AF, act_AF, most, tiles.slots, num_experts,
            WIDTH=width, HIDDEN=hidden, ROWS=tiles.rows, KEEP=keep, **_options(blocks, tma),
        )  # fmt: skip
    return act_AF, gate_up_AF


def rows_product(a_AI: Tensor, tiles: Tiles, weight: Tensor, transposed: bool, blocks: Blocks) -> Tensor:
    """a @ W[e] by expert, or @ W[e]^T."""
    num_experts, inside, outside = weight.shape
    high, wide = blocks.inner, blocks.columns
    if transposed:
        inside, outside, high, wide = outside, inside, wide, high
    tma, most = _engine(a_AI), tiles.tile_2M.shape[1]
    out_AO = a_AI.new_empty(len(a_AI), outside)
    if len(a_AI):
        left = TensorDescriptor.from_tensor(a_AI, [tiles.rows, blocks.inner]) if tma else a_AI
        products.rows_product[(most * triton.cdiv(outside, blocks.columns),)](
            left, _slices(weight, high, wide, tma), tiles.offset_X, tiles.tile_2M, out_AO, most, num_experts,
            INSIDE=inside, OUTSIDE=outside, TRANSPOSED=transposed, ROWS=tiles.rows,
            **_options(blocks, tma),
        )  # fmt: skip
    return out_AO


def act_backward(
    d_y_TD: Tensor, share_TK: Tensor, tiles: Tiles, down_EFD: Tensor, gate_up_AF: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """d_gate_up, act again, and the parts of d_share: [column tiles, A]."""
    num_experts, hidden, width = down_EFD.shape
    places, most, tma = tiles.source_A.numel(), tiles.tile_2M.shape[1], _engine(d_y_TD)
    columns = triton.cdiv(hidden, blocks.columns)
    d_gate_up_AF, act_AF = torch.empty_like(gate_up_AF), d_y_TD.new_empty(places, hidden)
    part_XA = torch.empty(columns, places, dtype=torch.float32, device=d_y_TD.device)
    if places:
        wide = blocks.columns // 2 if blocks.columns >= products.HALVED.value else blocks.columns
        kept = TensorDescriptor.from_tensor(gate_up_AF, [tiles.rows, wide]) if tma else gate_up_AF
        products.act_backward[(most * columns,)](
            d_y_TD, _slices(down_EFD, blocks.columns, blocks.inner, tma), share_TK, tiles.source_A, tiles.offset_X,
            tiles.tile_2M, kept, d_gate_up_AF, act_AF, part_XA, most, tiles.slots, places,
            num_experts,
            WIDTH=width, HIDDEN=hidden, ROWS=tiles.rows, **_options(blocks, tma),
        )  # fmt: skip
    return d_gate_up_AF, act_AF, part_XA


def weight_gradients(
    left_XI: Tensor, right_XO: Tensor, tiles: Tiles, gather_left: bool, dtype: torch.dtype, blocks: Blocks
) -> Tensor:
    """left[rows of e]^T right[rows of e] for every expert, in `dtype`; the gathered side has a row per token."""
    num_experts, inside, outside = tiles.busiest_E.numel(), left_XI.shape[1], right_XO.shape[1]
    out_EIO = torch.empty(num_experts, inside, outside, dtype=dtype, device=left_XI.device)
    programs = num_experts * triton.cdiv(inside, blocks.high) * triton.cdiv(outside, blocks.columns)
    weight_gradient.weight_gradient[(programs,)](
        left_XI, right_XO, tiles.source_A, tiles.offset_X, tiles.busiest_E, out_EIO, tiles.slots,
        INSIDE=inside, OUTSIDE=outside, GATHER_LEFT=gather_left, HIGH=blocks.high, WIDE=blocks.columns,
        ROWS=blocks.inner, GROUP=blocks.group, UPCAST=interpreted(), num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out_EIO


def combine_slots(rows_AD: Tensor, row_A: Tensor, tokens: int, slots: int) -> Tensor:
    """y_TD: every token's rows summed in slot order."""
    width = rows_AD.shape[1]
    y_TD = rows_AD.new_empty(tokens, width)
    columns = min(triton.next_power_of_2(width), 2048)
    if tokens and slots:
        combine.combine_slots[(tokens, triton.cdiv(width, columns))](
            rows_AD, row_A, y_TD, WIDTH=width, SLOTS=slots, COLUMNS=columns, num_warps=max(columns // 256, 1)
        )
    return y_TD


def sum_parts(part_XA: Tensor, row_A: Tensor, slots: int) -> Tensor:
    """d_share_TK from the parts of column tiles."""
    places = row_A.numel()
    out_A = torch.empty(places, dtype=torch.float32, device=row_A.device)
    if places:
        combine.sum_parts[(triton.cdiv(places, 512),)](part_XA, row_A, out_A, places, len(part_XA), BLOCK=512)
    return out_A.view(-1, slots)
