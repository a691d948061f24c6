"""Sum gradients over the ranks that hold the same weights, and measure their norm.

    backward -> GradientSum() -> gradients of the whole batch -> total_norm -> clip

Losses are a rank's sum over the tokens of all, so gradients only ever add up. Gradients of one group of ranks travel
together in flat buckets, in the order of parameters: few messages, and the same sums in every run. A bucket holds
weights that have copies on the same ranks, which so compress the same numbers and stay equal to the bit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moestro.dist.compression import Compressor, below, make, methods_by_tensor
from moestro.dist.mesh import Mesh
from moestro.dist.shard import Parts, held_rows, local, pieces
from moestro.dist.spec import DistSpec

BUCKET_BYTES = 32 << 20
"""Gradients that travel in one message."""


@dataclass(slots=True)
class Bucket:
    """Gradients that travel together."""

    names: list[str]
    parameters: list[nn.Parameter]
    compressor: Compressor


class GradientSum:
    """All gradients of a model, summed in place over the axis that each parameter's `Held` names."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], parts: Parts, mesh: Mesh, spec: DistSpec) -> None:
        methods = methods_by_tensor({name: parameter.numel() for name, parameter in parameters.items()}, spec)
        groups: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
        for name, parameter in parameters.items():
            over = parts[name].sum_over
            if isinstance(parameter, DTensor):  # fully_shard sums over dp and edp, not over tp or between copies
                over = {"stage": "tp", "stage_copy": "tp", "dp_replicate": "dp_replicate"}.get(over, "")
            if over and mesh[over].size > 1:
                groups.setdefault((over, methods[name], parts[name].same_on), []).append(name)
        self.buckets = [
            Bucket(names, [parameters[name] for name in names], make(method, spec, mesh[axis]))
            for (axis, method, _), members in groups.items()
            for names in buckets_of({name: parameters[name].numel() * 4 for name in members}, BUCKET_BYTES)
        ]

    def __call__(self) -> None:
        """Sum; a parameter without a gradient counts as zero."""
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            grads = [local(parameter.grad) for parameter in bucket.parameters if parameter.grad is not None]
            flat = torch.cat([grad.flatten() for grad in grads])
            total = bucket.compressor.sum(flat, [grad.shape for grad in grads])
            for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    @property
    def sent_bytes(self) -> float:
        """Sent by this rank so far."""
        return sum(bucket.compressor.sent_bytes for bucket in self.buckets)

    def state(self) -> dict[str, Tensor]:
        """What compressors remember, by a name of their bucket."""
        return {
            f"{bucket.names[0]}.{key}": tensor
            for bucket in self.buckets
            for key, tensor in bucket.compressor.state().items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Let compressors go on from what `state` gave."""
        for bucket in self.buckets:
            bucket.compressor.load(below(bucket.names[0], tensors))


def buckets_of(size_bytes: Mapping[str, int], most_bytes: int) -> Iterator[list[str]]:
    """Cut a list of names where it grows beyond so many bytes; a larger parameter gets a bucket of its own."""
    bucket: list[str] = []
    size = 0
    for name, own in size_bytes.items():
        if bucket and size + own > most_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(name)
        size += own
    if bucket:
        yield bucket


def total_norm(parameters: Mapping[str, nn.Parameter], parts: Parts, mesh: Mesh, apart: bool = False) -> Tensor:
    """The norm of the whole model's gradient: every rank's part counts once, whatever has copies.

    apart   copies of the model have gradients of their own: the norm of ours
    """
    square = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            held = held_rows(parameter, parts[name])
            counted = [local(parameter.grad)]
            if held.starts is not None:
                counted = [part for _, _, part in pieces(name, parameter.grad, held.counted)]
            for part in counted:
                square += part.double().square().sum() / held.copies(mesh)
    if apart:
        return (mesh["copy"].sum(square) * mesh.layout.dp_replicate).sqrt().float()
    return mesh["world"].sum(square).sqrt().float()
