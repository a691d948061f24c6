"""Which way of computing experts is fastest for a shape on this GPU: measured once, remembered in the user's cache.

    device, versions, type, tokens, widths, experts, slots -> key -> times in ms -> Path

The layer's own weights are used, without copies and without touching their gradients; random numbers come from a
generator of their own, so that a run's are left alone. Nothing is measured while a CUDA graph is captured or torch
compiles, nor for a few tokens: then the Triton kernels are taken where they run.

Dimension key:  T tokens   D width   K slots   E experts
"""

import functools
import json
import os
import statistics
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from moestro.core.errors import StorageError
from moestro.core.files import write_text
from moestro.core.native import cache_folder
from moestro.core.specs import ModelSpec
from moestro.nn.experts import TILED, Experts, takes_grouped
from moestro.nn.kernels import gpu
from moestro.nn.kernels.gpu.blocks import CANDIDATES
from moestro.nn.permute import sort_by_expert

GpuPath = Literal["triton", "fp8", "grouped", "loop"]
FEW = 1024
"""Tokens below which launching costs more than computing, and a measurement says little."""
REPEATS = 5
HEAD_START = 10_000_000
"""Cycles, some 5 ms, that the GPU idles before it is timed, so that all launches are queued by then."""
SETTLED: dict[str, GpuPath] = {}
"""What this process has looked up."""


def possible_paths(x_TD: Tensor, experts: Experts, fp8: bool = False) -> list[GpuPath]:
    """The paths that take these tensors, the likely fastest first."""
    found: list[GpuPath] = []
    if gpu.takes(x_TD, experts.width, experts.hidden):
        found.append("triton")
        if fp8 and not gpu.why_no_fp8(x_TD.device.type, x_TD.device.index or 0, experts.width, experts.hidden):
            found.append("fp8")
    if takes_grouped(x_TD, experts.width, experts.hidden) and x_TD.dtype == torch.bfloat16:
        found.append("grouped")
    return [*found, "loop"]


