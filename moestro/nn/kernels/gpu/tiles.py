"""Rows grouped by expert, cut into the tiles that products work through; made by sort.py, needs no triton.

Dimension key:  T tokens   K slots   A = T*K places   E experts   X = E + 2   M most tiles
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows grouped by expert, and the tiles they are worked on in; int32, on the device."""

    source_A: Tensor
    """The place in expert_TK behind each row; used places first."""
    row_A: Tensor
    """The row of each place, -1 where it is unused."""
    offset_X: Tensor
    """First row of each expert, then the number of used rows, then the number of tiles."""
    tile_2M: Tensor
    """Expert and first row of each tile."""
    busiest_E: Tensor
    """Experts, most rows first."""
    rows: int
    """Rows of a tile."""
    slots: int
    """K."""
