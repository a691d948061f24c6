"""Gradients of the experts' weights: for every expert, a product over its rows.

    d_W[e] = left_e^T right_e      one of the two is gathered by token as it is loaded

A program makes one tile of one expert's gradient and runs through all of that expert's rows, in order: the sum is the
same from run to run. Experts with most rows start first, so that an uneven load ends together. An expert without rows
gets zeros.

Dimension key:  A rows   I rows of the weight   O its columns   E experts
"""

import triton
import triton.language as tl

from moestro.nn.kernels.gpu.products import dot


@triton.jit
def load_rows(ptr, row, live, column, COLUMNS: tl.constexpr, WIDE: tl.constexpr, FULL: tl.constexpr):
    place = ptr + row[:, None].to(tl.int64) * COLUMNS + column[None, :]
    if FULL and COLUMNS % WIDE == 0:
        return tl.load(place)
    else:
        return tl.load(place, mask=live[:, None] & (column < COLUMNS)[None, :], other=0.0)


@triton.jit(do_not_specialize=["slots"])
def weight_gradient(
    left_ptr, right_ptr, source_ptr, offset_ptr, busiest_ptr, out_ptr, slots,
    INSIDE: tl.constexpr, OUTSIDE: tl.constexpr, GATHER_LEFT: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One HIGH by WIDE tile of d_W[e], ROWS rows at a time."""
    up: tl.constexpr = (INSIDE + HIGH - 1) // HIGH
    across: tl.constexpr = (OUTSIDE + WIDE - 1) // WIDE
    inside = tl.program_id(0) % (up * across)
    expert = tl.load(busiest_ptr + tl.program_id(0) // (up * across))
    high = tl.minimum(up - inside // (GROUP * across) * GROUP, GROUP)
    first = (inside // (GROUP * across) * GROUP + inside % (GROUP * across) % high) * HIGH
    second = inside % (GROUP * across) // high * WIDE
    left_column = first + tl.arange(0, HIGH)
    right_column = second + tl.arange(0, WIDE)
    begin = tl.load(offset_ptr + expert)
    end = tl.load(offset_ptr + expert + 1)
    whole = (end - begin) // ROWS * ROWS
    total = tl.zeros([HIGH, WIDE], dtype=tl.float32)
    live = tl.full([ROWS], True, dtype=tl.int1)
    for start in range(begin, begin + whole, ROWS):
        row = start + tl.arange(0, ROWS)
        token = tl.load(source_ptr + row) // slots
        left = load_rows(left_ptr, token if GATHER_LEFT else row, live, left_column, INSIDE, HIGH, True)
        right = load_rows(right_ptr, row if GATHER_LEFT else token, live, right_column, OUTSIDE, WIDE, True)
        total = dot(left.T, right, total, UPCAST)
    if begin + whole < end:
        row = begin + whole + tl.arange(0, ROWS)
        live = row < end
        token = tl.load(source_ptr + row, mask=live, other=0) // slots
        left = load_rows(left_ptr, token if GATHER_LEFT else row, live, left_column, INSIDE, HIGH, False)
        right = load_rows(right_ptr, row if GATHER_LEFT else token, live, right_column, OUTSIDE, WIDE, False)
        total = dot(left.T, right, total, UPCAST)
    target = out_ptr + expert.to(tl.int64) * INSIDE * OUTSIDE
    target += left_column[:, None].to(tl.int64) * OUTSIDE + right_column[None, :]
    mask = (left_column < INSIDE)[:, None] & (right_column < OUTSIDE)[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)
