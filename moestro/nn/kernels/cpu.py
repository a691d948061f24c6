"""Compile cpu.cpp and experts.cpp once per machine and call them on tensors.

    library() -> the loaded kernels, or None; why_not() -> the reason in words

It uses the OpenMP runtime that torch has already loaded: a second runtime would fight torch's threads for the cores.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.core.native import load_native

FOLDER = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp"]
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@functools.cache
def _load(name: str, declare: Callable[[ctypes.CDLL], None]) -> tuple[ctypes.CDLL | None, str]:
    """The kernels of one source and an empty reason, or None and why."""
    runtime = _openmp_runtime()
    if runtime is None:
        return None, "torch runs without a shared OpenMP runtime here"
    headers = "".join(path.read_text() for path in sorted(FOLDER.glob("*.h")))
    link = [str(runtime), f"-Wl,-rpath,{runtime.parent}"]
    loaded, reason = load_native(FOLDER / name, FLAGS, link, depends=headers)
    try:
        if loaded is not None:
            declare(loaded)
    except AttributeError as error:
        return None, f"{loaded} lacks a kernel ({error}); delete it"
    return loaded, reason


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had."""
    return _load("cpu.cpp", _declare)[0]


def why_not() -> str:
    """Why `library()` is None; empty where it is not."""
    return _load("cpu.cpp", _declare)[1]


def experts_library() -> ctypes.CDLL | None:
    """The expert layer's products, or None where they cannot be had."""
    return _load("experts.cpp", _declare_experts)[0] if library() else None


def why_no_products(dtype: torch.dtype) -> str:
    """Why the expert layer does not use its own products for this type on a CPU; empty where it does."""
    if dtype not in NAMES:
        return "they take float32 and bfloat16"
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return "bfloat16 has AMX tiles here, which grouped_mm uses"
    return why_not() or _load("experts.cpp", _declare_experts)[1]


def _openmp_runtime() -> Path | None:
    """The OpenMP library in this process, as the Linux kernel lists it."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    files = (line.rsplit(maxsplit=1)[-1] for line in maps.read_text().splitlines() if "/" in line)
    return next((Path(file) for file in files if Path(file).name.startswith(("libgomp", "libiomp", "libomp"))), None)


def _declare(loaded: ctypes.CDLL) -> None:
    pointer: Any = ctypes.c_void_p
    integer: Any = ctypes.c_int64
    for name in NAMES.values():
        getattr(loaded, f"combine_{name}").argtypes = [pointer] * 3 + [integer] * 3
        strided = [pointer] + [integer] * 3
        turn: Any = [pointer, pointer, ctypes.c_float]
        getattr(loaded, f"rotate_{name}").argtypes = strided + turn + strided + [integer] * 4
        getattr(loaded, f"causal_softmax_{name}").argtypes = [pointer] + [integer] * 3 + [ctypes.c_float]
        getattr(loaded, f"causal_softmax_backward_{name}").argtypes = [pointer] * 2 + [integer] * 3 + [ctypes.c_float]
        getattr(loaded, f"cross_entropy_{name}").argtypes = [pointer] * 3 + [integer] * 2 + [ctypes.c_float]
    for pair in ("f32_f32", "f32_bf16", "bf16_bf16"):
        getattr(loaded, f"rms_norm_{pair}").argtypes = [pointer] * 4 + [integer] * 2 + [ctypes.c_float]
        getattr(loaded, f"rms_norm_backward_{pair}").argtypes = [pointer] * 6 + [integer] * 2
    loaded.adamw_step.argtypes = [pointer] * 4 + [integer] + [ctypes.c_float] * 8
    loaded.squares.argtypes, loaded.squares.restype = [pointer, integer], ctypes.c_double
    loaded.count_sort.argtypes = [pointer, integer, integer] + [pointer] * 3
    loaded.count_sort.restype = integer


def _declare_experts(loaded: ctypes.CDLL) -> None:
    pointer: Any = ctypes.c_void_p
    integer: Any = ctypes.c_int64
    for pair in ("f32_f32", "bf16_f32", "bf16_bf16"):
        getattr(loaded, f"forward_{pair}").argtypes = [pointer] * 8 + [integer] * 3
        getattr(loaded, f"backward_{pair}").argtypes = [pointer] * 14 + [integer] * 3
    loaded.multiplied_ns.restype = integer


def usable(*tensors: Tensor) -> bool:
    """True where the kernels exist and take these tensors: on the CPU, contiguous, float32 or bfloat16."""
    return all(t.device.type == "cpu" and t.dtype in NAMES for t in tensors) and library() is not None


def has_products(x_TD: Tensor) -> bool:
    """True where the expert layer's own products take x and are the fastest way."""
    return usable(x_TD) and not why_no_products(x_TD.dtype)


def experts_forward(*tensors: Tensor) -> None:
    """x, token_N, weight_N, count_E, gate_up and down of all experts -> gate_up_NF, out_ND (the last two)."""
    _experts("forward", tensors, gate_up=tensors[4])


def experts_backward(*tensors: Tensor) -> None:
    """The same with d_y second, and gate_up_NF -> act_NF, d_gate_up_NF, d_x_ND, d_weight_N, d_gate_up, d_down."""
    _experts("backward", tensors, gate_up=tensors[5])


def _experts(way: str, tensors: tuple[Tensor, ...], gate_up: Tensor) -> None:
    num_experts, width, both = gate_up.shape
    call = getattr(experts_library(), f"{way}_{NAMES[tensors[0].dtype]}_{NAMES[gate_up.dtype]}")
    call(*(tensor.data_ptr() for tensor in tensors), num_experts, width, both // 2)


def multiplied_s() -> float:
    """Seconds that threads have spent inside the experts' products so far, all threads together; for measurements."""
    loaded = experts_library()
    return loaded.multiplied_ns() / 1e9 if loaded else 0.0


def combine(rows_ND: Tensor, slot_TK: Tensor) -> Tensor:
    """y[t] = sum over k of rows[slot[t, k]], in the order of k; slot -1 adds nothing."""
    y_TD = rows_ND.new_empty(slot_TK.shape[0], rows_ND.shape[1])
    call = getattr(library(), f"combine_{NAMES[rows_ND.dtype]}")
    call(rows_ND.data_ptr(), slot_TK.data_ptr(), y_TD.data_ptr(), *slot_TK.shape, rows_ND.shape[1])
    return y_TD


def adamw_(tensors: tuple[Tensor, Tensor, Tensor, Tensor], numbers: tuple[float, ...]) -> None:
    """One step on (weight, gradient, both moments), all float32 and contiguous; all but the gradient change in place.

    numbers   lr, beta1, beta2, eps, weight decay, scale of the gradient, 1 - beta1^step, sqrt(1 - beta2^step)
    """
    loaded = library()
    assert loaded is not None
    loaded.adamw_step(*(tensor.data_ptr() for tensor in tensors), tensors[0].numel(), *numbers)


def sum_of_squares(x: Tensor) -> float:
    """Of all numbers of a contiguous float32 tensor; the same from run to run."""
    loaded = library()
    assert loaded is not None
    return float(loaded.squares(x.data_ptr(), x.numel()))


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
