"""Grouped products over rows sorted by expert, with what lies between them done while the tile is in registers.

    gate_up_act     act = silu(x W1g) * (x W1u) * weight    x gathered by token as it is loaded; one pass over x
    rows_product    out = a W, or a W^T                     the down product, and the gradient of the input
    act_backward    d_gate_up, act, d_weight                from d_y gathered by token and W2^T

A program makes one tile of the output: rows of one expert times some columns. Tiles of neighbouring rows come one after
another in groups, column by column, so that what runs at a time shares weights and rows in the L2 cache. Weights arrive
by the copy engine (a tensor descriptor) where the GPU has one, gathered rows by asynchronous copies.

Sums are float32; nothing is written past an expert's rows. Rows of a tile that are another expert's are computed and
dropped: a row of a product depends on no other row.

Dimension key:  A rows   D width   F expert width   E experts
"""

import triton
import triton.language as tl

HALVED = tl.constexpr(64)
"""Columns from which `act_gradients` takes a tile in two halves."""


@triton.jit
def tile_of(program, num_tiles, num_columns, GROUP: tl.constexpr):
    """Which row tile and which columns a program makes."""
    wide = GROUP * num_columns
    first = program // wide * GROUP
    high = tl.minimum(num_tiles - first, GROUP)
    inside = program % wide
    return first + inside % high, inside // high


@triton.jit
def rows_of(tile, offset_ptr, tile_ptr, most_tiles, ROWS: tl.constexpr):
    """A tile's expert, its first row, its rows, and which of them are the expert's."""
    expert = tl.load(tile_ptr + tile)
    first_row = tl.load(tile_ptr + most_tiles + tile)
    row = first_row + tl.arange(0, ROWS)
    return expert, first_row, row, row < tl.load(offset_ptr + expert + 1)


@triton.jit
def dot(left, right, total, UPCAST: tl.constexpr):
    """total + left @ right; the interpreter's bfloat16 is wrong, so there both are made float32."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def load_slice(
    weight, expert, first, second,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """weight[expert, first:, second:], HIGH by WIDE, zeros beyond its ROWS and COLUMNS."""
    if TMA:
        return weight.load([expert, first, second]).reshape(HIGH, WIDE)
    else:
        row = first + tl.arange(0, HIGH)
        column = second + tl.arange(0, WIDE)
        place = weight + expert.to(tl.int64) * ROWS * COLUMNS + row[:, None].to(tl.int64) * COLUMNS + column[None, :]
        if (ROWS % HIGH == 0) and (COLUMNS % WIDE == 0):
            return tl.load(place)
        else:
            return tl.load(place, mask=(row < ROWS)[:, None] & (column < COLUMNS)[None, :], other=0.0)


@triton.jit
def load_columns(place, start, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Columns start.. of the rows that `place` points at, zeros beyond COLUMNS."""
    column = start + tl.arange(0, WIDE)
    if COLUMNS % WIDE == 0:
        return tl.load(place + column[None, :])
    else:
        return tl.load(place + column[None, :], mask=(column < COLUMNS)[None, :], other=0.0)


