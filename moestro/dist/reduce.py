"""Sum gradients over the ranks that hold the same weights, and measure their norm.

    backward -> GradientSum() -> gradients of the whole batch -> total_norm -> clip

Losses are a rank's sum over the tokens of all, so gradients only ever add up. Gradients of one group of ranks travel
together in flat buckets, in the order of parameters: few messages, and the same sums in every run.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moestro.dist.mesh import Mesh
from moestro.dist.shard import Parts, held_rows, local

BUCKET_BYTES = 32 << 20
"""Gradients that travel in one message."""


class GradientSum:
    """All gradients of a model, summed in place over the axis that each parameter's `Held` names."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], parts: Parts, mesh: Mesh) -> None:
        by_axis: dict[str, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            over = parts[name].sum_over
            if isinstance(parameter, DTensor):  # fully_shard sums over dp and edp, not over tp
                over = "tp" if over == "stage" else ""
            if over:
                by_axis.setdefault(over, []).append(parameter)
        self.buckets = [
            (mesh[axis], bucket)
            for axis, members in by_axis.items()
            if mesh[axis].size > 1
            for bucket in buckets_of(members, BUCKET_BYTES)
        ]

    def __call__(self) -> None:
        """Sum; a parameter without a gradient counts as zero."""
        for axis, parameters in self.buckets:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat, group=axis.group)
            for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(total.view_as(grad))


def buckets_of(parameters: list[nn.Parameter], most_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Cut a list where it grows beyond so many bytes; a larger parameter gets a bucket of its own."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        own = parameter.numel() * parameter.element_size()
        if bucket and size + own > most_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += own
    if bucket:
        yield bucket


def total_norm(parameters: Mapping[str, nn.Parameter], parts: Parts, mesh: Mesh) -> Tensor:
    """The norm of the whole model's gradient: every rank's part counts once, whatever has copies."""
    square = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            copies = held_rows(parameter, parts[name]).copies(mesh)
            square += local(parameter.grad).double().square().sum() / copies
    return mesh["world"].sum(square).sqrt().float()


def scale_gradients(parameters: Mapping[str, nn.Parameter], norm: Tensor, most: float) -> None:
    """Shrink all gradients so that their norm is at most `most`."""
    factor = torch.clamp(most / (norm + 1e-6), max=1.0)
    for parameter in parameters.values():
        if parameter.grad is not None:
            local(parameter.grad).mul_(factor)