def why_no_fp8(spec: ModelSpec, device: torch.device) -> str:
    """Why a model's experts are not computed in 8 bits on a device; empty where they may be."""
    if spec.moe is None or spec.moe.sharing != "none":
        return "no experts with weights of their own"
    return gpu.why_no_fp8(device.type, device.index or 0, spec.width, spec.moe.expert_width)


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found for one key."""

    ms: dict[str, float]
    """Milliseconds of a forward and backward pass by each path."""
    blocks: dict[str, int] = field(default_factory=dict)
    """The fastest candidate of each Triton kernel (nn/kernels/gpu/blocks.py)."""

    def best(self, paths: list[GpuPath]) -> GpuPath:
        """The fastest of these paths."""
        return min((path for path in paths if path in self.ms), key=self.ms.__getitem__, default=paths[0])


def measured_path(x_TD: Tensor, slots: int, experts: Experts, fp8: bool = False) -> GpuPath:
    """The fastest path for these tokens on this device; in 8 bits only where `fp8` allows it."""
    paths = possible_paths(x_TD, experts, fp8)
    if len(paths) == 1 or len(x_TD) < FEW:
        return paths[0]
    key = key_of(x_TD, slots, experts) + (", fp8 too" if "fp8" in paths else "")
    if key not in SETTLED:
        known = remembered().get(key)
        if known is None:
            if torch.compiler.is_compiling() or (x_TD.is_cuda and torch.cuda.is_current_stream_capturing()):
                return paths[0]
            known = remember(key, measure(x_TD, slots, experts, paths[:-1] if len(paths) > 2 else paths))
        if "triton" in paths and known.blocks:
            from moestro.nn.kernels.gpu import tune

            tune.use(known.blocks, x_TD.dtype, tune.shape_of(experts.down_EFD))  # type: ignore[arg-type]
        SETTLED[key] = known.best(paths)
    return SETTLED[key]


def key_of(x_TD: Tensor, slots: int, experts: Experts) -> str:
    """What a measurement holds for; tokens are rounded up to a power of two. Block sizes are kept by their place."""
    tokens = 1 << max(len(x_TD) - 1, 0).bit_length()
    device = torch.cuda.get_device_name(x_TD.device) if x_TD.device.type == "cuda" else str(x_TD.device)
    versions = f"torch {torch.__version__}, block sizes {zlib.crc32(repr(CANDIDATES).encode()):08x}"
    shape = f"{tokens} tokens, {experts.width} x {experts.hidden}, {experts.num_experts} experts, {slots} slots"
    return f"{device}; {versions}; {str(x_TD.dtype).removeprefix('torch.')}; {shape}"


def measure(x_TD: Tensor, slots: int, experts: Experts, paths: list[GpuPath]) -> Measured:
    """Time every path, the Triton one with the best blocks; a path that fails is left out."""
    draw = torch.Generator(x_TD.device).manual_seed(0)
    expert_TK = torch.randint(experts.num_experts, (len(x_TD), slots), generator=draw, device=x_TD.device)
    weight_TK = torch.rand(len(x_TD), slots, generator=draw, device=x_TD.device).requires_grad_()
    random_TD = torch.randn(x_TD.shape, generator=draw, device=x_TD.device).to(x_TD.dtype).requires_grad_()
    weights = {name: weight.detach().requires_grad_() for name, weight in experts.named_parameters()}
    leaves = [random_TD, weight_TK, *weights.values()]

    def run(path: GpuPath) -> None:
        order = sort_by_expert(expert_TK, experts.num_experts, tiled=path in TILED, unused_too=True)
        y_TD = functional_call(experts, weights, (random_TD, weight_TK, order, path))
        torch.autograd.grad(y_TD, leaves, random_TD.detach())

    ms: dict[str, float] = {}
    blocks: dict[str, int] = {}
    with torch.enable_grad(), torch.autocast(x_TD.device.type, enabled=False):
        for path in paths:
            try:
                if path == "triton":
                    blocks = best_blocks(random_TD.detach(), weight_TK.detach(), expert_TK, experts)
                ms[path] = milliseconds(functools.partial(run, path))
            except torch.AcceleratorError:
                raise  # the device is lost to this process: nothing after it would work
            except gpu.refusals():  # too little memory, or an operator this build lacks
                continue
    return Measured(ms, blocks)


def best_blocks(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, experts: Experts) -> dict[str, int]:
    """Index of the fastest candidate of every kernel; empty where there is nothing to choose."""
    from moestro.nn.kernels.gpu import tune
    from moestro.nn.kernels.gpu.experts import sort_tiles

    if x_TD.dtype == torch.float32:
        return {}
    gate_up_EDF, down_EFD = (w.detach().to(x_TD.dtype) for w in (experts.gate_up_EDF, experts.down_EFD))
    tiles = sort_tiles(expert_TK, experts.num_experts)
    with torch.no_grad():
        found = tune.tune(x_TD, weight_TK, tiles, gate_up_EDF, down_EFD, functools.partial(milliseconds, repeats=3))
    return {kernel: times.index(min(times)) for kernel, times in found.items()}


def milliseconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median time on the GPU."""
    for _ in range(2):
        call()
    return statistics.median(device_ms(call) for _ in range(repeats))


def device_ms(call: Callable[[], Any]) -> float:
    """Time on the GPU between events. What the host needs to launch counts only where it waits for the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def choices_file() -> File:
    """Where measurements are kept."""
    return cache_folder() / "expert-paths.json"


@functools.cache
def remembered() -> dict[str, Measured]:
    """All measurements of this user on this machine, by key; an unreadable file counts as none."""
    try:
        known = json.loads(choices_file().read_text(encoding="utf-8"))
        return {key: Measured(dict(value["ms"]), dict(value["blocks"])) for key, value in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def remember(key: str, found: Measured) -> Measured:
    """Keep a measurement, also for later processes where the cache can be written."""
    known = remembered()
    known[key] = found
    if os.environ.get("RANK", "0") == "0":
        table = {name: {"ms": value.ms, "blocks": value.blocks} for name, value in known.items()}
        with suppress(StorageError):  # a cache that cannot be written costs a measurement per process, no more
            write_text(choices_file(), json.dumps(table, indent=1, sort_keys=True))
    return found
