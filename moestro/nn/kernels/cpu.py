"""Compile cpu.cpp once per machine and call it on tensors.

    library() -> the loaded kernels, or None; why_not() -> the reason in words

The shared object lies in the user's cache, named by a hash of the source, the compiler and the CPU, so that an
upgrade or a move to another machine builds a new one. It uses the OpenMP runtime that torch has already loaded:
a second runtime would fight torch's threads for the cores.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp"]
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
OFF = "MOESTRO_CPU_KERNELS"
"""Environment variable: `off` keeps to plain torch."""


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The kernels and an empty reason, or None and why."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    runtime = _openmp_runtime()
    if os.environ.get(OFF) == "off":
        return None, f"{OFF} is off"
    if compiler is None:
        return None, "no C++ compiler found; install g++ to get them"
    if runtime is None:
        return None, "torch runs without a shared OpenMP runtime here"
    target = _cache_folder() / f"cpu-{_fingerprint(compiler, runtime)}.so"
    if not target.exists():
        problem = _compile(compiler, runtime, target)
        if problem:
            return None, problem
    try:
        return _declare(ctypes.CDLL(str(target))), ""
    except (OSError, AttributeError) as error:
        return None, f"{target} cannot be loaded ({error}); delete it"


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had."""
    return _load()[0]


def why_not() -> str:
    """Why `library()` is None; empty where it is not."""
    return _load()[1]


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "moestro"


