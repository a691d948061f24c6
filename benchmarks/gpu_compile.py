"""Compile the GPU kernels of all benchmark shapes and recipes at once, into Triton's cache.

    python benchmarks/gpu_compile.py [layer] [recipes]

A kernel takes a second or two to compile and a benchmark needs some two hundred, so jobs are dealt out to a process per
core; each launches its kernels on few tokens and two experts. Prints the seconds it took.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_cases import SHAPES
from gpu_report import DEVICE
from gpu_step import ONE_BILLION, ROUTINGS, route

from moestro.core.config import build
from moestro.core.specs import ModelSpec
from moestro.nn.kernels.gpu import launch, tune
from moestro.nn.kernels.gpu.blocks import CANDIDATES, Kernel
from moestro.nn.kernels.gpu.experts import sort_tiles, triton_experts
from moestro.train.recipe import load_recipe

Job = tuple[Any, ...]
TOKENS = 256
LIMIT_S = 110


def jobs_for(wanted: list[str]) -> list[Job]:
    """Long ones first."""
    models: list[ModelSpec] = []
    found: list[Job] = []
    if "layer" in wanted:
        models.append(build(ModelSpec, ONE_BILLION))
        found += [("kernel", *sizes, kernel) for sizes in sizes_of_layers() for kernel in CANDIDATES]
        found += [("layer", s.width, s.hidden, s.experts, s.slots, torch.bfloat16) for s in SHAPES]
        found.append(("layer", 256, 384, 16, 2, torch.bfloat16))  # the benchmark's check
        found += [("route", *case) for case in ROUTINGS]
    if "recipes" in wanted:
        models += [load_recipe(path).model for path in sorted((ROOT / "recipes").glob("h200-*.toml"))]
    for model in models:
        assert model.moe is not None
        router, sizes = model.moe.router, (model.width, model.moe.expert_width)
        found += [("kernel", *sizes, kernel) for kernel in CANDIDATES if ("kernel", *sizes, kernel) not in found]
        found += [("layer", *sizes, model.moe.num_experts, router.max_experts, torch.float32)]
        found += [("masters", *sizes, kernel) for kernel in ("d_gate_up_weight", "d_down_weight")]
        found.append(("route", TOKENS, model.width, model.moe.num_experts, router.rule, router.k))
    return list(dict.fromkeys(found))


def sizes_of_layers() -> list[tuple[int, int]]:
    """Widths, each pair once: experts and tokens are no constants of the products."""
    return list(dict.fromkeys((shape.width, shape.hidden) for shape in SHAPES))


def tensors(width: int, hidden: int, slots: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """x, shares, tiles of two experts, their weights."""
    x_TD = torch.randn(TOKENS, width, device=DEVICE, dtype=torch.bfloat16)
    expert_TK = torch.randint(2, (TOKENS, slots), device=DEVICE)
    weights = [torch.randn(size, device=DEVICE, dtype=dtype) for size in ((2, width, 2 * hidden), (2, hidden, width))]
    return x_TD, torch.rand(TOKENS, slots, device=DEVICE), sort_tiles(expert_TK, 2, rows=128), *weights


def do_kernel(width: int, hidden: int, kernel: Kernel) -> None:
    """Every size of one product."""
    launch_with = tune.trials(*tensors(width, hidden, 2, torch.bfloat16))[kernel]
    for blocks in CANDIDATES[kernel]:
        launch_with(blocks)


def do_masters(width: int, hidden: int, kernel: Kernel) -> None:
    """Weights' gradients in float32, as a training step wants them."""
    x_TD, _, tiles, *_ = tensors(width, hidden, 2, torch.bfloat16)
    first = kernel == "d_gate_up_weight"
    other = x_TD.new_zeros(2 * TOKENS, 2 * hidden if first else hidden)
    pair = (x_TD, other) if first else (other, x_TD)
    for blocks in CANDIDATES[kernel]:
        launch.weight_gradients(*pair, tiles, first, torch.float32, blocks)


def do_layer(width: int, hidden: int, experts: int, slots: int, dtype: torch.dtype) -> None:
    """Sorting, combining, and the whole layer with default sizes; in 8 bits too where widths allow."""
    sort_tiles(torch.randint(experts, (TOKENS, slots), device=DEVICE), experts, rows=128)
    x_TD, share_TK, tiles, *weights = tensors(width, hidden, slots, dtype)
    leaves = [tensor.requires_grad_() for tensor in (x_TD, share_TK, *weights)]
    for eight in (False, True) if width % 128 == hidden % 128 == 0 else (False,):
        y_TD = triton_experts(x_TD, share_TK, tiles, *weights, eight=eight)
        torch.autograd.grad(y_TD, leaves, torch.randn_like(y_TD))
        with torch.no_grad():
            triton_experts(x_TD, share_TK, tiles, *weights, eight=eight)


def do_route(tokens: int, width: int, experts: int, rule: str, k: int) -> None:
    """The fused router, both ways."""
    route(tokens, width, experts, rule, k, DEVICE, fused=True)()


DO: dict[str, Callable[..., None]] = {
    "kernel": do_kernel, "masters": do_masters, "layer": do_layer, "route": do_route,
}  # fmt: skip


def work(wanted: list[str], part: int, parts: int) -> None:
    """Every so many'th job; one that fails is named."""
    for job in jobs_for(wanted)[part::parts]:
        try:
            DO[job[0]](*job[1:])
            torch.accelerator.synchronize()
        except Exception as error:
            print(f"{job}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)


def compile_all(wanted: list[str]) -> tuple[float, list[str]]:
    """All jobs in processes of their own; seconds, and what went wrong."""
    begun_s, parts = time.monotonic(), min(os.cpu_count() or 1, 12)
    command = [sys.executable, __file__, *wanted]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([*command, "--part", f"{i}/{parts}"], **pipes) for i in range(parts)]
    problems: list[str] = []
    for worker in workers:
        try:
            said, errors = worker.communicate(timeout=max(LIMIT_S - (time.monotonic() - begun_s), 1))
        except subprocess.TimeoutExpired:
            worker.kill()
            said, errors = worker.communicate()
        problems += said.splitlines()
        if worker.returncode:
            problems += [f"a worker ended with code {worker.returncode}", *errors.splitlines()[-3:]]
    return time.monotonic() - begun_s, problems


def main() -> None:
    """Deal out, or work."""
    words = sys.argv[1:]
    if "--part" in words:
        part, parts = (int(number) for number in words.pop().split("/"))
        work(words, part, parts)
        return
    seconds, problems = compile_all(words or ["layer", "recipes"])
    print(*problems, f"compiled in {seconds:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
