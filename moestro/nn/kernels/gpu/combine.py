"""Rows back to tokens: every token gathers its rows and adds them in slot order, in float32, without atomics.

Dimension key:  T tokens   K slots   A = T*K places   D width
"""

import triton
import triton.language as tl


@triton.jit
def combine_slots(
    rows_ptr, row_ptr, y_ptr,
    WIDTH: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[t] = sum over k of rows[row[t, k]]; row -1 adds nothing."""
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for slot in tl.range(0, SLOTS, loop_unroll_factor=min(SLOTS, 8)):
        row = tl.load(row_ptr + token.to(tl.int64) * SLOTS + slot)
        place = rows_ptr + row.to(tl.int64) * WIDTH + column
        total += tl.load(place, mask=(column < WIDTH) & (row >= 0), other=0.0).to(tl.float32)
    place = y_ptr + token.to(tl.int64) * WIDTH + column
    tl.store(place, total.to(y_ptr.dtype.element_ty), mask=column < WIDTH)


@triton.jit(do_not_specialize=["places", "parts"])
def sum_parts(part_ptr, row_ptr, out_ptr, places, parts, BLOCK: tl.constexpr):
    """out[a] = sum over parts of part[p, row[a]]; 0 where the place is unused."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + place, mask=place < places, other=-1)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(0, parts):
        total += tl.load(part_ptr + row, mask=row >= 0, other=0.0)
        part_ptr += places
    tl.store(out_ptr + place, total, mask=place < places)
