"""The products of products.py on 8-bit floats with a scale per block: forward, and the input's gradient.

    rows     e4m3, one scale for 128 columns of a row           quantise_rows
    weights  e4m3, one scale for 128 by 128                     quantise_weight

Products of 8-bit floats want both sides contiguous along the sum, so a weight is quantised turned for the forward pass
and as it is for the gradient; both come out as [experts, outside, inside]. Every 128 of the sum are added up by the
tensor cores, scaled, and added in float32. Gradients of weights stay in 16 bits. Widths are multiples of 128.

Dimension key:  A rows   D width   F expert width   E experts
"""

import triton
import triton.language as tl

from moestro.nn.kernels.gpu.products import (
    act_gradients,
    load_columns,
    load_slice,
    place_of,
    rows_of,
    store_act,
    tile_of,
)

LARGEST = tl.constexpr(448.0)
"""Of e4m3."""


@triton.jit(do_not_specialize=["rows"])
def quantise_rows(x_ptr, out_ptr, scale_ptr, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = row[:, None].to(tl.int64) * WIDTH + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + place, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-12) / LARGEST
    small = tl.clamp(x / scale[:, None], -LARGEST, LARGEST, tl.PropagateNan.ALL)  # a quotient may round to just above
    tl.store(out_ptr + place, small.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])
    tl.store(scale_ptr + row.to(tl.int64) * (WIDTH // BLOCK) + tl.program_id(1), scale, mask=row < rows)


@triton.jit
def quantise_weight(
    w_ptr, out_ptr, scale_ptr,
    INSIDE: tl.constexpr, OUTSIDE: tl.constexpr, TURN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of W[e]; written at the turned place where TURN."""
    expert = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + expert * INSIDE * OUTSIDE + row[:, None] * OUTSIDE + column[None, :]).to(tl.float32)
    scale = tl.maximum(tl.max(tl.max(tl.abs(w), axis=1), axis=0), 1e-12) / LARGEST
    small = tl.clamp(w / scale, -LARGEST, LARGEST, tl.PropagateNan.ALL).to(out_ptr.dtype.element_ty)
    high: tl.constexpr = INSIDE // BLOCK
    wide: tl.constexpr = OUTSIDE // BLOCK
    out_ptr += expert * INSIDE * OUTSIDE
    if TURN:
        tl.store(out_ptr + column[:, None] * INSIDE + row[None, :], small.T)
        tl.store(scale_ptr + (expert * wide + tl.program_id(2)) * high + tl.program_id(1), scale)
    else:
        tl.store(out_ptr + row[:, None] * OUTSIDE + column[None, :], small)
        tl.store(scale_ptr + (expert * high + tl.program_id(1)) * wide + tl.program_id(2), scale)


@triton.jit
def add_scaled(left, right, total, row_scale, weight_scale, UPCAST: tl.constexpr):
    """total + (left @ right) times both scales."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return total + tl.dot(left, right) * (row_scale * weight_scale)[:, None]


@triton.jit(do_not_specialize=["most_tiles", "slots", "experts"])
def gate_up_act_fp8(
    x_ptr, x_scale_ptr, weight, w_scale_ptr, share_ptr, source_ptr, offset_ptr, tile_ptr, gate_up_ptr, act_ptr,
    most_tiles, slots, experts,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    KEEP: tl.constexpr, UPCAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """products.gate_up_act on x [T, D] and W1 [E, 2F, D] in 8 bits."""
    num_tiles = tl.load(offset_ptr + experts + 1)
    if tl.program_id(0) >= num_tiles * (HIDDEN // BLOCK):
        return
    tile, part = tile_of(tl.program_id(0), num_tiles, HIDDEN // BLOCK, GROUP)
    expert, first_row, row, live = rows_of(tile, offset_ptr, tile_ptr, most_tiles, ROWS)
    source = tl.load(source_ptr + row, mask=live, other=0)
    token = (source // slots).to(tl.int64)
    gate = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    up = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    scales = w_scale_ptr + expert.to(tl.int64) * (2 * HIDDEN // BLOCK) * (WIDTH // BLOCK)
    for step in range(0, WIDTH // BLOCK):
        x = load_columns(x_ptr + token[:, None] * WIDTH, step * BLOCK, WIDTH, BLOCK)
        x_scale = tl.load(x_scale_ptr + token * (WIDTH // BLOCK) + step)
        first = part * BLOCK
        w_gate = load_slice(weight, expert, first, step * BLOCK, 2 * HIDDEN, WIDTH, BLOCK, BLOCK, TMA).T
        w_up = load_slice(weight, expert, HIDDEN + first, step * BLOCK, 2 * HIDDEN, WIDTH, BLOCK, BLOCK, TMA).T
        gate = add_scaled(x, w_gate, gate, x_scale, tl.load(scales + part * (WIDTH // BLOCK) + step), UPCAST)
        up_scale = tl.load(scales + (HIDDEN + first) // BLOCK * (WIDTH // BLOCK) + step)
        up = add_scaled(x, w_up, up, x_scale, up_scale, UPCAST)
    store_act(gate, up, share_ptr, source, live, gate_up_ptr, act_ptr, first_row, part, HIDDEN, ROWS, BLOCK, KEEP)


@triton.jit(do_not_specialize=["most_tiles", "experts"])
def rows_product_fp8(
    a_ptr, a_scale_ptr, weight, w_scale_ptr, offset_ptr, tile_ptr, out_ptr, most_tiles, experts,
    INSIDE: tl.constexpr, OUTSIDE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = a[row] @ W[e]^T for W [E, outside, inside]."""
    num_tiles = tl.load(offset_ptr + experts + 1)
    if tl.program_id(0) >= num_tiles * (OUTSIDE // BLOCK):
        return
    tile, part = tile_of(tl.program_id(0), num_tiles, OUTSIDE // BLOCK, GROUP)
    expert, first_row, row, live = rows_of(tile, offset_ptr, tile_ptr, most_tiles, ROWS)
    safe = tl.where(live, row, first_row).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    scales = w_scale_ptr + (expert.to(tl.int64) * (OUTSIDE // BLOCK) + part) * (INSIDE // BLOCK)
    for step in range(0, INSIDE // BLOCK):
        a = load_columns(a_ptr + safe[:, None] * INSIDE, step * BLOCK, INSIDE, BLOCK)
        a_scale = tl.load(a_scale_ptr + safe * (INSIDE // BLOCK) + step)
        right = load_slice(weight, expert, part * BLOCK, step * BLOCK, OUTSIDE, INSIDE, BLOCK, BLOCK, TMA).T
        total = add_scaled(a, right, total, a_scale, tl.load(scales + step), UPCAST)
    target = place_of(out_ptr, first_row, part * BLOCK, OUTSIDE, ROWS, BLOCK)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["most_tiles", "slots", "places", "experts"])
def act_backward_fp8(
    d_y_ptr, d_y_scale_ptr, weight, w_scale_ptr, share_ptr, source_ptr, offset_ptr, tile_ptr, gate_up, d_gate_up_ptr,
    act_ptr, part_ptr, most_tiles, slots, places, experts,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """products.act_backward on d_y [T, D] and W2 [E, F, D] in 8 bits."""
    num_tiles = tl.load(offset_ptr + experts + 1)
    if tl.program_id(0) >= num_tiles * (HIDDEN // BLOCK):
        return
    tile, part = tile_of(tl.program_id(0), num_tiles, HIDDEN // BLOCK, GROUP)
    expert, first_row, row, live = rows_of(tile, offset_ptr, tile_ptr, most_tiles, ROWS)
    source = tl.load(source_ptr + row, mask=live, other=0)
    token = (source // slots).to(tl.int64)
    d_act = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    scales = w_scale_ptr + (expert.to(tl.int64) * (HIDDEN // BLOCK) + part) * (WIDTH // BLOCK)
    for step in range(0, WIDTH // BLOCK):
        d_y = load_columns(d_y_ptr + token[:, None] * WIDTH, step * BLOCK, WIDTH, BLOCK)
        d_y_scale = tl.load(d_y_scale_ptr + token * (WIDTH // BLOCK) + step)
        down = load_slice(weight, expert, part * BLOCK, step * BLOCK, HIDDEN, WIDTH, BLOCK, BLOCK, TMA).T
        d_act = add_scaled(d_y, down, d_act, d_y_scale, tl.load(scales + step), UPCAST)
    d_share = act_gradients(
        d_act, share_ptr, source, live, gate_up, d_gate_up_ptr, act_ptr, first_row, part, HIDDEN, ROWS, BLOCK, TMA
    )
    tl.store(part_ptr + part.to(tl.int64) * places + row, d_share, mask=live)
