"""Quantise, and launch the kernels of fp8.py: the same functions as launch.py has, on 8 bits.

Dimension key:  A rows   R rows of anything   I inside   O outside   D width   F expert width   E experts
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moestro.nn.kernels.gpu import BLOCK_FP8 as BLOCK
from moestro.nn.kernels.gpu import fp8, interpreted
from moestro.nn.kernels.gpu.launch import has_copy_engine
from moestro.nn.kernels.gpu.tiles import Tiles

GROUP = 8


@dataclass(frozen=True, slots=True)
class Scaled:
    """Numbers in 8 bits and the scale of each block of them."""

    value: Tensor
    """float8_e4m3fn: [R, I], or weights [E, O, I]."""
    scale: Tensor
    """float32: [R, I / 128], or [E, O / 128, I / 128]."""


def quantise_rows(x_RI: Tensor) -> Scaled:
    """A scale for every 128 columns of a row."""
    rows, width = x_RI.shape
    found = Scaled(
        torch.empty_like(x_RI, dtype=torch.float8_e4m3fn), x_RI.new_empty(rows, width // BLOCK, dtype=torch.float32)
    )
    if rows:
        fp8.quantise_rows[(triton.cdiv(rows, 32), width // BLOCK)](
            x_RI, found.value, found.scale, rows, WIDTH=width, ROWS=32, BLOCK=BLOCK
        )
    return found


def quantise_weight(weight_EIO: Tensor, turn: bool) -> Scaled:
    """A scale for 128 by 128; [E, O, I] from [E, I, O] where `turn`, else as it lies."""
    experts, inside, outside = weight_EIO.shape
    shape = (experts, outside, inside) if turn else (experts, inside, outside)
    value = torch.empty(shape, dtype=torch.float8_e4m3fn, device=weight_EIO.device)
    blocks = [shape[0], shape[1] // BLOCK, shape[2] // BLOCK]
    scale = torch.empty(blocks, dtype=torch.float32, device=weight_EIO.device)
    fp8.quantise_weight[(experts, inside // BLOCK, outside // BLOCK)](
        weight_EIO, value, scale, INSIDE=inside, OUTSIDE=outside, TURN=turn, BLOCK=BLOCK, num_warps=8
    )
    return Scaled(value, scale)


def _options(x: Tensor) -> dict[str, Any]:
    tma = has_copy_engine(x.device.type, x.device.index or 0)
    return {"BLOCK": BLOCK, "GROUP": GROUP, "TMA": tma, "UPCAST": interpreted(), "num_warps": 8, "num_stages": 4}


def _slices(weight: Scaled, options: dict[str, Any]) -> Any:
    return TensorDescriptor.from_tensor(weight.value, [1, BLOCK, BLOCK]) if options["TMA"] else weight.value


def gate_up_act(
    x: Scaled, share_TK: Tensor, tiles: Tiles, weight: Scaled, dtype: torch.dtype, keep: bool
) -> list[Tensor]:
    """act_AF and gate_up_AF (empty without `keep`), in `dtype`."""
    (_, double, width), places, most = weight.value.shape, tiles.source_A.numel(), tiles.tile_2M.shape[1]
    act_AF = torch.empty(places, double // 2, dtype=dtype, device=share_TK.device)
    gate_up_AF, options = act_AF.new_empty(places if keep else 0, double), _options(share_TK)
    if places:
        fp8.gate_up_act_fp8[(most * (double // 2 // BLOCK),)](
            x.value, x.scale, _slices(weight, options), weight.scale, share_TK, tiles.source_A, tiles.offset_X,
            tiles.tile_2M, gate_up_AF, act_AF, most, tiles.slots, len(weight.value),
            WIDTH=width, HIDDEN=double // 2, ROWS=tiles.rows, KEEP=keep, **options,
        )  # fmt: skip
    return [act_AF, gate_up_AF]


def rows_product(a: Scaled, tiles: Tiles, weight: Scaled, dtype: torch.dtype) -> Tensor:
    """a @ W[e]^T by expert, for W [E, O, I]."""
    (experts, outside, inside), most = weight.value.shape, tiles.tile_2M.shape[1]
    out_AO, options = torch.empty(len(a.value), outside, dtype=dtype, device=a.value.device), _options(a.value)
    if len(a.value):
        fp8.rows_product_fp8[(most * (outside // BLOCK),)](
            a.value, a.scale, _slices(weight, options), weight.scale, tiles.offset_X, tiles.tile_2M, out_AO, most,
            experts, INSIDE=inside, OUTSIDE=outside, ROWS=tiles.rows, **options,
        )  # fmt: skip
    return out_AO


def act_backward(d_y: Scaled, share_TK: Tensor, tiles: Tiles, weight: Scaled, gate_up_AF: Tensor) -> list[Tensor]:
    """As launch.act_backward, for W2 [E, F, D]."""
    (experts, hidden, width), options = weight.value.shape, _options(share_TK)
    places, most = tiles.source_A.numel(), tiles.tile_2M.shape[1]
    d_gate_up_AF, act_AF = torch.empty_like(gate_up_AF), gate_up_AF.new_empty(places, hidden)
    part_XA = torch.empty(hidden // BLOCK, places, dtype=torch.float32, device=share_TK.device)
    if places:
        tma = options["TMA"]
        kept = TensorDescriptor.from_tensor(gate_up_AF, [tiles.rows, BLOCK // 2]) if tma else gate_up_AF
        fp8.act_backward_fp8[(most * (hidden // BLOCK),)](
            d_y.value, d_y.scale, _slices(weight, options), weight.scale, share_TK, tiles.source_A, tiles.offset_X,
            tiles.tile_2M, kept, d_gate_up_AF, act_AF, part_XA, most, tiles.slots, places, experts,
            WIDTH=width, HIDDEN=hidden, ROWS=tiles.rows, **options,
        )  # fmt: skip
    return [d_gate_up_AF, act_AF, part_XA]