@triton.jit
def place_of(ptr, first_row, first_column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a tile lies: one 64-bit start and 32-bit distances from it, which take half the registers."""
    start = ptr + first_row.to(tl.int64) * WIDTH + first_column
    return start + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def store_act(
    gate, up, share_ptr, source, live, gate_up_ptr, act_ptr, first_row, part,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """SwiGLU times the routing weight; also both halves as they are where KEEP."""
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    mask = live[:, None] & (column < HIDDEN)[None, :]
    if KEEP:
        kept = place_of(gate_up_ptr, first_row, part * COLUMNS, 2 * HIDDEN, ROWS, COLUMNS)
        tl.store(kept, gate.to(gate_up_ptr.dtype.element_ty), mask=mask)
        tl.store(kept + HIDDEN, up.to(gate_up_ptr.dtype.element_ty), mask=mask)
    share = tl.load(share_ptr + source, mask=live, other=0.0)
    act = gate * tl.sigmoid(gate) * up * share[:, None]
    target = place_of(act_ptr, first_row, part * COLUMNS, HIDDEN, ROWS, COLUMNS)
    tl.store(target, act.to(act_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["most_tiles", "slots", "experts"])
def gate_up_act(
    x_ptr, weight, share_ptr, source_ptr, offset_ptr, tile_ptr, gate_up_ptr, act_ptr, most_tiles, slots, experts,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, KEEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Both halves of the first product for the same rows and columns, then SwiGLU times the routing weight."""
    num_tiles = tl.load(offset_ptr + experts + 1)
    num_columns: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    if tl.program_id(0) >= num_tiles * num_columns:
        return
    tile, part = tile_of(tl.program_id(0), num_tiles, num_columns, GROUP)
    expert, first_row, row, live = rows_of(tile, offset_ptr, tile_ptr, most_tiles, ROWS)
    source = tl.load(source_ptr + row, mask=live, other=0)
    place = x_ptr + (source // slots)[:, None].to(tl.int64) * WIDTH
    gate = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    up = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for inner in range(0, WIDTH, INNER):
        x = load_columns(place, inner, WIDTH, INNER)
        first = part * COLUMNS
        w_gate = load_slice(weight, expert, inner, first, WIDTH, 2 * HIDDEN, INNER, COLUMNS, TMA)
        w_up = load_slice(weight, expert, inner, HIDDEN + first, WIDTH, 2 * HIDDEN, INNER, COLUMNS, TMA)
        gate = dot(x, w_gate, gate, UPCAST)
        up = dot(x, w_up, up, UPCAST)
    store_act(gate, up, share_ptr, source, live, gate_up_ptr, act_ptr, first_row, part, HIDDEN, ROWS, COLUMNS, KEEP)


@triton.jit(do_not_specialize=["most_tiles", "experts"])
def rows_product(
    a, weight, offset_ptr, tile_ptr, out_ptr, most_tiles, experts,
    INSIDE: tl.constexpr, OUTSIDE: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[row] = a[row] @ W[e], or @ W[e]^T where TRANSPOSED."""
    num_tiles = tl.load(offset_ptr + experts + 1)
    num_columns: tl.constexpr = (OUTSIDE + COLUMNS - 1) // COLUMNS
    if tl.program_id(0) >= num_tiles * num_columns:
        return
    tile, part = tile_of(tl.program_id(0), num_tiles, num_columns, GROUP)
    expert, first_row, row, live = rows_of(tile, offset_ptr, tile_ptr, most_tiles, ROWS)
    first = part * COLUMNS
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for inner in range(0, INSIDE, INNER):
        if TMA:
            left = a.load([first_row, inner])
        else:
            left = load_columns(a + tl.where(live, row, first_row)[:, None].to(tl.int64) * INSIDE, inner, INSIDE, INNER)
        if TRANSPOSED:
            right = load_slice(weight, expert, first, inner, OUTSIDE, INSIDE, COLUMNS, INNER, TMA).T
        else:
            right = load_slice(weight, expert, inner, first, INSIDE, OUTSIDE, INNER, COLUMNS, TMA)
        total = dot(left, right, total, UPCAST)
    column = first + tl.arange(0, COLUMNS)
    target = place_of(out_ptr, first_row, first, OUTSIDE, ROWS, COLUMNS)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=live[:, None] & (column < OUTSIDE)[None, :])


@triton.jit
def swiglu_backward(
    d_act, gate_up, d_gate_up_ptr, act_ptr, share, live, first_row, first,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """From d_act of some columns: d_gate_up and act are written, the columns' part of d_share is returned."""
    column = first + tl.arange(0, COLUMNS)
    mask = live[:, None] & (column < HIDDEN)[None, :]
    if TMA:
        gate = gate_up.load([first_row, first]).to(tl.float32)
        up = gate_up.load([first_row, HIDDEN + first]).to(tl.float32)
    else:
        kept = place_of(gate_up, first_row, first, 2 * HIDDEN, ROWS, COLUMNS)
        gate = tl.load(kept, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(kept + HIDDEN, mask=mask, other=0.0).to(tl.float32)
    open = tl.sigmoid(gate)
    silu = gate * open
    plain = silu * up
    d_share = tl.sum(tl.where(mask, d_act * plain, 0.0), axis=1)
    target = place_of(act_ptr, first_row, first, HIDDEN, ROWS, COLUMNS)
    tl.store(target, (plain * share).to(act_ptr.dtype.element_ty), mask=mask)
    d_act *= share
    target = place_of(d_gate_up_ptr, first_row, first, 2 * HIDDEN, ROWS, COLUMNS)
    d_gate = d_act * up * (open + silu * (1.0 - open))
    tl.store(target, d_gate.to(d_gate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(target + HIDDEN, (d_act * silu).to(d_gate_up_ptr.dtype.element_ty), mask=mask)
    return d_share


@triton.jit
def act_gradients(
    d_act, share_ptr, source, live, gate_up, d_gate_up_ptr, act_ptr, first_row, part,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`swiglu_backward` of a tile, in pieces that fit into registers; d_share of its rows."""
    share = tl.load(share_ptr + source, mask=live, other=0.0)[:, None]
    first = part * COLUMNS
    if COLUMNS >= HALVED:  # half at a time: the whole in float32 three times over does not fit into registers
        left, right = d_act.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        sum_left = swiglu_backward(
            left, gate_up, d_gate_up_ptr, act_ptr, share, live, first_row, first, HIDDEN, ROWS, COLUMNS // 2, TMA
        )
        d_share = sum_left + swiglu_backward(
            right, gate_up, d_gate_up_ptr, act_ptr, share, live, first_row, first + COLUMNS // 2, HIDDEN, ROWS,
            COLUMNS // 2, TMA,
        )  # fmt: skip
    else:
        d_share = swiglu_backward(
            d_act, gate_up, d_gate_up_ptr, act_ptr, share, live, first_row, first, HIDDEN, ROWS, COLUMNS, TMA
        )
    return d_share


@triton.jit(do_not_specialize=["most_tiles", "slots", "places", "experts"])
def act_backward(
    d_y_ptr, weight, share_ptr, source_ptr, offset_ptr, tile_ptr, gate_up, d_gate_up_ptr, act_ptr, part_ptr,
    most_tiles, slots, places, experts,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_act = d_y W2^T, then back through SwiGLU; act is made again for the gradient of W2.

    part_ptr   [column tiles, A]: this tile's part of d_weight of each row, float32
    """
    num_tiles = tl.load(offset_ptr + experts + 1)
    num_columns: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    if tl.program_id(0) >= num_tiles * num_columns:
        return
    tile, part = tile_of(tl.program_id(0), num_tiles, num_columns, GROUP)
    expert, first_row, row, live = rows_of(tile, offset_ptr, tile_ptr, most_tiles, ROWS)
    source = tl.load(source_ptr + row, mask=live, other=0)
    place = d_y_ptr + (source // slots)[:, None].to(tl.int64) * WIDTH
    d_act = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for inner in range(0, WIDTH, INNER):
        d_y = load_columns(place, inner, WIDTH, INNER)
        down = load_slice(weight, expert, part * COLUMNS, inner, HIDDEN, WIDTH, COLUMNS, INNER, TMA).T
        d_act = dot(d_y, down, d_act, UPCAST)
    d_share = act_gradients(
        d_act, share_ptr, source, live, gate_up, d_gate_up_ptr, act_ptr, first_row, part, HIDDEN, ROWS, COLUMNS, TMA
    )
    tl.store(part_ptr + part.to(tl.int64) * places + row, d_share, mask=live)
