"""Where and in which precision a run computes, decided from what the machine has."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import moestro
from moestro.core.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's mallopt(3) parameters."""


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one; raises ConfigError for a device that is absent or unknown."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"train.device is {name!r}, which is not usable here ({reason}); use auto or cpu") from error
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """True where bfloat16 matrix products run on hardware made for them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pick_dtype(precision: Literal["auto", "fp32", "bf16", "fp8"], device: torch.device) -> torch.dtype:
    """The type of matrix products; weights stay float32."""
    bf16 = precision in ("bf16", "fp8") or (precision == "auto" and has_fast_bf16(device))
    return torch.bfloat16 if bf16 else torch.float32


def environment(device: torch.device) -> dict[str, str]:
    """What a run computes on, for its log: hardware, threads and versions."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "hardware": hardware,
        "cores": str(os.cpu_count() or 1),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moestro": moestro.__version__,
    }


def _processor() -> str:
    """The processor's name as its maker writes it, or its architecture."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8", errors="replace").splitlines() if about.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; a GPU copies it while the host goes on."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU thread for a while, as generating does best: one token is too little work to share out.

    60 tokens of the demo's model took 0.36 s with one thread and 15.7 s with two, on two cores that other processes
    were using too (AMD EPYC, 2026-11-21).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let the C library keep large freed blocks for reuse instead of handing them back to the system every step.

    Without it each step's gradients and activations are mapped and zeroed anew: filling a fresh 400 MB tensor took
    108 ms, a reused one 14 ms (2 cores of an EPYC 9004, 2026-11-21). Linux with glibc only; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
