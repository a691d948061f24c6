"""What this machine offers a training run: devices, precisions, operations, and which fast path is active and why."""

import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.nn import functional as F

from moestro.core.specs import MoESpec
from moestro.core.units import count_text
from moestro.nn.kernels import cpu, gpu
from moestro.nn.moe import MoE
from moestro.nn.path_choice import choices_file, remembered
from moestro.train.device import has_fast_bf16, pick_device, pick_dtype

OPTIONAL = {
    "transformers": "only for checking imports against it; pip install 'moestro[hf]'",
    "tensorboard": "curves in TensorBoard; pip install 'moestro[tensorboard]'",
    "pyarrow": "corpora in Parquet; pip install 'moestro[data]'",
    "triton": "GPU kernels; pip install 'moestro[gpu]'",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination."""

    name: str
    state: str
    why: str = ""


def examine() -> list[Finding]:
    """Look at the machine; takes about a second."""
    device = pick_device("auto")
    return [
        Finding("python", platform.python_version()),
        Finding("torch", torch.__version__, f"{torch.get_num_threads()} CPU threads"),
        _gpu(),
        Finding("device of a run", str(device), "train.device=auto"),
        *_precisions(device),
        _grouped_mm(device),
        Finding(
            "CPU kernels", "active" if cpu.library() else "absent", cpu.why_not() or "nn/kernels/cpu.cpp, compiled"
        ),
        Finding("GPU kernels", "absent" if gpu.why_not() else "active", gpu.why_not() or "nn/kernels/gpu/, Triton"),
        *_expert_path(device),
        *_measured_paths(),
        *[_package(name, use) for name, use in OPTIONAL.items()],
    ]


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", "none", "torch sees no CUDA device")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Finding("GPU", names, f"{torch.cuda.mem_get_info()[1] / 1e9:.0f} GB each")


def _precisions(device: torch.device) -> list[Finding]:
    rates = {dtype: product_flops_per_s(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    text = ", ".join(f"{str(dtype).removeprefix('torch.')} {count_text(rate)}FLOP/s" for dtype, rate in rates.items())
    chosen = str(pick_dtype("auto", device)).removeprefix("torch.")
    why = "hardware for bfloat16" if has_fast_bf16(device) else "no hardware for bfloat16"
    return [Finding("matrix products", text, "1024 x 1024, measured now"), Finding("precision of a run", chosen, why)]


def product_flops_per_s(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Floating-point operations per second of a square product, best of five."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(6):
        begun_s = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for a GPU
        best_s = min(best_s, time.perf_counter() - begun_s)
    return 2 * size**3 / best_s


def _grouped_mm(device: torch.device) -> Finding:
    try:
        x_ND, weight_EDF = torch.randn(8, 16, device=device), torch.randn(2, 16, 16, device=device)
        F.grouped_mm(
            x_ND.bfloat16(), weight_EDF.bfloat16(), offs=torch.tensor([4, 8], device=device, dtype=torch.int32)
        )
    except (AttributeError, RuntimeError) as error:
        return Finding("grouped_mm", "absent", str(error).splitlines()[0])
    return Finding("grouped_mm", "works")


def _expert_path(device: torch.device) -> list[Finding]:
    layer = MoE(64, MoESpec(num_experts=4, expert_width=64)).to(device)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        why = {
            "fused": "own products, nn/kernels/experts.cpp: fastest there, see benchmarks/moe_layer.py",
            "triton": "GPU kernels are active; from 1,024 tokens on what is measured at a layer's first step decides",
            "fp8": "asked for, and faster",
            "grouped": cpu.why_no_products(dtype) if device.type == "cpu" else "one launch for all experts",
            "loop": "type or widths that grouped_mm does not take",
        }
        path = layer.fastest_path(torch.empty(1, 64, device=device, dtype=dtype))
        found.append(Finding(f"experts in {str(dtype).removeprefix('torch.')}", path, why[path]))
    return found


def _measured_paths() -> list[Finding]:
    """What this user's runs have measured on GPUs of this machine."""
    found = []
    for key, measured in sorted(remembered().items()):
        times = ", ".join(f"{path} {ms:.2f} ms" for path, ms in sorted(measured.ms.items(), key=lambda pair: pair[1]))
        best = min(measured.ms, key=measured.ms.__getitem__, default="none ran")
        found.append(Finding("measured", best, f"{times}; {key}; kept in {choices_file()}"))
    return found


def _package(name: str, use: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, "not installed", use)
