"""Time the block sizes of `blocks.py` on real tensors and keep each kernel's winner.

    x_TD, share_TK, Tiles, weights -> every kernel with every candidate -> index of the fastest

Every launch computes the right result whatever the blocks, so this needs no care but time: a kernel of a new size is
compiled first, which takes a second or two.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moestro.nn.kernels.gpu import launch, refusals
from moestro.nn.kernels.gpu.blocks import CANDIDATES, CHOSEN, Blocks, Kernel, Shape
from moestro.nn.kernels.gpu.tiles import Tiles

Clock = Callable[[Callable[[], Any]], float]
"""Runs a call some times and says how long it takes."""


def trials(
    x_TD: Tensor, share_TK: Tensor, tiles: Tiles, gate_up_EDF: Tensor, down_EFD: Tensor
) -> dict[Kernel, Callable[[Blocks], Any]]:
    """Every kernel as a function of its blocks, on the tensors of one forward and backward pass; d_y is x."""
    start = CANDIDATES["gate_up"][0]
    act_AF, gate_up_AF = launch.gate_up_act(x_TD, share_TK, tiles, gate_up_EDF, True, start)
    d_gate_up_AF, dtype = torch.empty_like(gate_up_AF).copy_(gate_up_AF), x_TD.dtype
    return {
        "gate_up": lambda blocks: launch.gate_up_act(x_TD, share_TK, tiles, gate_up_EDF, True, blocks),
        "down": lambda blocks: launch.rows_product(act_AF, tiles, down_EFD, False, blocks),
        "act_backward": lambda blocks: launch.act_backward(x_TD, share_TK, tiles, down_EFD, gate_up_AF, blocks),
        "d_x": lambda blocks: launch.rows_product(d_gate_up_AF, tiles, gate_up_EDF, True, blocks),
        "d_gate_up_weight": lambda blocks: launch.weight_gradients(x_TD, d_gate_up_AF, tiles, True, dtype, blocks),
        "d_down_weight": lambda blocks: launch.weight_gradients(act_AF, x_TD, tiles, False, dtype, blocks),
    }


def tune(
    x_TD: Tensor, share_TK: Tensor, tiles: Tiles, gate_up_EDF: Tensor, down_EFD: Tensor, clock: Clock
) -> dict[Kernel, list[float]]:
    """Milliseconds of every candidate of every kernel; inf where one does not fit. Winners are in use afterwards."""
    found: dict[Kernel, list[float]] = {}
    for kernel, launch_with in trials(x_TD, share_TK, tiles, gate_up_EDF, down_EFD).items():
        times = []
        for blocks in CANDIDATES[kernel]:
            try:
                times.append(clock(lambda run=launch_with, blocks=blocks: run(blocks)))  # type: ignore[misc]
            except refusals() as error:  # more shared memory or registers than there are
                if isinstance(error, torch.AcceleratorError):
                    raise
                times.append(float("inf"))
        found[kernel] = times
    use({kernel: times.index(min(times)) for kernel, times in found.items()}, x_TD.dtype, shape_of(down_EFD))
    return found


def shape_of(down_EFD: Tensor) -> Shape:
    """Width, expert width, experts."""
    num_experts, hidden, width = down_EFD.shape
    return width, hidden, num_experts


def use(winners: dict[Kernel, int], dtype: torch.dtype, shape: Shape) -> None:
    """Launch these candidates from now on; unknown ones are left alone."""
    for kernel, index in winners.items():
        if kernel in CANDIDATES and 0 <= index < len(CANDIDATES[kernel]):
            CHOSEN[kernel, dtype, shape] = CANDIDATES[kernel][index]
