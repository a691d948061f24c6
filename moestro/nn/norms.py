"""Root-mean-square normalisation (Zhang and Sennrich 2019), y = x * scale / sqrt(mean(x^2) + eps)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.nn.kernels import cpu


class RMSNorm(nn.Module):
    """Normalise the last dimension; under autocast the result has autocast's type."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale_D = nn.Parameter(torch.ones(width))

    def forward(self, x_XD: Tensor) -> Tensor:
        """x of any leading shape; returns the same shape."""
        kind = x_XD.device.type
        out_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_XD.dtype
        if self._takes_kernel(x_XD, out_dtype):
            y_XD: Tensor = OnePassNorm.apply(x_XD, self.scale_D, self.eps, out_dtype)
            return y_XD
        return F.rms_norm(x_XD.float(), x_XD.shape[-1:], self.scale_D.float(), self.eps).to(out_dtype)

    def _takes_kernel(self, x_XD: Tensor, out_dtype: torch.dtype) -> bool:
        pair = (x_XD.dtype, out_dtype)
        known = (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)
        return pair in known and self.scale_D.dtype == torch.float32 and cpu.usable(x_XD)


class OnePassNorm(torch.autograd.Function):
    """The same through the CPU kernel: one read and one write of x each way."""

    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, scale_D: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        x_TD = x_XD.contiguous().view(-1, x_XD.shape[-1])
        y_TD = torch.empty_like(x_TD, dtype=out_dtype)
        rstd_T = torch.empty(x_TD.shape[0])
        cpu.rms_norm(x_TD, scale_D, y_TD, rstd_T, eps)
        ctx.save_for_backward(x_TD, scale_D, rstd_T)
        ctx.out_dtype = out_dtype
        return y_TD.view(x_XD.shape)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_TD, scale_D, rstd_T = ctx.saved_tensors
        d_y_XD = d_outputs[0]
        d_y_TD = d_y_XD.to(ctx.out_dtype).contiguous().view(x_TD.shape)
        d_x_TD, d_scale_D = cpu.rms_norm_backward(x_TD, scale_D, rstd_T, d_y_TD)
        return d_x_TD.view(d_y_XD.shape), d_scale_D, None, None
