"""How large a piece each kernel takes at a time: a default per kernel and type, and a few others worth timing.

    blocks_for(kernel, dtype, shape) -> Blocks      the measured winner for this shape, or the default
    CANDIDATES[kernel]                              what `tune.py` times

Widths are multiples of what one warp-group product takes (64 rows, 8 columns, 32 bytes inside), and stages fill the
227 KB of shared memory of a Hopper multiprocessor without passing them.
"""

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["gate_up", "down", "act_backward", "d_x", "d_gate_up_weight", "d_down_weight"]
Shape = tuple[int, int, int]
"""Width, expert width, experts."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """One way to launch a product."""

    columns: int
    """Columns of the output of one program; of each half for gate_up."""
    inner: int
    """Columns (for weight gradients: rows) that one round of products takes."""
    warps: int = 8
    stages: int = 3
    """Rounds in flight."""
    group: int = 8
    """Row tiles that share weights while they are in the L2 cache."""
    high: int = 128
    """Rows of the output of one program; weight gradients only."""


PRODUCT = [Blocks(256, 64), Blocks(256, 64, stages=4), Blocks(128, 64), Blocks(128, 64, warps=4)]
WEIGHT = [Blocks(256, 64, stages=5), Blocks(256, 64, stages=3), Blocks(128, 64, stages=5), Blocks(128, 64, 4, stages=5)]
"""Tokens are looked up before rows are copied, which halves the rounds in flight: 5 stages are 3 buffers."""
CANDIDATES: dict[Kernel, list[Blocks]] = {
    "gate_up": [
        Blocks(128, 64),
        Blocks(128, 64, stages=4),
        Blocks(128, 64, group=16),
        Blocks(64, 64),
        Blocks(64, 64, warps=4),
    ],
    "down": PRODUCT,
    "act_backward": [Blocks(128, 64), Blocks(128, 64, stages=4), Blocks(64, 64), Blocks(64, 64, warps=4)],
    "d_x": PRODUCT,
    "d_gate_up_weight": WEIGHT,
    "d_down_weight": WEIGHT,
}
"""For 16-bit types, the default first. Of two sizes, the larger moves fewer bytes and has a multiprocessor to itself;
the smaller leaves room for a second program, so that one writes its tile while the other multiplies (docs/gpu.md)."""

EXACT = Blocks(64, 32, warps=8, stages=2, high=64)
"""float32: no tensor cores in full precision, and twice the bytes."""

SMALL = Blocks(32, 32, warps=4, stages=2, high=32)
"""For the interpreter, where a program costs milliseconds."""

CHOSEN: dict[tuple[Kernel, torch.dtype, Shape], Blocks] = {}
"""Winners of `tune.py` in this process."""


def blocks_for(kernel: Kernel, dtype: torch.dtype, shape: Shape, interpreted: bool = False) -> Blocks:
    """What to launch a kernel with."""
    if interpreted:
        return SMALL
    if dtype == torch.float32:
        return EXACT
    return CHOSEN.get((kernel, dtype, shape), CANDIDATES[kernel][0])


def tile_rows(places: int, num_experts: int, interpreted: bool = False) -> int:
    """Rows of a tile: 128 keep two warp groups busy; 64 where an expert has few rows on average."""
    if interpreted:
        return 16
    return 128 if places >= 96 * num_experts else 64
