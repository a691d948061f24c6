"""Counting sort of assignments by expert, and the list of row tiles that products work through.

    expert_TK -> counts per chunk -> running sums -> offsets, tiles -> places   (see tiles.py)

Four launches, stable, no host synchronisation, no atomics. Rows of one expert are contiguous and nothing is padded: a
tile is up to `rows` neighbouring rows of one expert, so its last rows may be another expert's and are masked. Unused
slots come after all used ones.

Dimension key:  T tokens   K slots   A = T*K places   C places of a chunk   E experts   X = E + 2   M most tiles
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128
"""Places ranked by one program; all pairs of them are compared."""


@triton.jit(do_not_specialize=["places", "num_experts"])
def count_chunks(expert_ptr, count_ptr, places, num_experts, CHUNK: tl.constexpr, BINS: tl.constexpr):
    chunk = tl.program_id(0)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(expert_ptr + place, mask=place < places, other=BINS - 1).to(tl.int32)
    count = tl.histogram(expert, BINS)  # places beyond the end fall into the last bin, which is no expert's
    tl.store(count_ptr + chunk * BINS + tl.arange(0, BINS), count)


@triton.jit(do_not_specialize=["chunks"])
def sum_chunks(count_ptr, total_ptr, chunks, BINS: tl.constexpr, WIDE: tl.constexpr, HIGH: tl.constexpr):
    """Counts become counts of all chunks before; the total goes to total_ptr."""
    bin = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    running = tl.zeros([WIDE], dtype=tl.int32)
    for start in range(0, chunks, HIGH):
        chunk = start + tl.arange(0, HIGH)
        place = count_ptr + chunk[:, None] * BINS + bin[None, :]
        count = tl.load(place, mask=(chunk < chunks)[:, None], other=0)
        before = tl.cumsum(count, axis=0) - count + running[None, :]
        tl.store(place, before, mask=(chunk < chunks)[:, None])
        running += tl.sum(count, axis=0)
    tl.store(total_ptr + bin, running)


@triton.jit(do_not_specialize=["num_experts", "most_tiles"])
def list_tiles(
    total_ptr, offset_ptr, tile_ptr, busiest_ptr, num_experts, most_tiles,
    ROWS: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program per expert: its first row, its place by load, its tiles."""
    expert = tl.program_id(0)
    other = tl.arange(0, BINS)
    total = tl.load(total_ptr + other, mask=other < num_experts, other=0)
    tiles = (total + ROWS - 1) // ROWS
    own = tl.sum(tl.where(other == expert, total, 0), axis=0)
    first_row = tl.sum(tl.where(other < expert, total, 0), axis=0)
    first_tile = tl.sum(tl.where(other < expert, tiles, 0), axis=0)
    busier = (total > own) | ((total == own) & (other < expert))
    rank = tl.sum(tl.where(busier & (other < num_experts), 1, 0), axis=0)
    tl.store(offset_ptr + expert, first_row)
    tl.store(busiest_ptr + rank, expert)
    own_tiles = (own + ROWS - 1) // ROWS
    if expert == num_experts - 1:
        tl.store(offset_ptr + num_experts, first_row + own)
        tl.store(offset_ptr + num_experts + 1, first_tile + own_tiles)
    for start in range(0, own_tiles, STEP):
        tile = start + tl.arange(0, STEP)
        target = tile_ptr + first_tile + tile
        tl.store(target, tl.zeros([STEP], dtype=tl.int32) + expert, mask=tile < own_tiles)
        tl.store(target + most_tiles, first_row + tile * ROWS, mask=tile < own_tiles)


@triton.jit(do_not_specialize=["places", "num_experts"])
def place_rows(
    expert_ptr, count_ptr, offset_ptr, source_ptr, row_ptr, places, num_experts,
    CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """The row of a place: its expert's first, plus those of earlier chunks, plus those before it in its chunk."""
    chunk = tl.program_id(0)
    inside = tl.arange(0, CHUNK)
    place = chunk * CHUNK + inside
    live = place < places
    expert = tl.load(expert_ptr + place, mask=live, other=BINS - 1).to(tl.int32)
    earlier = inside[None, :] < inside[:, None]
    before = tl.sum(((expert[:, None] == expert[None, :]) & earlier).to(tl.int32), axis=1)
    row = before + tl.load(count_ptr + chunk * BINS + expert, mask=live, other=0)
    row += tl.load(offset_ptr + expert, mask=live, other=0)
    tl.store(source_ptr + row, place, mask=live)
    tl.store(row_ptr + place, tl.where(expert < num_experts, row, -1), mask=live)


def sort_places(expert_TK: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `Tiles`, in its order; num_experts marks an unused slot."""
    places, device = expert_TK.numel(), expert_TK.device
    bins, chunks = triton.next_power_of_2(max(num_experts + 2, 16)), triton.cdiv(places, CHUNK)
    most_tiles = places // rows + num_experts

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    count_XX, total_X = integers(max(chunks, 1), bins), integers(bins)
    source_A, row_A, offset_X, busiest_E = (integers(n) for n in (places, places, num_experts + 2, num_experts))
    tile_2M = integers(2, most_tiles)
    expert_TK = expert_TK.contiguous()
    if places:
        count_chunks[(chunks,)](expert_TK, count_XX, places, num_experts, CHUNK=CHUNK, BINS=bins)
    sum_chunks[(bins // 16,)](count_XX, total_X, chunks, BINS=bins, WIDE=16, HIGH=128)
    list_tiles[(num_experts,)](
        total_X, offset_X, tile_2M, busiest_E, num_experts, most_tiles, ROWS=rows, BINS=bins, STEP=128
    )
    if places:
        place_rows[(chunks,)](
            expert_TK, count_XX, offset_X, source_A, row_A, places, num_experts, CHUNK=CHUNK, BINS=bins
        )
    return source_A, row_A, offset_X, tile_2M, busiest_E