def _openmp_runtime() -> Path | None:
    """The OpenMP library in this process, as the Linux kernel lists it."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    files = (line.rsplit(maxsplit=1)[-1] for line in maps.read_text().splitlines() if "/" in line)
    return next((Path(file) for file in files if Path(file).name.startswith(("libgomp", "libiomp", "libomp"))), None)


def _fingerprint(compiler: str, runtime: Path) -> str:
    cpu = Path("/proc/cpuinfo")
    features = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.exists() else ""
    )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [SOURCE.read_text(), *FLAGS, version, str(runtime), platform.machine(), features]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, runtime: Path, target: Path) -> str:
    """Build `target` whole or not at all; returns what went wrong, or an empty string."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            compiled, linked = Path(folder, "cpu.o"), Path(folder, "cpu.so")
            for command in (
                [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
                [compiler, "-shared", str(compiled), str(runtime), f"-Wl,-rpath,{runtime.parent}", "-o", str(linked)],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    return (
                        f"{compiler} failed: {done.stderr.strip().splitlines()[0] if done.stderr else done.returncode}"
                    )
            linked.replace(target)
    except OSError as error:
        return f"cannot build in {target.parent}: {error.strerror or error}"
    return ""


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    pointer: Any = ctypes.c_void_p
    integer: Any = ctypes.c_int64
    for name in NAMES.values():
        getattr(loaded, f"swiglu_{name}").argtypes = [pointer] * 3 + [integer] * 2
        getattr(loaded, f"swiglu_backward_{name}").argtypes = [pointer] * 6 + [integer] * 2
        getattr(loaded, f"combine_{name}").argtypes = [pointer] * 3 + [integer] * 3
        getattr(loaded, f"gather_{name}").argtypes = [pointer] * 3 + [integer] * 3
        strided = [pointer] + [integer] * 3
        turn: Any = [pointer, pointer, ctypes.c_float]
        getattr(loaded, f"rotate_{name}").argtypes = strided + turn + strided + [integer] * 4
        getattr(loaded, f"causal_softmax_{name}").argtypes = [pointer] + [integer] * 3 + [ctypes.c_float]
        getattr(loaded, f"causal_softmax_backward_{name}").argtypes = [pointer] * 2 + [integer] * 3 + [ctypes.c_float]
        getattr(loaded, f"cross_entropy_{name}").argtypes = [pointer] * 3 + [integer] * 2 + [ctypes.c_float]
    for pair in ("f32_f32", "f32_bf16", "bf16_bf16"):
        getattr(loaded, f"rms_norm_{pair}").argtypes = [pointer] * 4 + [integer] * 2 + [ctypes.c_float]
        getattr(loaded, f"rms_norm_backward_{pair}").argtypes = [pointer] * 6 + [integer] * 2
    for pair in ("f32_bf16", "bf16_f32"):
        getattr(loaded, f"convert_{pair}").argtypes = [pointer] * 2 + [integer]
    loaded.count_sort.argtypes = [pointer, integer, integer] + [pointer] * 3
    loaded.count_sort.restype = integer
    return loaded


def usable(*tensors: Tensor) -> bool:
    """True where the kernels exist and take these tensors: on the CPU, contiguous, float32 or bfloat16."""
    return library() is not None and all(t.device.type == "cpu" and t.dtype in NAMES for t in tensors)


def swiglu(gate_up_NF: Tensor, weight_N: Tensor, act_NF: Tensor) -> None:
    """act = silu(gate) * up * weight, written into act_NF; weights are float32."""
    rows, width = act_NF.shape  # gate_up and weights may have more rows
    call = getattr(library(), f"swiglu_{NAMES[act_NF.dtype]}")
    call(gate_up_NF.data_ptr(), weight_N.data_ptr(), act_NF.data_ptr(), rows, width)


def swiglu_backward(
    gate_up_NF: Tensor, weight_N: Tensor, d_act_NF: Tensor, act_NF: Tensor, d_gate_up_NF: Tensor, d_weight_N: Tensor
) -> None:
    """From d_act: act again, d_gate_up and d_weight, written into the last three."""
    rows, width = act_NF.shape
    call = getattr(library(), f"swiglu_backward_{NAMES[act_NF.dtype]}")
    tensors = (gate_up_NF, weight_N, d_act_NF, act_NF, d_gate_up_NF, d_weight_N)
    call(*(tensor.data_ptr() for tensor in tensors), rows, width)


def combine(rows_ND: Tensor, slot_TK: Tensor) -> Tensor:
    """y[t] = sum over k of rows[slot[t, k]], in the order of k; slot -1 adds nothing."""
    y_TD = rows_ND.new_empty(slot_TK.shape[0], rows_ND.shape[1])
    call = getattr(library(), f"combine_{NAMES[rows_ND.dtype]}")
    call(rows_ND.data_ptr(), slot_TK.data_ptr(), y_TD.data_ptr(), *slot_TK.shape, rows_ND.shape[1])
    return y_TD


def gather(x_TD: Tensor, index_N: Tensor, out_PD: Tensor) -> None:
    """out[i] = x[index[i]] for the N indices, zeros in the remaining rows."""
    call = getattr(library(), f"gather_{NAMES[x_TD.dtype]}")
    call(x_TD.data_ptr(), index_N.data_ptr(), out_PD.data_ptr(), len(index_N), *out_PD.shape)


def convert(x: Tensor, y: Tensor) -> None:
    """y = x, from float32 to bfloat16 or back; both contiguous and of one size."""
    call = getattr(library(), f"convert_{NAMES[x.dtype]}_{NAMES[y.dtype]}")
    call(x.data_ptr(), y.data_ptr(), x.numel())


def count_sort(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable counting sort; returns count_E, source_N (flat place in expert_TK of each sorted row) and slot_TK."""
    count_E = expert_TK.new_empty(num_experts)
    source_A, slot_TK = expert_TK.new_empty(expert_TK.numel()), torch.empty_like(expert_TK)
    loaded = library()
    assert loaded is not None
    used = loaded.count_sort(
        expert_TK.data_ptr(),
        expert_TK.numel(),
        num_experts,
        count_E.data_ptr(),
        source_A.data_ptr(),
        slot_TK.data_ptr(),
    )
    return count_E, source_A[:used], slot_TK


def rms_norm(x_TD: Tensor, scale_D: Tensor, y_TD: Tensor, rstd_T: Tensor, eps: float) -> None:
    """y = x * scale / rms(x); also 1 / rms per row."""
    call = getattr(library(), f"rms_norm_{NAMES[x_TD.dtype]}_{NAMES[y_TD.dtype]}")
    call(x_TD.data_ptr(), scale_D.data_ptr(), y_TD.data_ptr(), rstd_T.data_ptr(), *x_TD.shape, eps)


def rms_norm_backward(x_TD: Tensor, scale_D: Tensor, rstd_T: Tensor, d_y_TD: Tensor) -> tuple[Tensor, Tensor]:
    """d_x and d_scale."""
    d_x_TD, d_scale_D = torch.empty_like(x_TD), torch.empty_like(scale_D)
    call = getattr(library(), f"rms_norm_backward_{NAMES[x_TD.dtype]}_{NAMES[d_y_TD.dtype]}")
    tensors = (x_TD, scale_D, rstd_T, d_y_TD, d_x_TD, d_scale_D)
    call(*(tensor.data_ptr() for tensor in tensors), *x_TD.shape)
    return d_x_TD, d_scale_D


def rotate(x_BHSR: Tensor, cos_SP: Tensor, sin_SP: Tensor, y_BHSR: Tensor, direction: float = 1.0) -> None:
    """y = x with every pair turned by its position's angle, or back with direction -1; rows contiguous."""
    call = getattr(library(), f"rotate_{NAMES[x_BHSR.dtype]}")
    source, target = ((t.data_ptr(), *t.stride()[:3]) for t in (x_BHSR, y_BHSR))
    call(*source, cos_SP.data_ptr(), sin_SP.data_ptr(), direction, *target, *x_BHSR.shape[:3], cos_SP.shape[1])


def causal_softmax_(score_NQK: Tensor, scale: float) -> None:
    """Scores to causal softmax weights, in place; contiguous."""
    getattr(library(), f"causal_softmax_{NAMES[score_NQK.dtype]}")(score_NQK.data_ptr(), *score_NQK.shape, scale)


def causal_softmax_backward_(weight_NQK: Tensor, d_weight_NQK: Tensor, scale: float) -> None:
    """d_weight becomes d_score, in place; contiguous."""
    call = getattr(library(), f"causal_softmax_backward_{NAMES[weight_NQK.dtype]}")
    call(weight_NQK.data_ptr(), d_weight_NQK.data_ptr(), *weight_NQK.shape, scale)


def cross_entropy_(logit_TV: Tensor, target_T: Tensor, loss_T: Tensor, scale: float) -> None:
    """Losses per row (nats) into loss_T; logits become the gradient of scale * sum of losses, in place."""
    call = getattr(library(), f"cross_entropy_{NAMES[logit_TV.dtype]}")
    call(logit_TV.data_ptr(), target_T.data_ptr(), loss_T.data_ptr(), *logit_TV.shape, scale)
