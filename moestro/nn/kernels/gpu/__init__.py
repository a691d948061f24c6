"""The sparse layer in Triton: sorting, grouped products with all that lies between them, combining, routing.

    expert_TK -> sort.py -> Tiles -> products.py (gate and up | SwiGLU, down) -> combine.py -> y_TD
                                     weight_gradient.py, and products.py again, on the way back
    experts.py   the above as torch operators with gradients     routing.py   scores to choice and losses
    fp8.py       the same products on rows and weights in 8 bits

Nothing here asks the device for a value: grids are the most that could be needed, and what is not needed returns at
once. So kernels can be captured in a CUDA graph and never stop the host. No atomics: every sum has a fixed order.

Needs triton and a GPU of compute capability 8.0 or more. With TRITON_INTERPRET=1 set before the first import the same
kernels run on CPU tensors, slowly; tests use that where there is no GPU.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

OLDEST = (8, 0)
"""Compute capability below which there are no bfloat16 products."""
OLDEST_FP8 = (8, 9)
"""The same for 8-bit products."""
BLOCK_FP8 = 128
"""Numbers in 8 bits that share a scale: columns of a row, rows and columns of a weight."""


def interpreted() -> bool:
    """True where kernels run in Triton's interpreter on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def why_not(device_type: str = "cuda", index: int = 0) -> str:
    """Why the kernels cannot run on a device; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'moestro[gpu]'"
    if device_type == "cpu" and interpreted():
        return ""
    if device_type != "cuda" or not torch.cuda.is_available():
        return "no GPU"
    found = torch.cuda.get_device_capability(index)
    return "" if found >= OLDEST else f"compute capability is {found[0]}.{found[1]}; kernels need 8.0 or more"


def on_its_device(operator: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """The operator with its first tensor's GPU as the current one, which is where Triton launches."""

    @functools.wraps(operator)
    def run(first: Tensor, /, *others: P.args, **named: P.kwargs) -> R:
        with torch.cuda.device_of(first):
            return operator(first, *others, **named)

    return run


def refusals() -> tuple[type[Exception], ...]:
    """What is raised where one way of computing cannot run though others may; Triton's errors are no RuntimeErrors."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton import TritonError

    return (RuntimeError, TritonError)


def why_no_fp8(device_type: str, index: int, *widths: int) -> str:
    """Why products in 8 bits cannot run on a device with these widths; empty where they can."""
    if reason := why_not(device_type, index):
        return reason
    if odd := [width for width in widths if width % BLOCK_FP8]:
        return f"widths {odd} are not multiples of {BLOCK_FP8}"
    found = OLDEST_FP8 if device_type == "cpu" else torch.cuda.get_device_capability(index)
    return "" if found >= OLDEST_FP8 else f"compute capability is {found[0]}.{found[1]}; products in 8 bits need 8.9"


def usable(tensor: Tensor) -> bool:
    """True where the kernels run on this tensor's device and take its type."""
    device = tensor.device
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    return device.type in ("cuda", "cpu") and not why_not(device.type, device.index or 0)


def takes(tensor: Tensor, *widths: int) -> bool:
    """`usable`, and rows start at multiples of 16 bytes, as the copy engine wants."""
    return usable(tensor) and all(width * tensor.element_size() % 16 == 0 for width in widths)
