"""Rotary positions (Su 2021): pairs of a head's dimensions turned by position times a frequency.

    RopeSpec -> frequencies -> angles at positions -> rotate(x)

Scalings for longer contexts as in Hugging Face's `rope_parameters`: linear (Chen 2023), llama3 (Llama 3.1), yarn
(Peng 2023, in its original and DeepSeek's form).

Dimension key:  B sequences   H heads   S positions   R rotated dimensions of a head
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.specs import RopeSpec
from moestro.nn.kernels import cpu


def frequencies(spec: RopeSpec, dim: int) -> Tensor:
    """Radians per position of each of the dim / 2 pairs, float32."""
    base_P = 1.0 / spec.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    match spec.scaling:
        case "linear":
            return base_P / spec.factor
        case "llama3":
            return _llama3(spec, base_P)
        case "yarn":
            return _yarn(spec, base_P, dim)
    return base_P


def _llama3(spec: RopeSpec, base_P: Tensor) -> Tensor:
    """Slow pairs are slowed by `factor`, fast ones kept, those between blended."""
    rotations_P = spec.original_length * base_P / (2 * math.pi)
    blend_P = (rotations_P - spec.low_frequency) / (spec.high_frequency - spec.low_frequency)
    mixed_P = (1 - blend_P) * base_P / spec.factor + blend_P * base_P
    slow_P, fast_P = rotations_P < spec.low_frequency, rotations_P > spec.high_frequency
    return torch.where(slow_P, base_P / spec.factor, torch.where(fast_P, base_P, mixed_P))


def _yarn(spec: RopeSpec, base_P: Tensor, dim: int) -> Tensor:
    """Pairs that turn less than beta_slow times over the original context are interpolated, over beta_fast kept."""

    def pair_of(rotations: float) -> float:
        return dim * math.log(spec.original_length / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = pair_of(spec.beta_fast), pair_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    interpolated_P = ((torch.arange(dim // 2).float() - low) / width).clamp(0, 1)
    return base_P / spec.factor * interpolated_P + base_P * (1 - interpolated_P)


def yarn_scale(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1, the temperature that goes with a stretched context."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def angle_scale(spec: RopeSpec) -> float:
    """Factor on cos and sin."""
    if spec.scaling != "yarn":
        return 1.0
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return yarn_scale(spec.factor, spec.mscale) / yarn_scale(spec.factor, spec.mscale_all_dim)
    return yarn_scale(spec.factor, 1.0)


class Rotary(nn.Module):
    """Cosines and sines of the positions at hand, and the turn."""

    frequency_P: Tensor

    def __init__(self, spec: RopeSpec, dim: int) -> None:
        super().__init__()
        self.interleaved, self.scale = spec.interleaved, angle_scale(spec)
        self.register_buffer("frequency_P", frequencies(spec, dim), persistent=False)

    def angles(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [length, R/2] at positions start..start + length - 1, float32."""
        position_S = torch.arange(start, start + length, device=self.frequency_P.device)
        angle_SP = position_S[:, None] * self.frequency_P
        return angle_SP.cos() * self.scale, angle_SP.sin() * self.scale

    def forward(self, x_BHSR: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Turn every pair; the result has halves layout whatever the input's, which scores do not see."""
        cos_SP, sin_SP = angles
        if x_BHSR.dim() == 4 and not self.interleaved and x_BHSR.stride(-1) == 1 and cpu.usable(x_BHSR):
            turned_BHSR: Tensor = OnePassTurn.apply(x_BHSR, cos_SP, sin_SP)
            return turned_BHSR
        if self.interleaved:
            first, second = x_BHSR[..., 0::2], x_BHSR[..., 1::2]
        else:
            first, second = x_BHSR.chunk(2, dim=-1)
        turned = torch.cat([first * cos_SP - second * sin_SP, second * cos_SP + first * sin_SP], -1)
        return turned.to(x_BHSR.dtype)


class OnePassTurn(torch.autograd.Function):
    """Halves layout through the CPU kernel; the result is contiguous, as products want it."""

    @staticmethod
    def forward(ctx: Any, x_BHSR: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        y_BHSR = torch.empty_like(x_BHSR, memory_format=torch.contiguous_format)
        cpu.rotate(x_BHSR, cos_SP, sin_SP, y_BHSR)
        ctx.save_for_backward(cos_SP, sin_SP)
        ctx.strides = torch.empty_like(x_BHSR, device="meta").stride()
        return y_BHSR

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos_SP, sin_SP = ctx.saved_tensors
        d_y_BHSR = d_outputs[0]
        if d_y_BHSR.stride(-1) != 1:
            d_y_BHSR = d_y_BHSR.contiguous()
        d_x_BHSR = torch.empty_strided(d_y_BHSR.shape, ctx.strides, dtype=d_y_BHSR.dtype)
        cpu.rotate(d_y_BHSR, cos_SP, sin_SP, d_x_BHSR, direction=-1.0)
        return d_x_BHSR, None, None
