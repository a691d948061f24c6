"""The expert layer as torch operators: what autograd, torch.compile and CUDA graphs see of the kernels.

    x_TD, share_TK, Tiles -> gate_up_act -> rows_product (down) -> combine_slots -> y_TD
    d_y_TD -> act_backward -> rows_product -> combine_slots -> d_x_TD
              both weight_gradients, sum_parts -> d_share_TK

Kept for the way back: x and the gate-up product, D + 2 K F numbers a token. Activations are made again from it,
gathered rows are never stored, and combined rows are dropped. With `keep="input"` only x is kept and the first product
is done again. Gradients come out in the type of `masters`: float32 sums without a detour over bfloat16.

Dimension key:  T tokens   K slots   A = T*K places   D width   F expert width (2F columns in gate_up)   E experts
"""

from typing import Any

import torch
from torch import Tensor

from moestro.nn.kernels.gpu import interpreted, launch, launch_fp8, on_its_device
from moestro.nn.kernels.gpu.blocks import tile_rows
from moestro.nn.kernels.gpu.interpreter import repair
from moestro.nn.kernels.gpu.sort import sort_places
from moestro.nn.kernels.gpu.tiles import Tiles

torch.library.define("moestro::sort_places", "(Tensor expert, int num_experts, int rows) -> Tensor[]")
torch.library.define(
    "moestro::experts",
    "(Tensor x, Tensor share, Tensor[] tables, int rows, Tensor gate_up, Tensor down, Tensor[] masters, bool keep, "
    "bool eight) "
    "-> (Tensor, Tensor)",
)
torch.library.define(
    "moestro::experts_backward",
    "(Tensor d_y, Tensor x, Tensor share, Tensor[] tables, int rows, Tensor gate_up, Tensor down, Tensor kept, "
    "ScalarType dtype, bool weights_too, bool eight) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("moestro::sort_places", "default")
@on_its_device
def _sort(expert_TK: Tensor, num_experts: int, rows: int) -> list[Tensor]:
    return list(sort_places(expert_TK, num_experts, rows))


@torch.library.register_fake("moestro::sort_places")
def _(expert_TK: Tensor, num_experts: int, rows: int) -> list[Tensor]:
    places = expert_TK.numel()
    shapes = [(places,), (places,), (num_experts + 2,), (2, places // rows + num_experts), (num_experts,)]
    return [expert_TK.new_empty(shape, dtype=torch.int32) for shape in shapes]


def tiles_of(tables: list[Tensor], rows: int, slots: int) -> Tiles:
    """Tiles from what `sort_places` gives."""
    source_A, row_A, offset_X, tile_2M, busiest_E = tables
    return Tiles(source_A, row_A, offset_X, tile_2M, busiest_E, rows, slots)


def sort_tiles(expert_TK: Tensor, num_experts: int, rows: int = 0) -> Tiles:
    """Group slots by expert, stable; num_experts marks an unused slot. `rows` of a tile: 0 picks."""
    if interpreted():
        repair()
    rows = rows or tile_rows(expert_TK.numel(), num_experts, interpreted())
    return tiles_of(torch.ops.moestro.sort_places(expert_TK, num_experts, rows), rows, expert_TK.shape[1])


def first_product_fp8(x_TD: Tensor, share_TK: Tensor, tiles: Tiles, gate_up_EDF: Tensor, keep: bool) -> list[Tensor]:
    """launch.gate_up_act in 8 bits."""
    x, weight = launch_fp8.quantise_rows(x_TD), launch_fp8.quantise_weight(gate_up_EDF, turn=True)
    return launch_fp8.gate_up_act(x, share_TK, tiles, weight, x_TD.dtype, keep)


@torch.library.impl("moestro::experts", "default")
@on_its_device
def _experts(
    x_TD: Tensor, share_TK: Tensor, tables: list[Tensor], rows: int, gate_up_EDF: Tensor, down_EFD: Tensor,
    masters: list[Tensor], keep: bool, eight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tiles = tiles_of(tables, rows, share_TK.shape[1])
    if eight:
        act_AF, gate_up_AF = first_product_fp8(x_TD, share_TK, tiles, gate_up_EDF, keep)
        down = launch_fp8.quantise_weight(down_EFD, turn=True)
        rows_AD = launch_fp8.rows_product(launch_fp8.quantise_rows(act_AF), tiles, down, x_TD.dtype)
        return launch.combine_slots(rows_AD, tiles.row_A, len(x_TD), tiles.slots), gate_up_AF
    act_AF, gate_up_AF = launch.gate_up_act(
        x_TD, share_TK, tiles, gate_up_EDF, keep, launch.pick("gate_up", x_TD, down_EFD)
    )
    rows_AD = launch.rows_product(act_AF, tiles, down_EFD, False, launch.pick("down", x_TD, down_EFD))
    return launch.combine_slots(rows_AD, tiles.row_A, len(x_TD), tiles.slots), gate_up_AF


@torch.library.register_fake("moestro::experts")
def _(
    x_TD: Tensor, share_TK: Tensor, tables: list[Tensor], rows: int, gate_up_EDF: Tensor, down_EFD: Tensor,
    masters: list[Tensor], keep: bool, eight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x_TD), x_TD.new_empty(share_TK.numel() if keep else 0, gate_up_EDF.shape[2])


@torch.library.impl("moestro::experts_backward", "default")
@on_its_device
def _backward(
    d_y_TD: Tensor, x_TD: Tensor, share_TK: Tensor, tables: list[Tensor], rows: int, gate_up_EDF: Tensor,
    down_EFD: Tensor, gate_up_AF: Tensor, dtype: torch.dtype, weights_too: bool,
    eight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tiles = tiles_of(tables, rows, share_TK.shape[1])

    def pick(kernel: Any) -> Any:
        return launch.pick(kernel, x_TD, down_EFD)

    if not gate_up_AF.numel() and eight:
        _, gate_up_AF = first_product_fp8(x_TD, share_TK, tiles, gate_up_EDF, True)
    elif not gate_up_AF.numel():
        _, gate_up_AF = launch.gate_up_act(x_TD, share_TK, tiles, gate_up_EDF, True, pick("gate_up"))
    if eight:
        down = launch_fp8.quantise_weight(down_EFD, turn=False)
        d_y = launch_fp8.quantise_rows(d_y_TD)
        d_gate_up_AF, act_AF, part_XA = launch_fp8.act_backward(d_y, share_TK, tiles, down, gate_up_AF)
    else:
        d_gate_up_AF, act_AF, part_XA = launch.act_backward(
            d_y_TD, share_TK, tiles, down_EFD, gate_up_AF, pick("act_backward")
        )
    del gate_up_AF
    d_share_TK = launch.sum_parts(part_XA, tiles.row_A, tiles.slots)
    d_down_EFD, d_gate_up_EDF = (d_y_TD.new_empty(0, dtype=dtype) for _ in range(2))
    if weights_too:
        d_down_EFD = launch.weight_gradients(act_AF, d_y_TD, tiles, False, dtype, pick("d_down_weight"))
    del act_AF
    if weights_too:
        d_gate_up_EDF = launch.weight_gradients(x_TD, d_gate_up_AF, tiles, True, dtype, pick("d_gate_up_weight"))
    if eight:
        gate_up = launch_fp8.quantise_weight(gate_up_EDF, turn=False)
        d_rows_AD = launch_fp8.rows_product(launch_fp8.quantise_rows(d_gate_up_AF), tiles, gate_up, x_TD.dtype)
    else:
        d_rows_AD = launch.rows_product(d_gate_up_AF, tiles, gate_up_EDF, True, pick("d_x"))
    return launch.combine_slots(d_rows_AD, tiles.row_A, len(x_TD), tiles.slots), d_share_TK, d_gate_up_EDF, d_down_EFD


@torch.library.register_fake("moestro::experts_backward")
def _(
    d_y_TD: Tensor, x_TD: Tensor, share_TK: Tensor, tables: list[Tensor], rows: int, gate_up_EDF: Tensor,
    down_EFD: Tensor, gate_up_AF: Tensor, dtype: torch.dtype, weights_too: bool,
    eight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = [weight.shape if weights_too else (0,) for weight in (gate_up_EDF, down_EFD)]
    return torch.empty_like(x_TD), torch.empty_like(share_TK), *(x_TD.new_empty(s, dtype=dtype) for s in shapes)  # type: ignore[return-value]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TD, share_TK, tables, rows, gate_up_EDF, down_EFD, masters, _, ctx.eight = inputs
    ctx.save_for_backward(x_TD, share_TK, gate_up_EDF, down_EFD, output[1], *tables)
    ctx.rows, ctx.dtype = rows, masters[0].dtype
    ctx.weights_too = any(master.requires_grad for master in masters)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_y_TD: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x_TD, share_TK, gate_up_EDF, down_EFD, gate_up_AF, *tables = ctx.saved_tensors
    if d_y_TD is None:
        return None, None, [None] * len(tables), None, None, None, [None, None], None, None
    d_x_TD, d_share_TK, *d_weights = torch.ops.moestro.experts_backward(
        d_y_TD.to(x_TD.dtype).contiguous(), x_TD, share_TK, tables, ctx.rows, gate_up_EDF, down_EFD, gate_up_AF,
        ctx.dtype, ctx.weights_too, ctx.eight,
    )  # fmt: skip
    masters = list(d_weights) if ctx.weights_too else [None, None]
    return d_x_TD, d_share_TK, [None] * len(tables), None, None, None, masters, None, None


torch.library.register_autograd("moestro::experts", _gradients, setup_context=_remember)


def triton_experts(
    x_TD: Tensor, share_TK: Tensor, tiles: Tiles, gate_up_EDF: Tensor, down_EFD: Tensor, keep: str = "product",
    eight: bool = False,
) -> Tensor:  # fmt: skip
    """The whole sparse layer after routing.

    x_TD       bfloat16, float16 or float32
    share_TK   routing weights, float32
    keep       product: the gate-up product is kept for the backward pass. input: it is done again
    eight      products of the forward pass and of x's gradient in 8 bits (fp8.py); widths are multiples of 128
    returns    y_TD in x's type; a token without experts gets zeros
    """
    masters = [gate_up_EDF, down_EFD]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, share_TK, *masters))
    casts = [master.detach().to(x_TD.dtype).contiguous() for master in masters]
    tables = [tiles.source_A, tiles.row_A, tiles.offset_X, tiles.tile_2M, tiles.busiest_E]
    y_TD, _ = torch.ops.moestro.experts(
        x_TD.contiguous(), share_TK.float().contiguous(), tables, tiles.rows, *casts, masters,
        learns and keep == "product", eight,
    )  # fmt: skip
    return y_TD
